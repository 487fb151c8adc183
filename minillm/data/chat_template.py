"""Conversations as tokens: the ChatML template, and the encoder that keeps contents out of the control tokens.

Contract: a conversation is a list of `{"role", "content"}` messages (OpenAI's form; roles in ROLES, contents plain
text) and becomes, message after message,

    <|im_start|> role "\\n" content <|im_end|> "\\n"

CHAT_TEMPLATE is that form in jinja for `apply_chat_template`, with `{% generation %}` around what the assistant says.
`encode_conversation` builds the same ids without a rendered string in between: markers are placed as ids and contents
are encoded as ordinary text, so that `<|im_end|>` typed by a user stays text (through `apply_chat_template` it would
become the control token). Both agree on contents that hold no special token and do not begin with an empty line. There
the template lets the header's line end merge with the content's; here a content is tokenized the way it is generated,
on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minillm.data.text_encoding import encode_texts
from minillm.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROLES = ("system", "user", "assistant")
IM_START, IM_END = "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|im_end|>' -}}"
    "{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

_FIX = (
    "train one with `python -m data_tools.tokenizer train`, or add what is missing with "
    "`python -m data_tools.tokenizer import TOKENIZER --out DIR --chat` (before pretraining, since each token needs "
    "a row in the weights)"
)

Message = dict[str, str]


def check_messages(messages: object, where: str = "the conversation") -> None:
    """Raise a UserError that names the message's index and key unless `messages` is a well-formed conversation."""
    form = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if not isinstance(messages, list) or not messages:
        got = "an empty list" if messages == [] else type(messages).__name__
        raise UserError(f"{where}: messages must be a list like {form}, got {got}")
    for index, message in enumerate(messages):
        at = f"{where}: messages[{index}]"
        if not isinstance(message, dict):
            raise UserError(f"{at} is {type(message).__name__}: it must be an object as in {form}")
        for key in ("role", "content"):
            if key not in message:
                raise UserError(f'{at} has no "{key}": add it, as in {form}')
        if message["role"] not in ROLES:
            raise UserError(f'{at}["role"] is {message["role"]!r}: it must be one of {", ".join(ROLES)}')
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise UserError(f'{at}["content"] is {kind}: it must be a string (join a list of parts into one text)')
        if extra := sorted(set(message) - {"role", "content"}):
            raise UserError(f'{at} has the key "{extra[0]}", which would be lost: keep only "role" and "content"')


def encode_conversation(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Encode one conversation; see `encode_conversations`."""
    return encode_conversations(tokenizer, [messages], add_generation_prompt)[0]


def encode_conversations(
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[Sequence[Message]],
    add_generation_prompt: bool = False,
) -> list[tuple[list[int], list[int]]]:
    """Encode conversations in one batch (much faster than one by one).

    Args:
        add_generation_prompt: end with the header of an assistant message, for the model to go on.

    Returns:
        For each conversation (ids, loss mask), both int [T]: the mask is 1 on the content of assistant messages and on
        the <|im_end|> that closes it, 0 elsewhere.

    Raises:
        UserError: a malformed message (its index and key), or a tokenizer without the markers.
    """
    start, end = _marker(tokenizer, IM_START), _marker(tokenizer, IM_END)
    contents = []
    for index, messages in enumerate(conversations):
        where = "the conversation" if len(conversations) == 1 else f"conversation {index}"
        check_messages(messages, where)
        contents += [message["content"] for message in messages]
    pieces = encode_texts(tokenizer, [*(role + "\n" for role in ROLES), "\n", *contents])
    headers = {role: [start, *ids] for role, ids in zip(ROLES, pieces)}
    newline = pieces[len(ROLES)]
    remaining = iter(pieces[len(ROLES) + 1 :])

    encoded = []
    for messages in conversations:
        ids: list[int] = []
        mask: list[int] = []
        for message in messages:
            header, body = headers[message["role"]], [*next(remaining), end]
            ids += header + body + newline
            mask += [0] * len(header) + [int(message["role"] == "assistant")] * len(body) + [0] * len(newline)
        if add_generation_prompt:
            ids += headers["assistant"]
            mask += [0] * len(headers["assistant"])
        encoded.append((ids, mask))
    return encoded


def check_chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise one UserError that names everything a tokenizer lacks for conversations: markers, a chat template."""
    missing = [f"no {token} token" for token in (IM_START, IM_END) if _token_id(tokenizer, token) is None]
    if not tokenizer.chat_template:
        missing.append("no chat template")
    if missing:
        raise UserError(f"the tokenizer has {', '.join(missing)}, which conversations need: {_FIX}")


def _marker(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    index = _token_id(tokenizer, token)
    if index is None:
        raise UserError(f"the tokenizer has no {token} token, which conversations are marked with: {_FIX}")
    return index


def _token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int | None:
    return tokenizer.backend_tokenizer.token_to_id(token)
