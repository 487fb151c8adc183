"""Train a tokenizer on a corpus, take one of others, or see what a tokenizer does to text.

    python -m data_tools.tokenizer train --corpus PATH... --out DIR --vocab-size 4096 [--kind bpe|char]
    python -m data_tools.tokenizer import SOURCE --out DIR [--chat]
    python -m data_tools.tokenizer inspect TOKENIZER TEXTFILE...

SOURCE and TOKENIZER are a tokenizer or model folder, a folder with GPT-2's encoder.json and vocab.bpe, tiktoken:NAME
(gpt2, cl100k_base, o200k_base, ...), or tiktoken:NAME:FILE for a .tiktoken file on disk.

Contract: `train` and `import` write a folder that `AutoTokenizer.from_pretrained` loads; it appears whole or not at
all, and one that is there already is never written over. `import` keeps every id and appends what is missing: a token
that ends documents, with --chat also <|im_start|>, <|im_end|> and the ChatML template. `inspect` prints vocabulary
size and fingerprint, and for each text its compression and how its first lines are cut into tokens.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.formats import is_text, read_text_pieces, suffix_of
from data_tools.readers import document_texts, iterate_documents
from minillm.data.foreign_tokenizer import complete_tokenizer, open_tokenizer
from minillm.data.text_encoding import encode_texts, fingerprint, token_byte_lengths, vocabulary_size
from minillm.data.tokenizer import SPECIAL_TOKENS, build_char_tokenizer, save_tokenizer, train_bpe_tokenizer
from minillm.utils.commands import command_name
from minillm.utils.errors import UserError, exit_on_user_error
from minillm.utils.files import publish_directory
from minillm.utils.logging import say, warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAMPLE_LINES = 3
SAMPLE_TOKENS = 40
SOURCE_HELP = "tokenizer or model folder, GPT-2 vocabulary folder, tiktoken:NAME, or tiktoken:NAME:FILE"


def build_tokenizer(corpus: Sequence[Path], out: Path, vocab_size: int, kind: str = "bpe") -> None:
    """Train a tokenizer on all texts of a corpus and write it to the new folder `out`.

    Raises:
        UserError: `out` exists and is not an empty folder, a vocabulary below 261, or a corpus that cannot be read.
    """
    _check_new(out)
    started = time.perf_counter()
    texts = _Texts(corpus)
    if kind == "char":
        tokenizer = build_char_tokenizer(texts, vocab_size)
    else:
        tokenizer = train_bpe_tokenizer(texts, vocab_size, show_progress=sys.stderr.isatty())
    if kind == "bpe" and len(tokenizer) < vocab_size:
        warn(f"the corpus is small: only {len(tokenizer)} tokens occur in it at least twice, not {vocab_size}")
    _publish(tokenizer, out)
    seconds = time.perf_counter() - started
    say(
        f"{out}: {kind} tokenizer, {len(tokenizer):,} tokens, fingerprint {fingerprint(tokenizer)}, "
        f"from {texts.num_bytes / 1e6:.2f} MB of text in {seconds:.1f} s"
    )


def import_tokenizer(source: Path | str, out: Path, chat: bool = False) -> None:
    """Write someone else's tokenizer to the new folder `out`, with the tokens appended that it lacks.

    Raises:
        UserError: `out` exists and is not an empty folder, or a source that cannot be read, or one whose tokens do not
            spell bytes (WordPiece, ...), with which neither text nor bits per byte would be kept.
    """
    _check_new(out)
    tokenizer = open_tokenizer(source)
    token_byte_lengths(tokenizer)
    new = complete_tokenizer(tokenizer, chat)
    _publish(tokenizer, out)
    ids = tokenizer.get_vocab()
    added = "appended " + ", ".join(f"{token} {ids[token]}" for token in new) if new else "nothing appended"
    say(
        f"{out}: {vocabulary_size(tokenizer):,} tokens, fingerprint {fingerprint(tokenizer)}, documents end with "
        f"{tokenizer.eos_token}; {added}"
    )


def _check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out} is there already and is not written over: remove it (token shards made with it go with it), "
            "or name another --out"
        )


def _publish(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_tokenizer(tokenizer, temporary)
        publish_directory(temporary, out)  # a rename takes the place of an empty folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Texts:
    """The texts of a corpus, counted while they pass."""

    def __init__(self, corpus: Sequence[Path]) -> None:
        self.corpus, self.num_bytes = corpus, 0

    def __iter__(self) -> Iterator[str]:
        for document in iterate_documents(self.corpus):
            for text in document_texts(document):
                self.num_bytes += len(text.encode())
                yield text


def inspect_tokenizer(folder: Path | str, files: Sequence[Path]) -> None:
    """Print size, fingerprint and special tokens, then compression and sample splits of each file."""
    tokenizer = open_tokenizer(folder)
    print(f"tokenizer     {folder}")
    print(f"vocabulary    {vocabulary_size(tokenizer):,} tokens")
    print(f"fingerprint   {fingerprint(tokenizer)}")
    names = tokenizer.get_vocab()
    special = [f"{token} {names[token]}" for token in SPECIAL_TOKENS if token in names]
    print(f"special       {', '.join(special) or 'none of ' + ' '.join(SPECIAL_TOKENS)}")
    end = f"{tokenizer.eos_token} {tokenizer.eos_token_id}" if tokenizer.eos_token else "none (import appends one)"
    print(f"end of text   {end}")
    print(f"chat template {'yes' if tokenizer.chat_template else 'no (import --chat adds ChatML)'}")
    lengths = token_byte_lengths(tokenizer)
    for file in files:
        _print_file(tokenizer, lengths, file)


def _print_file(tokenizer: PreTrainedTokenizerFast, lengths: Sized, file: Path) -> None:
    num_bytes = num_characters = num_tokens = 0
    used: set[int] = set()
    sample: list[str] = []
    for text in _texts_of_file(file):
        # line by line it would cut other tokens than training does; a piece of a few MB stays in memory
        ids = encode_texts(tokenizer, [text])[0]
        num_bytes += len(text.encode())
        num_characters += len(text)
        num_tokens += len(ids)
        used.update(ids)
        lines = (line for line in text.splitlines() if line.strip())
        sample += [line for _, line in zip(range(SAMPLE_LINES - len(sample)), lines)]
    if not num_tokens:
        raise UserError(f"{file} has no text to measure: name a file with some")
    print(f"\n{file}")
    print(f"  {num_bytes:,} bytes, {num_characters:,} characters, {num_tokens:,} tokens")
    print(f"  {num_bytes / num_tokens:.3f} bytes a token, {num_characters / num_tokens:.3f} characters a token")
    print(f"  {len(used):,} different tokens, {len(used) / len(lengths):.1%} of the vocabulary")
    for line in sample:
        print(f"  {split_text(tokenizer, line)}")


def _texts_of_file(file: Path) -> Iterator[str]:
    """A corpus of records by documents; any other file as UTF-8 text."""
    if not file.is_file():
        raise UserError(f"there is no file {file}: name text files, or .jsonl files with text or messages")
    if suffix_of(file) and not is_text(file):
        for document in iterate_documents(file):
            yield from document_texts(document)
    else:
        yield from read_text_pieces(file)


def split_text(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """The first tokens of a text with bars between them; bytes that are part of a character show as <E4><BD>."""
    ids = encode_texts(tokenizer, [text])[0]
    shown = []
    for index in ids[:SAMPLE_TOKENS]:
        piece = tokenizer.decode([index], clean_up_tokenization_spaces=False)
        if "\ufffd" in piece:
            piece = "".join(f"<{byte:02X}>" for byte in _bytes_of_token(tokenizer, index))
        shown.append(piece.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r"))
    return "|".join(shown) + ("|..." if len(ids) > SAMPLE_TOKENS else "")


def _bytes_of_token(tokenizer: PreTrainedTokenizerFast, index: int) -> bytes:
    token = tokenizer.convert_ids_to_tokens(index)
    if token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    # GPT-2's byte alphabet: printable Latin-1 stands for itself, the other bytes in order for U+0100 and up
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return bytes(ord(char) if ord(char) < 0x100 else others[ord(char) - 0x100] for char in token)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        prog=command_name("data_tools.tokenizer"), description="Train, import and inspect tokenizers."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a tokenizer on a corpus")
    train.add_argument("--corpus", type=Path, nargs="+", required=True, metavar="PATH",
                       help="files, folders, or hf:OWNER/NAME[:CONFIG][:SPLIT]")  # fmt: skip
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the tokenizer")
    train.add_argument("--vocab-size", type=int, default=4096, metavar="N",
                       help="tokens at most, special tokens and the 256 bytes included (default 4096)")  # fmt: skip
    train.add_argument("--kind", choices=("bpe", "char"), default="bpe", help="byte-level BPE (default) or characters")
    bring = commands.add_parser("import", help="take a tokenizer of others, with what it lacks appended")
    bring.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    bring.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the tokenizer")
    bring.add_argument("--chat", action="store_true", help="append the chat markers and set the ChatML template")
    inspect = commands.add_parser("inspect", help="print compression and sample splits")
    inspect.add_argument("tokenizer", metavar="TOKENIZER", help=SOURCE_HELP)
    inspect.add_argument("files", type=Path, nargs="+", metavar="TEXTFILE", help="text files (UTF-8) or .jsonl corpora")
    arguments = parser.parse_args()
    with exit_on_user_error():
        if arguments.command == "train":
            build_tokenizer(arguments.corpus, arguments.out, arguments.vocab_size, arguments.kind)
        elif arguments.command == "import":
            import_tokenizer(arguments.source, arguments.out, arguments.chat)
        else:
            inspect_tokenizer(arguments.tokenizer, arguments.files)


if __name__ == "__main__":
    main()
