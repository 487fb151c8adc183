"""A reply, piece by piece: sampling settings, streamed generation, and text that is never cut inside a character.

Contract: the model and the tokenizer come from the caller; generation is the model's own `generate`. The pieces of a
reply joined are the tokenizer's decoding of its tokens, stop token left out. The cost of a token's text does not grow
with the reply. With a seed the same call gives the same reply, and the process's random state is left as it was.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from minillm.models.chat import context_length, end_of_turn_ids
from minillm.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
MAX_HELD = 3  # bytes of an unfinished UTF-8 character
MIN_WINDOW = 12  # tokens that surely hold MAX_HELD unfinished characters of up to three bytes, and one cut by the edge


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy; top_k 0 and top_p 1 are off; seed None draws afresh."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1 is off)"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is off)"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "between 0 and 2**63 - 1"),
        )
        if problems := [f"{name} is {getattr(self, name)}: it must be {rule}" for name, ok, rule in rules if not ok]:
            raise UserError("; ".join(problems))


class IncrementalDecoder:
    """Tokens in, finished characters out; nothing is lost (tokenizers' DecodeStream drops an unfinished character).

    Only a window of tokens is decoded again: those since the last finished character, and the ones that finished it
    (some decoders treat a text's first token differently). An unfinished character shows as U+FFFD at the end of the
    window's text, one for the whole (byte-level decoders) or one for each byte of the run (byte fallback); that end is
    held back until later tokens settle it. U+FFFD comes out only where the tokens are no UTF-8.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._decode = getattr(tokenizer, "backend_tokenizer", tokenizer).decode
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text already given out
        self._settled = 0  # tokens at the window's start that ended in a whole character

    def push(self, token: int) -> str:
        """The text that is certain now; empty while a character is unfinished."""
        self._window.append(token)
        text = self._text()
        held = len(text) - len(text.rstrip(REPLACEMENT))
        overflow = len(self._window) > 2 * MIN_WINDOW
        if overflow:
            held = min(held, MAX_HELD)
        certain = max(self._shown, len(text) - held)
        piece = text[self._shown : certain]
        self._shown = certain
        if held == 0:
            self._window = self._window[self._settled :]
            self._settled = len(self._window)
            self._shown = len(self._text())
        elif overflow:
            # A long run of bytes that are not text: UTF-8 resynchronises, so its last tokens decode as before.
            self._window = self._window[-MIN_WINDOW:]
            self._settled = 0
            self._shown = len(self._text()) - held
        return piece

    def flush(self) -> str:
        """What is left when no token follows: U+FFFD for a character that was never finished, else nothing."""
        piece = self._text()[self._shown :]
        self._window, self._shown, self._settled = [], 0, 0
        return piece

    def _text(self) -> str:
        return self._decode(self._window, skip_special_tokens=False)


class ReplyStream:
    """Iterate for the pieces of a reply. Closing it, or an exception in the consumer, stops the generation.

    Attributes, valid once the iteration has ended:
        finish_reason: "stop" (the model ended its turn), "length" (max_new_tokens), "context" (the context is full) or
            "cancelled".
        num_new_tokens: tokens generated, stop token left out.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], sampling: Sampling
    ):
        context = context_length(model.config)
        room = context - len(ids)
        if not ids:
            raise UserError("the prompt is empty: give some text to answer or continue")
        if room < 1:
            raise UserError(f"a prompt of {len(ids)} tokens leaves no room in a context of {context}")
        self.finish_reason = "context" if room < sampling.max_new_tokens else "length"
        self.num_new_tokens = 0
        self._model, self._ids, self._seed = model, list(ids), sampling.seed
        self._stop_ids = end_of_turn_ids(tokenizer, model.generation_config)
        self._config = _generation_config(sampling, min(room, sampling.max_new_tokens), self._stop_ids)
        self._decoder = IncrementalDecoder(tokenizer)
        self._queue: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._is_prompt = True

    def __iter__(self) -> Iterator[str]:
        # `generate` runs to its end, so it gets a thread and hands its pieces over; the consumer's thread stays
        # free to be interrupted, and Ctrl-C lands here rather than inside the model.
        worker = threading.Thread(target=self._generate, name="minillm-reply", daemon=True)
        worker.start()
        ended = False
        try:
            while (item := self._queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
            ended = True
        finally:
            if not ended:
                self.finish_reason = "cancelled"
                self._cancelled.set()
            worker.join()

    def _generate(self) -> None:
        prompt = torch.tensor([self._ids], device=self._model.device)
        try:
            with _seeded(self._seed, self._model.device):
                self._model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=self._config,
                    streamer=self,
                    stopping_criteria=StoppingCriteriaList([self._is_cancelled]),
                )
        except BaseException as error:  # handed over: the consumer raises it
            self._queue.put(error)
        self._queue.put(None)

    def _is_cancelled(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._cancelled.is_set(), device=input_ids.device)

    def put(self, value: torch.Tensor) -> None:
        """transformers' streamer protocol: first the prompt, then one token at a time."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            if token in self._stop_ids:
                self.finish_reason = "stop"
                continue
            self.num_new_tokens += 1
            self._hand_over(self._decoder.push(token))

    def end(self) -> None:
        """transformers' streamer protocol: no token follows."""
        self._hand_over(self._decoder.flush())

    def _hand_over(self, piece: str) -> None:
        if piece:
            self._queue.put(piece)


def _generation_config(sampling: Sampling, max_new_tokens: int, stop_ids: list[int]) -> GenerationConfig:
    # `generate` fills what is left open from the model folder's generation_config.json: whatever acts is stated.
    how = {"do_sample": False}
    if sampling.temperature > 0:
        how = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    return GenerationConfig(
        **how,
        repetition_penalty=sampling.repetition_penalty,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids or None,
        pad_token_id=stop_ids[0] if stop_ids else 0,
        num_beams=1,
        use_cache=True,
    )


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
