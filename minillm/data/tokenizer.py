"""Tokenizers: byte-level BPE and characters, both as `PreTrainedTokenizerFast` folders any transformers user can load.

Contract: SPECIAL_TOKENS have the ids 0..4, `<|endoftext|>` ends documents and pads, the chat template is ChatML. Both
kinds are lossless: decode(encode(text)) == text for every text, whatever it was trained on. What a tokenizer does to
text is in text_encoding.py; how tokenizers of others are read is in foreign_tokenizer.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from minillm.data.chat_template import CHAT_TEMPLATE
from minillm.data.foreign_tokenizer import open_tokenizer
from minillm.utils.errors import UserError
from minillm.utils.files import write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256  # every byte has a token

# Words as GPT-4's cl100k pattern cuts them (https://github.com/openai/tiktoken, tiktoken_ext/openai_public.py), with
# two changes: a digit is a token of its own (a vocabulary of a few thousand has no room for numbers, and place value
# stays visible to the model), and combining marks belong to their letters (as in o200k; Devanagari and others need it).
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int, show_progress: bool = False) -> PreTrainedTokenizerFast:
    """Train byte-level BPE (no normalization, so text comes back as it was).

    Args:
        texts: read once; only the counts of words are kept in memory.
        vocab_size: at most this many tokens, the five special ones included; a small corpus may hold fewer pairs that
            occur twice, and gives a smaller vocabulary.

    Raises:
        UserError: vocab_size below 261 (256 bytes and the special tokens), or no text at all.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    _check_vocab_size(vocab_size)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    backend.train_from_iterator(_not_empty(texts), trainer)
    return _as_transformers_tokenizer(backend)


def build_char_tokenizer(texts: Iterable[str], vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """One token for each character of the texts, in code point order after the special tokens and 256 byte tokens.

    A character the vocabulary does not hold is written as its UTF-8 bytes (`<0xE4>`, ...): nothing is lost and nothing
    needs an unknown token; `data_tools.tokenizer inspect` counts such bytes.

    Args:
        vocab_size: keep only the most frequent characters that fit; the others are written as bytes.

    Raises:
        UserError: vocab_size below 261, or no text at all.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if vocab_size is not None:
        _check_vocab_size(vocab_size)
    counts: Counter[str] = Counter()
    for text in _not_empty(texts):
        counts.update(text)
    by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
    room = len(by_frequency) if vocab_size is None else vocab_size - SMALLEST_VOCABULARY
    tokens = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(by_frequency[:room])]
    # BPE without merges cuts text into characters, and is the model that can fall back to bytes
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], byte_fallback=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]*\n?"), behavior="isolated")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _as_transformers_tokenizer(backend)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, path: Path | str) -> None:
    """Write a tokenizer folder that transformers 4 and 5 both load with AutoTokenizer.

    `save_pretrained` of transformers 5 alone writes a class name and a list that transformers 4 does not know.
    """
    path = Path(path)
    tokenizer.save_pretrained(str(path))
    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(path / "tokenizer_config.json", config)


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerFast:
    """Load a tokenizer that a run can use: one of ours, a checkpoint's, or one of others (see foreign_tokenizer.py).

    Args:
        path: a folder, or `tiktoken:NAME`.

    Raises:
        UserError: nothing there, one that does not load, or one without an end-of-text token.
    """
    tokenizer = open_tokenizer(path)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {path} names no token with which documents end (eos_token in tokenizer_config.json): "
            f"append one with `python -m data_tools.tokenizer import {path} --out DIR` and use DIR"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_vocab_size(vocab_size: int) -> None:
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens need "
            f"{SMALLEST_VOCABULARY}, set --vocab-size to that or more"
        )


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    num_characters = 0
    for text in texts:
        num_characters += len(text)
        yield text
    if num_characters == 0:
        raise UserError("there is no text to build a tokenizer from: the corpus is empty")


def _as_transformers_tokenizer(backend: Tokenizer) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    # special=True for all five: only special tokens can be kept out of ordinary text (encode_special_tokens)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    end_of_text = SPECIAL_TOKENS[0]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end_of_text,
        pad_token=end_of_text,
        extra_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
