"""A conversation as data: who said what, and a prompt that fits the model's context.

Contract: no I/O, no model. What is cut away to make room is counted and returned, never dropped silently:
whole turns (a question and its reply), the oldest first; the system message and the newest question always stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jinja2

from minillm.data.text_encoding import encode_texts
from minillm.models.chat import encode_chat
from minillm.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
Encode = Callable[[list[Message]], list[int]]


def chat_encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Messages -> prompt ids that end where the assistant is to begin.

    Contents never become control tokens, with any template (minillm.models.chat). Raises a UserError when the
    tokenizer has no template, or its template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: use a model that was trained to chat, "
            "or set chat_template in its tokenizer_config.json"
        )

    def encode(messages: list[Message]) -> list[int]:
        try:
            return encode_chat(tokenizer, messages)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template of {tokenizer.name_or_path} refuses this: {error}") from error

    return encode


def continuation_encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Messages -> the ids of one running text, for a base model that continues a text and knows no roles.

    A reply follows its question directly, since it is the text's continuation; each new message begins a line.
    """

    def encode(messages: list[Message]) -> list[int]:
        parts = [("" if message["role"] == "assistant" else "\n") + message["content"] for message in messages]
        return list(encode_texts(tokenizer, ["".join(parts)[1:]])[0])

    return encode


class Conversation:
    """The messages so far. Each question is asked with `ask`, then settled by `answer` or taken back."""

    def __init__(self, encode: Encode, system: str | None = None):
        self._encode = encode
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[list[Message]] = []

    @property
    def messages(self) -> list[Message]:
        """Everything that is still remembered, in order."""
        return self._system + [message for turn in self._turns for message in turn]

    def ask(self, text: str, context: int, reserve: int) -> tuple[list[int], int]:
        """Add a user message and build the prompt for its reply.

        Args:
            context: the model's longest input plus output, in tokens.
            reserve: tokens to keep free for the reply; old turns go until it fits. The newest question alone may cut
                into the reserve but not fill the context.

        Returns:
            The prompt ids, and how many old turns were forgotten for it.

        Raises:
            UserError: the question alone leaves no room; it is not added.
        """
        question = [{"role": "user", "content": text}]
        alone = len(self._encode(self._system + question))
        if alone >= context:
            raise UserError(f"this message takes {alone} tokens and the model's context is {context}: shorten it")
        self._turns.append(question)
        dropped = 0
        while len(ids := self._encode(self.messages)) > context - reserve and len(self._turns) > 1:
            del self._turns[0]
            dropped += 1
        return ids, dropped

    def answer(self, text: str) -> None:
        """Settle the open question with the assistant's reply."""
        self._turns[-1].append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Forget the open question, as if it had never been asked."""
        self._turns.pop()

    def reset(self) -> None:
        """Forget every turn; the system message stays."""
        self._turns.clear()
