"""Five tasks a small model can learn almost perfectly, with the loss that is left computed: does the whole stack learn?

    repetition   repeat: gcb gcb gcb gcb ...                 a word of 2 to 4 different letters
    counting     count: 417 418 419 420 ...                  from a start below 1000
    copying      copy: dabca -> dabca -> dabca -> ...        a word of 4 to 8 letters, any
    brackets     brackets: ([]{}) ([]{}) ([]{}) ...          a balanced sequence of 4 pairs
    addition     add: 17+4=21 21+4=25 25+4=29 ...            a start below 100 and a step below 10

Contract: a document is a function of (seed, number). It is cut to DOCUMENT_CHARACTERS, so that with characters for
tokens and its end-of-text token it fills a sequence of 128: use data.seq_len=128, and every document is one row with
nothing in it that a model would have to know from elsewhere. Only the choices at a document's beginning are random, all
else follows from them, so the entropy of a document is the sum of ln(options) over its choices: each choice can be read
off the text, and different choices give different documents. No model can have a lower mean loss than this floor on
documents it has not seen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

DOCUMENT_CHARACTERS = 127  # 128 tokens with the end-of-text token
_LETTERS = "abcdefgh"
_PAIRS = ("()", "[]", "{}")

Option = TypeVar("Option")


class Draw:
    """Uniform choices from a seed; `nats` is the entropy of those made so far."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)  # a string is hashed with SHA-512: the same on every machine
        self.nats = 0.0

    def choice(self, options: Sequence[Option]) -> Option:
        self.nats += math.log(len(options))
        return options[self._random.randrange(len(options))]


class Example(NamedTuple):
    """A document. `nats` is the entropy of what can be learned in it: all but the first character, which is given."""

    task: str
    text: str
    nats: float


def repetition(draw: Draw) -> str:
    # different letters: the first one that comes again says that the word is over
    length = draw.choice(range(2, 5))
    word = ""
    for _ in range(length):
        word += draw.choice([letter for letter in _LETTERS if letter not in word])
    return "repeat: " + _repeated(word + " ")


def counting(draw: Draw) -> str:
    first = draw.choice(range(1000))
    return "count: " + " ".join(str(first + i) for i in range(DOCUMENT_CHARACTERS))


def copying(draw: Draw) -> str:
    length = draw.choice(range(4, 9))
    word = "".join(draw.choice(_LETTERS[:4]) for _ in range(length))
    return "copy: " + _repeated(word + " -> ")


def brackets(draw: Draw) -> str:
    num_pairs = 4
    text, closing, num_opened = "", [], 0
    while num_opened < num_pairs or closing:
        can_open = num_opened < num_pairs
        opens = can_open and (not closing or draw.choice((True, False)))
        if opens:
            pair = draw.choice(_PAIRS)
            text += pair[0]
            closing.append(pair[1])
            num_opened += 1
        else:
            text += closing.pop()
    return "brackets: " + _repeated(text + " ")


def addition(draw: Draw) -> str:
    total, step = draw.choice(range(100)), draw.choice(range(1, 10))
    sums = []
    for _ in range(DOCUMENT_CHARACTERS):
        sums.append(f"{total}+{step}={total + step}")
        total += step
    return "add: " + " ".join(sums)


TASKS: dict[str, Callable[[Draw], str]] = {
    "repetition": repetition,
    "counting": counting,
    "copying": copying,
    "brackets": brackets,
    "addition": addition,
}


def example_at(seed: int, number: int, tasks: Sequence[str]) -> Example:
    """Document `number`: one of `tasks`, with equal chances."""
    draw = Draw(f"{seed}/{number}")
    task = draw.choice(tasks)
    draw.nats = 0.0
    text = TASKS[task](draw)[:DOCUMENT_CHARACTERS]
    # The first character is never a target. It tells the task, but for those whose names begin alike.
    alike = sum(_first_character(other) == text[0] for other in tasks)
    return Example(task, text, draw.nats + math.log(alike))


def _first_character(task: str) -> str:
    return TASKS[task](Draw(""))[0]


def _repeated(text: str) -> str:
    return text * (DOCUMENT_CHARACTERS // len(text) + 1)
