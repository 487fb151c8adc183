"""Tokenizers of others as `PreTrainedTokenizerFast`: the same ids as their own libraries, behind the interface of ours.

Contract: `open_tokenizer(source)` reads

    FOLDER                    tokenizer.json (any fast tokenizer of transformers)
    FOLDER                    GPT-2's encoder.json + vocab.bpe, or the same as vocab.json + merges.txt
    FOLDER                    a tokenizer that transformers can convert (sentencepiece's tokenizer.model, ...)
    tiktoken:NAME             an encoding of the tiktoken library, which downloads its file once
    tiktoken:NAME:FILE        a .tiktoken file from disk, cut into words as encoding NAME does; no library needed

and `complete_tokenizer` appends what this project needs and a tokenizer lacks. Ids that exist never change: what is
added comes after the largest.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from minillm.data.chat_template import CHAT_TEMPLATE, IM_END, IM_START
from minillm.data.text_encoding import vocabulary_size
from minillm.utils.errors import UserError
from minillm.utils.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TIKTOKEN = "tiktoken:"
END_OF_TEXT = "<|endoftext|>"
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_CONVERTIBLE = ("tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
_FIX = (
    "name a folder that `python -m data_tools.tokenizer train --out FOLDER` or `... import SOURCE --out FOLDER` wrote, "
    "a model folder, GPT-2's vocabulary folder, or tiktoken:NAME"
)


class Encoding(NamedTuple):
    """How a tiktoken encoding cuts words (in Oniguruma's syntax), and its special tokens when its ranks are `sizes`."""

    pattern: str
    special_tokens: dict[str, int]
    sizes: tuple[int, ...]


# tiktoken_ext/openai_public.py of https://github.com/openai/tiktoken, as `in_onigurumas_syntax` writes it: for files
# that are read without the library.
ENCODINGS = {
    "gpt2": Encoding(
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|\s+(?!\S)|\s",
        {END_OF_TEXT: 50256},
        (50256, 50280),  # gpt2 and r50k_base; p50k_base has runs of spaces besides
    ),
    "cl100k_base": Encoding(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|(?>\p{N}{1,3})| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++\z"
        r"|\s*[\r\n]|\s+(?!\S)|\s",
        {END_OF_TEXT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
         "<|endofprompt|>": 100276},
        (100256,),
    ),
    "o200k_base": Encoding(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
        (199998,),
    ),
}  # fmt: skip
_SAME_WORDS = {"r50k_base": "gpt2", "p50k_base": "gpt2"}


def open_tokenizer(source: Path | str) -> PreTrainedTokenizerFast:
    """Read a tokenizer as it is, whether or not it has the tokens this project needs.

    Raises:
        UserError: no such folder, file or encoding, a damaged file, or one that cannot be converted.
    """
    if str(source).startswith(TIKTOKEN):
        return _from_tiktoken(str(source).removeprefix(TIKTOKEN))
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"there is no tokenizer folder {folder}: {_FIX}")
    if (folder / "tokenizer.json").is_file():
        return _from_fast(folder)
    names_its_class = "tokenizer_class" in _config_of(folder)  # Qwen cuts words by another pattern than GPT-2
    for vocabulary, merges in GPT2_FILES:
        if not names_its_class and (folder / vocabulary).is_file() and (folder / merges).is_file():
            return _from_gpt2(folder / vocabulary, folder / merges)
    found = [name for name in _CONVERTIBLE if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} is not a tokenizer folder (tokenizer.json is missing): {_FIX}")
    return _from_slow(folder, found)


def complete_tokenizer(tokenizer: PreTrainedTokenizerFast, chat: bool) -> list[str]:
    """Append what is missing, in place: a token that ends documents, one that pads; with `chat` also ChatML.

    Args:
        chat: add `<|im_start|>` and `<|im_end|>` and put the ChatML template in the place of any other.

    Returns:
        The tokens that are new, in the order of their ids.
    """
    from tokenizers import AddedToken

    before = tokenizer.get_vocab()
    size = vocabulary_size(tokenizer)
    if tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": AddedToken(END_OF_TEXT, special=True, normalized=False)})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat:
        markers = [AddedToken(token, special=True, normalized=False) for token in (IM_START, IM_END)]
        tokenizer.add_tokens(markers, special_tokens=True)
        tokenizer.chat_template = CHAT_TEMPLATE
    new = {token: index for token, index in tokenizer.get_vocab().items() if token not in before}
    if taken := [f"{token} {index}" for token, index in new.items() if index < size]:
        raise UserError(f"the vocabulary leaves ids out, so new tokens would fall inside it: {', '.join(taken)}")
    return sorted(new, key=new.__getitem__)


def _from_fast(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # the Rust library raises bare Exception for a damaged file
        raise UserError(f"the tokenizer in {folder} does not load ({error}): {_FIX}") from error


def _from_gpt2(vocabulary: Path, merges: Path) -> PreTrainedTokenizerFast:
    """GPT-2's two files: token -> id as JSON, and one merge a line (openai/gpt-2, src/encoder.py)."""
    from transformers import GPT2Tokenizer

    lines = merges.read_text(encoding="utf-8").splitlines()
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    try:
        backend = GPT2Tokenizer(vocab=read_json(vocabulary), merges=pairs).backend_tokenizer
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"{vocabulary} and {merges.name} do not load ({error}): {_FIX}") from error
    return _as_fast(backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def _from_slow(folder: Path, found: list[str]) -> PreTrainedTokenizerFast:
    """Files that only transformers' own converters understand."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    what = f"{folder} has no tokenizer.json, and its {', '.join(found)}"
    fix = (
        "install what the message names (`pip install sentencepiece protobuf` for tokenizer.model), or write a "
        "tokenizer.json elsewhere with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # missing packages, unknown classes and damaged files raise all kinds
        raise UserError(f"{what} cannot be converted ({' '.join(str(error).split())[:300]}): {fix}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{what} make a {type(tokenizer).__name__}, which has no fast form: {fix}")
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name.endswith("_token")}
    return _as_fast(tokenizer.backend_tokenizer, chat_template=tokenizer.chat_template, **special)


def _config_of(folder: Path) -> Mapping[str, object]:
    path = folder / "tokenizer_config.json"
    value = read_json(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


def _from_tiktoken(words: str) -> PreTrainedTokenizerFast:
    """`NAME`, `NAME:FILE`, or a `FILE` that is called NAME.tiktoken."""
    name, _, file = words.partition(":")
    if not file and name.endswith(".tiktoken"):
        name, file = Path(name).stem, name
    if file:
        encoding = ENCODINGS.get(_SAME_WORDS.get(name, name))
        if encoding is None:
            raise UserError(
                f"tiktoken:{words}: which words the file was made of is not known; write tiktoken:NAME:FILE with one "
                f"of {', '.join([*ENCODINGS, *_SAME_WORDS])} as NAME"
            )
        ranks = read_ranks(Path(file))
        special = encoding.special_tokens if len(ranks) in encoding.sizes else {END_OF_TEXT: max(ranks.values()) + 1}
        return from_ranks(ranks, encoding.pattern, special)
    library = _tiktoken_encoding(name)
    return from_ranks(library._mergeable_ranks, in_onigurumas_syntax(library._pat_str), library._special_tokens)


def _tiktoken_encoding(name: str):  # tiktoken.Encoding, and tiktoken may not be there
    try:
        import tiktoken
    except ImportError:
        raise UserError(f"tiktoken:{name} needs the tiktoken library: pip install tiktoken") from None
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise UserError(f"tiktoken:{name}: tiktoken knows no such encoding; valid: {', '.join(known)}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # requests' exceptions, a full disk, a file with another checksum
        raise UserError(
            f"tiktoken:{name} cannot be downloaded ({type(error).__name__}). Without a network: set TIKTOKEN_CACHE_DIR "
            f"to a cache that holds it, or name its file from disk, tiktoken:{name}:FILE"
        ) from error


def read_ranks(path: Path) -> dict[bytes, int]:
    """A .tiktoken file: one token a line, base64, a space, its rank."""
    if not path.is_file():
        raise UserError(f"there is no file {path}: name a .tiktoken file as tiktoken:NAME:FILE")
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise UserError(f"{path}:{number} is not `BASE64 RANK` ({error}): it is no .tiktoken file") from error
    if missing := 256 - sum(len(token) == 1 for token in ranks):
        raise UserError(f"{path} is not a whole .tiktoken file: {missing} of the 256 bytes have no token")
    return ranks


def in_onigurumas_syntax(pattern: str) -> str:
    """A pattern of tiktoken (fancy-regex) for the `tokenizers` library (Oniguruma with Ruby's syntax).

    Two things mean something else there: `{1,3}+` repeats the group instead of making it possessive, and `$` also
    stands before a line's end.
    """
    escaped_or_class = r"\\p\{\w+\}|\\.|\[(?:\\.|[^\]\\])*\]"
    pattern = re.sub(rf"((?:{escaped_or_class}|[^\\\[\](){{}}|])\{{\d+(?:,\d*)?\}})\+", r"(?>\1)", pattern)
    return re.sub(rf"{escaped_or_class}|\$", lambda found: r"\z" if found[0] == "$" else found[0], pattern)


def from_ranks(
    ranks: Mapping[bytes, int], pattern: str, special_tokens: Mapping[str, int]
) -> PreTrainedTokenizerFast:
    """Byte-level BPE from tiktoken's mergeable ranks.

    tiktoken merges the two neighbours whose concatenation has the lowest rank, however that token is split, and takes
    a word that is a token whole. transformers' TikTokenConverter lists every split as a merge for that.

    Args:
        pattern: cuts text into words, in Oniguruma's syntax.
        special_tokens: name -> id. Ids between them that nothing uses become `<|reserved_ID|>`, so that no id is left
            out and new tokens come after the largest.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    from minillm.compat.transformers_api import bpe_of_tiktoken_ranks

    vocabulary, merges = bpe_of_tiktoken_ranks(ranks)
    last = max([*ranks.values(), *special_tokens.values()])
    free = sorted(set(range(last + 1)) - set(ranks.values()) - set(special_tokens.values()))
    special = {**special_tokens, **{f"<|reserved_{index}|>": index for index in free}}
    in_order = sorted(special, key=special.__getitem__)
    # An added token gets the next id, unless the model has it: what lies between the ranks goes there.
    vocabulary |= {token: special[token] for token in in_order if special[token] < max(ranks.values())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in in_order])
    end = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT} if END_OF_TEXT in special else {}
    return _as_fast(backend, **end)


def _as_fast(backend: object, **options: object) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **options)
