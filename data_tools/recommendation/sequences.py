"""Sequences of items on disk, one a line, and the table that gives the items names.

Contract: `Sequences` can be read any number of times, line by line; `read_names` gives {id: (name, artist)} from a
.tsv or .csv table (compressed too). Both are UTF-8, what cannot be read is a UserError with the line.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.files import open_binary
from minillm.utils.errors import UserError

_HEADERS = {"id", "item", "item_id", "song", "song_id", "itemid", "songid", "编号", "歌曲编号"}
_PIECE = 10_000  # gensim cuts longer sentences off without a word


@dataclass(frozen=True)
class Sequences:
    """The sequences of a file.

    Attributes:
        skip_lines: first lines that are not sequences (the Yes.com playlists of Chen et al. 2012 have two).
        comment: lines that begin with this are left out; "" for none.
        holdout: share of the sequences of three items or more whose last item is held out, to be predicted.
        seed: chooses them.
    """

    path: Path
    skip_lines: int = 0
    comment: str = "#"
    holdout: float = 0.0
    seed: int = 0

    def lines(self) -> Iterator[tuple[int, list[str]]]:
        """(line number, items) of every line with at least one item."""
        try:
            with open_binary(self.path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n") as file:
                for number, line in enumerate(file, 1):
                    if number <= self.skip_lines or self.comment and line.startswith(self.comment):
                        continue
                    if items := line.split():
                        yield number, items
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path} is not UTF-8 ({error.reason}): it has to be text, a sequence a line"
            ) from None
        except (OSError, EOFError) as error:
            raise UserError(f"{self.path} cannot be read: {error}") from error

    def split(self) -> Iterator[tuple[list[str], str | None]]:
        """(items to learn from, the item that is held out or None)."""
        for number, items in self.lines():
            if len(items) > 2 and self._is_held_out(number):
                yield items[:-1], items[-1]
            else:
                yield items, None

    def _is_held_out(self, number: int) -> bool:
        if self.holdout <= 0:
            return False
        digest = hashlib.blake2b(f"{self.seed}:{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64 < self.holdout

    def __iter__(self) -> Iterator[list[str]]:
        """What there is to learn from, in pieces that gensim reads whole."""
        for items, _ in self.split():
            for start in range(0, len(items), _PIECE):
                yield items[start : start + _PIECE]

    def count(self) -> tuple[int, Counter[str]]:
        """(sequences, occurrences of every item in what there is to learn from).

        Raises:
            UserError: no sequence with two items: nothing stands beside anything.
        """
        counts: Counter[str] = Counter()
        number = pairs = 0
        for items, _ in self.split():
            counts.update(items)
            number += 1
            pairs += len(items) > 1
        if not pairs:
            raise UserError(
                f"{self.path} holds no sequence of two items or more ({number} lines): write one sequence a line, its "
                "item ids with spaces between"
            )
        return number, counts


def read_names(path: Path) -> dict[str, tuple[str, str]]:
    """{id: (name, artist)}; a header is recognised by its first field.

    Raises:
        UserError: not text, a line without a name, the same id twice with different names.
    """
    names: dict[str, tuple[str, str]] = {}
    try:
        with open_binary(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
            is_csv = path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".csv")
            rows = csv.reader(file) if is_csv else (line.rstrip("\r\n").split("\t") for line in file)
            for number, row in enumerate(rows, 1):
                fields = [field.strip() for field in row]
                if not any(fields) or number == 1 and fields[0].lower() in _HEADERS:
                    continue
                if len(fields) < 2 or not fields[0] or not fields[1]:
                    kind = "commas" if is_csv else "tabs"
                    raise UserError(
                        f"{path}:{number} is {' '.join(fields)[:80]!r}: every line is id, name and maybe artist, with "
                        f"{kind} between (.csv: commas, else tabs)"
                    )
                entry = (fields[1], fields[2] if len(fields) > 2 else "")
                if names.setdefault(fields[0], entry) != entry:
                    raise UserError(
                        f"{path}:{number}: the id {fields[0]} has another name above: give each item one id"
                    )
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 ({error.reason}): convert it, for example iconv -f GB18030 -t UTF-8"
        ) from None
    except (OSError, EOFError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not names:
        raise UserError(f"{path} names no item: every line is id, name and maybe artist")
    return names
