"""Item vectors: trained with gensim's Word2Vec, kept as plain arrays, asked by id or by name.

Contract: a folder with `model.json` (how it was made), `items.jsonl` (id, name, artist, count; a line an item, the most
frequent first), `vectors.npy` and `output.npy` ([items, dimensions] float32: what an item is, and what it is predicted
with), and `holdout.txt` where sequences were held out. With one worker the same file and options give the same bytes.
"""

from __future__ import annotations

import difflib
import io
import json
import logging
import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.extras import require
from data_tools.recommendation.sequences import Sequences, read_names
from minillm.utils.errors import UserError
from minillm.utils.files import publish_directory, read_json, write_atomic, write_json
from minillm.utils.logging import say, warn

FORMAT = "minillm-items-1"
_SAY_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class Settings:
    """Word2Vec's settings; the defaults are those that suit playlists: whole lists are one context."""

    dimensions: int = 32
    window: int = 20
    min_count: int = 2
    epochs: int = 20
    negative: int = 20
    learning_rate: float = 0.025
    ns_exponent: float = 0.75
    seed: int = 0
    workers: int = 1  # more are faster, and no longer give the same vectors twice


def stable_hash(text: str) -> int:
    """A hash that does not change from process to process, as Python's own does."""
    return zlib.crc32(text.encode())


def train(sequences: Sequences, names_path: Path | None, out: Path, settings: Settings, as_text: bool = False) -> dict:
    """Train vectors and write them to the new folder `out`; the content of its model.json.

    Args:
        as_text: also write vectors.txt, word2vec's text format.

    Raises:
        UserError: nothing to learn from, `out` in use, a table of names that cannot be read.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: remove it or choose another --out")
    names = read_names(names_path) if names_path else {}
    start = time.monotonic()
    number, counts = sequences.count()
    kept = sum(count >= settings.min_count for count in counts.values())
    if kept < 2:
        raise UserError(
            f"{kept} of {len(counts)} items are in {sequences.path} at least --min-count {settings.min_count} times: "
            "lower it, or give more sequences"
        )
    say(f"{number:,} sequences, {sum(counts.values()):,} items, {kept:,} different ones kept of {len(counts):,}")
    model = _word2vec(sequences, settings)
    ids = list(model.wv.index_to_key)
    unnamed = sum(item not in names for item in ids) if names else 0
    if names and unnamed:
        warn(f"{unnamed:,} of {len(ids):,} items have no name in {names_path}: they keep their id")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _save_array(temporary / "vectors.npy", model.wv.vectors)
        _save_array(temporary / "output.npy", model.syn1neg)
        entries = (_entry(item, names, int(model.wv.get_vecattr(item, "count"))) for item in ids)
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        write_atomic(temporary / "items.jsonl", "".join(lines))
        if as_text:
            model.wv.save_word2vec_format(str(temporary / "vectors.txt"), binary=False)
        held = _write_holdout(sequences, set(ids), temporary / "holdout.txt")
        about = {
            "format": FORMAT, "sequences": number, "items": len(ids), "held_out": held,
            "source": {"path": str(sequences.path.resolve()), "skip_lines": sequences.skip_lines,
                       "comment": sequences.comment, "holdout": sequences.holdout, "seed": sequences.seed},
            "settings": vars(settings), "seconds": round(time.monotonic() - start, 2),
        }  # fmt: skip
        write_json(temporary / "model.json", about)
        if out.is_dir():
            out.rmdir()
        publish_directory(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"{out}: {len(ids):,} items in {settings.dimensions} dimensions, {held:,} sequences held out, "
        f"{about['seconds']:.1f} s")  # fmt: skip
    return about


def _word2vec(sequences: Sequences, settings: Settings):
    word2vec = require("gensim.models.word2vec", "gensim")
    callbacks = require("gensim.models.callbacks", "gensim")
    logging.getLogger("gensim").setLevel(logging.ERROR)

    class Progress(callbacks.CallbackAny2Vec):
        def __init__(self) -> None:
            self.start = self.said = time.monotonic()
            self.done = 0

        def on_epoch_end(self, model) -> None:
            self.done += 1
            now = time.monotonic()
            if now - self.said > _SAY_EVERY and self.done < settings.epochs:
                self.said = now
                left = (now - self.start) / self.done * (settings.epochs - self.done)
                say(f"epoch {self.done} of {settings.epochs}, about {left:,.0f} s left")

    return word2vec.Word2Vec(
        sequences, vector_size=settings.dimensions, window=settings.window, min_count=settings.min_count, sg=1,
        negative=settings.negative, epochs=settings.epochs, alpha=settings.learning_rate, sample=0,
        ns_exponent=settings.ns_exponent, seed=settings.seed, workers=settings.workers, hashfxn=stable_hash,
        callbacks=[Progress()],
    )  # fmt: skip


def _entry(item: str, names: dict[str, tuple[str, str]], count: int) -> dict:
    name, artist = names.get(item, (item, ""))
    return {"id": item, "name": name, "artist": artist, "count": count}


def _save_array(path: Path, values: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values, dtype=np.float32), allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def _write_holdout(sequences: Sequences, known: set[str], path: Path) -> int:
    """Held-out sequences, the item to predict last; their number. Items without a vector cannot be predicted."""
    held = 0
    if sequences.holdout <= 0:
        return held
    with open(path, "w", encoding="utf-8") as file:
        for items, target in sequences.split():
            if target is not None and target in known and any(item in known for item in items):
                file.write(" ".join([*items, target]) + "\n")
                held += 1
    return held


class Items:
    """Trained vectors with their names."""

    def __init__(self, folder: Path) -> None:
        """Read a folder that `train` wrote.

        Raises:
            UserError: no such folder, or a damaged one.
        """
        self.folder = folder = Path(folder)
        if not (folder / "model.json").is_file():
            raise UserError(f"{folder} holds no item vectors: name the --out of python -m data_tools.item2vec train")
        self.about = read_json(folder / "model.json")
        if not isinstance(self.about, dict) or self.about.get("format") != FORMAT:
            raise UserError(f"{folder / 'model.json'} is not of the format {FORMAT}: train again")
        try:
            self.vectors = np.load(folder / "vectors.npy", allow_pickle=False)
            self.output = np.load(folder / "output.npy", allow_pickle=False)
            lines = (folder / "items.jsonl").read_text(encoding="utf-8").split("\n")
            self.entries: list[dict] = [json.loads(line) for line in lines if line]
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is damaged ({error}): train again") from error
        if not len(self.vectors) == len(self.output) == len(self.entries):
            raise UserError(f"{folder} is damaged: its arrays and items.jsonl differ in length")
        self.number = {entry["id"]: number for number, entry in enumerate(self.entries)}
        self.counts = np.array([entry["count"] for entry in self.entries], dtype=np.float64)
        norms = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        self.directions = self.vectors / np.maximum(norms, 1e-12)

    def find(self, wanted: str) -> int:
        """The item of an id or a name: exact, then without case, then a part of `name artist`, then the most alike.

        Where several fit, the most frequent one is taken and said.

        Raises:
            UserError: nothing is alike.
        """
        if wanted in self.number:
            return self.number[wanted]
        folded = wanted.casefold().strip()
        names = [entry["name"].casefold() for entry in self.entries]
        found = [number for number, name in enumerate(names) if name == folded]
        if not found and folded:
            whole = [f"{name} {entry['artist'].casefold()}" for name, entry in zip(names, self.entries, strict=True)]
            words = folded.split()
            found = [number for number, text in enumerate(whole) if all(word in text for word in words)]
        if not found:
            alike = difflib.get_close_matches(folded, set(names), n=3, cutoff=0.6)
            if not alike:
                raise UserError(f"{wanted!r} is not an id or name in {self.folder / 'items.jsonl'}, nor like one")
            found = [number for number, name in enumerate(names) if name == alike[0]]
        best = found[0]  # the items stand by frequency
        others = f" (also: {', '.join(self.title(n) for n in found[1:4])})" if len(found) > 1 else ""
        say(f"{wanted!r} is taken for {self.title(best)}{others}")
        return best

    def title(self, number: int) -> str:
        """`name - artist [id]`."""
        entry = self.entries[number]
        artist = f" - {entry['artist']}" if entry["artist"] else ""
        return f"{entry['name']}{artist} [{entry['id']}]"

    def similar(self, numbers: list[int], count: int) -> list[tuple[int, float]]:
        """(item, cosine) of the items most like the mean of some, themselves left out."""
        wanted = self.directions[numbers].mean(axis=0)
        scores = self.directions @ (wanted / max(float(np.linalg.norm(wanted)), 1e-12))
        scores[numbers] = -np.inf
        best = np.argsort(-scores, kind="stable")[: max(0, min(count, len(scores) - len(set(numbers))))]
        return [(int(number), float(scores[number])) for number in best]
