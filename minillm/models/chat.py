"""Turning a conversation into token ids with any tokenizer that has a chat template, safe against injected markers.

Contract: only the template places control tokens. `<|im_end|>` typed by a user is encoded as the characters it is.
On contents without such strings the ids equal `apply_chat_template(messages, add_generation_prompt=True)`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence


def encode_chat(tokenizer, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[int]]:
    """Encode messages up to the point where the assistant is to speak.

    Returns:
        The ids, and the ids that end an assistant's turn: the control token the template writes after it, and eos.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: save it with a chat_template, or use generate() instead")
    key = secrets.token_hex(8)
    names = [f"{key}x{i}x" for i in range(len(messages) + 1)]
    stand_ins = [{**message, "content": name} for message, name in zip(messages, names)]
    prompt = tokenizer.apply_chat_template(stand_ins, tokenize=False, add_generation_prompt=True)
    contents = dict(zip(names, (message["content"] for message in messages)))
    ids = _encode_template(tokenizer, prompt, contents)

    answered = [*stand_ins, {"role": "assistant", "content": names[-1]}]
    after_answer = tokenizer.apply_chat_template(answered, tokenize=False).partition(names[-1])[2]
    markers = [tokenizer.convert_tokens_to_ids(m.group()) for m in _control_tokens(tokenizer).finditer(after_answer)]
    ends = dict.fromkeys(markers[:1] + ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]))
    return ids, list(ends)


def _control_tokens(tokenizer) -> re.Pattern[str]:
    tokens = sorted(set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _encode_template(tokenizer, text: str, contents: Mapping[str, str]) -> list[int]:
    """Encode `text` piece by piece: control tokens as ids, what lies between as plain text with the contents put in."""
    ids: list[int] = []
    control = _control_tokens(tokenizer)
    stand_in = re.compile("|".join(contents))
    start = 0
    for marker in [*control.finditer(text), None]:
        piece = text[start : marker.start() if marker else len(text)]
        if piece:
            piece = stand_in.sub(lambda match: contents[match.group()], piece)
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=True).input_ids
        if marker:
            ids.append(tokenizer.convert_tokens_to_ids(marker.group()))
            start = marker.end()
    return ids
