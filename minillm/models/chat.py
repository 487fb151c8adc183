"""Turning a conversation into token ids with any tokenizer that has a chat template, safe against injected markers.

Contract: only the template places control tokens. `<|im_end|>` typed by a user is encoded as the characters it is.
On contents without such strings the ids equal `apply_chat_template(messages, add_generation_prompt=True)`.
"""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Mapping, Sequence

# What ends a turn or a document by these names ends a reply, whatever the template says.
END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def encode_chat(tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of the messages up to the point where the assistant is to speak.

    Raises:
        ValueError: the tokenizer has no chat template.
        jinja2.TemplateError: the template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: save it with a chat_template, or use generate() instead")
    stand_ins, contents = _stand_ins(messages)
    prompt = tokenizer.apply_chat_template(stand_ins, tokenize=False, add_generation_prompt=True)
    return _encode_template(tokenizer, prompt, contents)


def end_of_turn_ids(tokenizer, generation_config=None) -> list[int]:
    """Ids that end a reply, in ascending order.

    The control token that the chat template writes after an assistant's words, END_TOKENS where the vocabulary has
    them, and what tokenizer and generation config call their end.
    """
    vocabulary = tokenizer.get_added_vocab()
    ids = {vocabulary[token] for token in END_TOKENS if token in vocabulary}
    for declared in (tokenizer.eos_token_id, getattr(generation_config, "eos_token_id", None)):
        ids.update(declared if isinstance(declared, list) else [] if declared is None else [declared])
    if getattr(tokenizer, "chat_template", None):
        answered, names = _stand_ins([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}])
        after_answer = tokenizer.apply_chat_template(answered, tokenize=False).partition(list(names)[-1])[2]
        if (marker := _control_tokens(tokenizer).search(after_answer)) is not None:
            ids.add(tokenizer.convert_tokens_to_ids(marker.group()))
    return sorted(ids)


def context_length(config) -> int:
    """Prompt plus reply, in tokens, that a model's positions allow; sys.maxsize where its config knows no limit."""
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def _stand_ins(messages: Sequence[Mapping[str, str]]) -> tuple[list[dict[str, str]], dict[str, str]]:
    """The messages with a name nobody can guess in the place of each content, and name -> content."""
    key = secrets.token_hex(8)
    contents = {f"{key}x{i}x": message["content"] for i, message in enumerate(messages)}
    return [{**message, "content": name} for message, name in zip(messages, contents)], contents


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
