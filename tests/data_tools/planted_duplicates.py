"""Sets with planted duplicates made of real texts, and the true Jaccard similarity of every pair, by brute force.

The tokens here are made with `re`, character by character for Chinese, without data_tools, so that its figures can be
held against these. At the end: data_tools.dedup itself on planted pairs, and the memory of its command.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOKEN = re.compile(r"[\u3005\u3007\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|"
                   r"[^\W_\u3005\u3007\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")  # fmt: skip


def tokens(text: str) -> list[str]:
    """Words and single Chinese characters, in lower case."""
    return TOKEN.findall(text.lower())


def shingle_set(text: str, n: int = 5) -> set[tuple[str, ...]]:
    """Distinct n-grams; all tokens as one where there are fewer than n."""
    words = tokens(text)
    return {tuple(words[place : place + n]) for place in range(max(1, len(words) - n + 1))} if words else set()


def true_jaccard(first: str, second: str, n: int = 5) -> float:
    """Jaccard similarity of the n-gram sets of two texts."""
    a, b = shingle_set(first, n), shingle_set(second, n)
    return len(a & b) / len(a | b) if a or b else 0.0


def similar_pairs(texts: list[str], threshold: float, n: int = 5) -> Iterator[tuple[int, int, float]]:
    """All pairs of a similarity of at least `threshold`, by counting common n-grams through an inverted list."""
    sets = [shingle_set(text, n) for text in texts]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, one in enumerate(sets):
        common: dict[int, int] = defaultdict(int)
        for gram in one:
            for other in holders[gram]:
                common[other] += 1
            holders[gram].append(number)
        for other, count in common.items():
            similarity = count / (len(one) + len(sets[other]) - count)
            if similarity >= threshold:
                yield other, number, similarity


def real_texts(shared: Path, chinese_poems: int = 2000) -> dict[str, list[str]]:
    """Texts of ../shared/data by kind: abstracts, pages, encyclopaedia paragraphs, poems of 60 characters and more."""
    with open(shared / "neurips-2022" / "papers.csv", encoding="utf-8", newline="") as file:
        abstracts = [row["abstract"] for row in csv.DictReader(file)]
    with open(shared / "sft-samples" / "c4_demo.jsonl", encoding="utf-8") as file:
        pages = [json.loads(line)["text"] for line in file]
    wiki = (shared / "sft-samples" / "wiki_demo.txt").read_text(encoding="utf-8").split("\n")
    poems: list[str] = []
    for path in sorted((shared / "tang-poems").glob("poet.tang.*.json")):
        found = ["\n".join(poem["paragraphs"]) for poem in json.loads(path.read_text(encoding="utf-8"))]
        poems += [poem for poem in found if len(poem) >= 60]
        if len(poems) >= chinese_poems:
            break
    return {
        "abstracts": [text for text in abstracts if len(text) > 200],
        "pages": [text for text in pages if len(text) > 200],
        "wiki": [paragraph for paragraph in wiki if len(paragraph) > 200],
        "poems": poems[:chinese_poems],
    }


def distinct_texts(texts: list[str], n: int = 5) -> list[str]:
    """Without those that share a fifth of their n-grams with another: what is planted is then all there is."""
    alike = {number for _, number, _ in similar_pairs(texts, 0.2, n)}
    return [text for number, text in enumerate(texts) if number not in alike]


EDITS = ("exact", "case and marks", "typos", "swaps", "truncation", "insertion")


def edited(text: str, kind: str, strength: float, rng: random.Random) -> str:
    """A near copy of a text.

    Args:
        kind: one of EDITS.
        strength: 0 to 1; the share of places changed, or of the text cut off or put in.
    """
    if kind == "exact":
        return text
    if kind == "case and marks":
        swapped = "".join(c.upper() if rng.random() < 0.5 else c for c in text)
        return re.sub(r"[,.;:，。]", lambda m: rng.choice(["", m[0], " - "]) if not m[0].isspace() else m[0], swapped)
    units = re.findall(r"\s+|[\u3400-\u9fff]|[^\s\u3400-\u9fff]+", text)
    places = [place for place, unit in enumerate(units) if not unit.isspace() and tokens(unit)]
    count = max(1, round(strength * len(places) / 8))
    if kind == "typos":
        for place in rng.sample(places, min(count, len(places))):
            units[place] = rng.choice("山水風月花") if units[place] > "\u3400" else units[place] + rng.choice("aeiou")
    elif kind == "swaps":
        for place in rng.sample(range(len(places) - 1), min(count, len(places) - 1)):
            a, b = places[place], places[place + 1]
            units[a], units[b] = units[b], units[a]
    elif kind == "truncation":
        return "".join(units[: max(1, round(len(units) * (1 - 0.6 * strength)))])
    elif kind == "insertion":
        at = rng.randrange(len(places))
        put = rng.sample([units[place] for place in places], max(1, round(0.6 * strength * len(places))))
        units.insert(places[at], " " + " ".join(put) + " ")
    return "".join(units)


def plant(texts: list[str], seed: int = 0) -> list[tuple[str, str, str, float]]:
    """One near copy of every text: (text, copy, kind of edit, true Jaccard of the two)."""
    rng = random.Random(seed)
    pairs = []
    for number, text in enumerate(texts):
        kind = EDITS[number % len(EDITS)]
        copy = edited(text, kind, rng.random() ** 1.5, rng)
        pairs.append((text, copy, kind, true_jaccard(text, copy)))
    return pairs


def components(number_of: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """The least member that each of 0 ... number_of - 1 is connected with, by a plain union-find."""
    parent = list(range(number_of))

    def find(x):
        while parent[x] != x:
            x = parent[x]
        return x

    for a, b in edges:
        a, b = find(a), find(b)
        parent[max(a, b)] = min(a, b)
    return [find(x) for x in range(number_of)]


def measure_quality(
    pairs: list[tuple[str, str, str, float]], folder: Path, verify: str, workers: int | None = None, **options: object
) -> tuple[list[bool], list[tuple[int, int]]]:
    """Deduplicate texts and their planted copies.

    Returns:
        For every planted pair whether it was found (both in one cluster), and (removed, kept) document numbers of all
        removals; text i is document 2 i, its copy 2 i + 1.
    """
    from data_tools.dedup import Duplicates, deduplicate

    order = list(range(2 * len(pairs)))
    random.Random(1).shuffle(order)
    source = folder / "planted.jsonl"
    with open(source, "w", encoding="utf-8") as file:
        for number in order:
            text = pairs[number // 2][number % 2]
            file.write(json.dumps({"id": str(number), "text": text}, ensure_ascii=False) + "\n")
    what = Duplicates(method="minhash", verify=verify, **options)
    deduplicate([source], folder / f"out-{verify}", what, workers=workers)
    kept = {number: number for number in order}
    removals = []
    with open(folder / f"out-{verify}" / "duplicates.jsonl", encoding="utf-8") as file:
        for line in map(json.loads, file):
            kept[int(line["id"])] = int(line["kept"])
            removals.append((int(line["id"]), int(line["kept"])))
    return [kept[2 * i] == kept[2 * i + 1] for i in range(len(pairs))], removals


def peak_of_command(arguments: list[object]) -> float:
    """Deduplicate in one process; its greatest resident memory in MB.

    VmHWM, not ru_maxrss: that one begins with what the process that started it had.
    """
    code = (
        "import sys\nfrom data_tools.dedup import main\nmain(sys.argv[1:])\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    line = [sys.executable, "-c", code, *map(str, arguments), "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) / 1024
