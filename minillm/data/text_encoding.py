"""What the data floor asks of a tokenizer that exists: ids of ordinary text, bytes a token stands for, its identity.

Contract: everything here works with any byte-level BPE or byte-fallback tokenizer of transformers, not only with ours,
and leaves the tokenizer as it was. Text is data: nothing written in it ever becomes a special token.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from minillm.utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_plain_backends: weakref.WeakKeyDictionary[PreTrainedTokenizerFast, tuple[int, Tokenizer]] = weakref.WeakKeyDictionary()


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts as ordinary text: special tokens written in them stay text, nothing is added around them.

    One call with many texts runs on all cores (unless TOKENIZERS_PARALLELISM=false) and is the fast way.

    Returns:
        One list of token ids for each text, in order.
    """
    encodings = _plain_backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the backend that knows no special tokens in text.

    `encode_special_tokens` is state of the backend: switching it on the original for the length of a call would change
    what other threads get from it. The copy is made once, and again when tokens were added to the tokenizer.
    """
    from tokenizers import Tokenizer

    size = len(tokenizer)
    known = _plain_backends.get(tokenizer)
    if known is None or known[0] != size:
        plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        plain.no_padding()
        plain.no_truncation()
        plain.encode_special_tokens = True
        known = _plain_backends[tokenizer] = (size, plain)
    return known[1]


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows an embedding needs: the largest id and one, also where a vocabulary leaves ids out."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """UTF-8 bytes each token stands for, for bits per byte.

    Returns:
        int64 [vocabulary_size]: 0 for special tokens, so that the sum over `encode_texts` of a text is its length in
        bytes. (A tokenizer that puts a space before the first word counts that one too; the first token of a
        document is never a target, so that bits per byte stay right.)

    Raises:
        UserError: a tokenizer whose tokens do not spell bytes (WordPiece, Unigram without byte fallback).
    """
    import numpy as np

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    decoder = json.dumps(state["decoder"], ensure_ascii=False)
    byte_level, byte_fallback = '"ByteLevel"' in decoder, '"ByteFallback"' in decoder
    if not byte_level and not byte_fallback:
        raise UserError(
            f"bytes a token cannot be told for this tokenizer (decoder {decoder[:80]}): "
            "bits per byte needs a byte-level or byte-fallback tokenizer, as data_tools.tokenizer trains"
        )
    added = {token["id"]: token for token in state["added_tokens"]}
    space_marked = "\u2581" in decoder  # SentencePiece's mark for a space, three bytes long itself
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, index in vocabulary.items():
        if index in added:
            lengths[index] = 0 if added[index]["special"] else len(token.encode())
        elif byte_level:
            lengths[index] = len(token)  # the byte alphabet writes one character for one byte
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            lengths[index] = 1
        else:
            lengths[index] = len((token.replace("\u2581", " ") if space_marked else token).encode())
    return lengths


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Identity of what the tokenizer does to text: 16 hex digits.

    The same before and after saving, on every machine and for every release of the `tokenizers` library that writes the
    same rules; another one as soon as the vocabulary, merges, normalizer, pre-tokenizer, a special token or the end
    token differ. The chat template, padding and truncation are left out: token shards do not depend on them.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    identity = {key: state[key] for key in ("model", "normalizer", "pre_tokenizer", "decoder", "added_tokens")}
    identity["eos"] = tokenizer.eos_token_id
    # merges are written "a b" by older releases and ["a", "b"] by newer ones
    if merges := identity["model"].get("merges"):
        identity["model"]["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    canonical = json.dumps(_without_defaults(identity), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _without_defaults(value: object) -> object:
    """Drop null and false fields of objects, so that an option new in the library and off changes no fingerprint."""
    if isinstance(value, dict):
        return {key: _without_defaults(item) for key, item in value.items() if item is not None and item is not False}
    if isinstance(value, list):
        return [_without_defaults(item) for item in value]
    return value
