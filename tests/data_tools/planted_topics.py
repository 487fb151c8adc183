"""Documents with planted topics: which words belong together is known from outside the code under test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

ENGLISH = {
    "sea": "ship sailor harbour wave anchor storm mast captain tide whale",
    "kitchen": "soup pepper onion butter oven bread recipe flour garlic knife",
    "court": "judge lawyer verdict witness crime trial prison jury evidence appeal",
}
CHINESE = {
    "海": "船长 水手 港口 海浪 风暴 潮水 鲸鱼 灯塔 渔民 海岸",
    "厨": "面包 胡椒 洋葱 黄油 烤箱 面粉 大蒜 厨师 食谱 蔬菜",
    "法": "法官 律师 证人 监狱 陪审团 证据 犯罪 法庭 审判 上诉",
}


def planted(words: dict[str, str], number: int = 150, seed: int = 0, glue: str = " ") -> list[dict]:
    """Records {"id", "abstract", "truth", "date"}; a document has words of one topic and a few of the others."""
    random = np.random.default_rng(seed)
    topics = [text.split() for text in words.values()]
    records = []
    for document in range(number):
        truth = document % len(topics)
        chosen = []
        for _ in range(40):
            own = random.random() < 0.9
            topic = topics[truth] if own else topics[random.integers(len(topics))]
            chosen.append(topic[random.integers(len(topic))])
        date = f"{2000 + (document % 30) // 10}-0{1 + document % 9}-11"
        records.append({"id": f"d{document}", "abstract": glue.join(chosen), "truth": truth, "date": date})
    return records


def write_records(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def agreement(truth: list[int], found: list[int]) -> float:
    """Share of the documents whose topic is the one that most documents of their truth have, topics being distinct."""
    pairs = sorted(
        ((sum(t == a and f == b for t, f in zip(truth, found, strict=True)), a, b)
         for a in set(truth) for b in set(found)), reverse=True,
    )  # fmt: skip
    taken_a, taken_b, total = set(), set(), 0
    for count, a, b in pairs:
        if a not in taken_a and b not in taken_b:
            taken_a.add(a)
            taken_b.add(b)
            total += count
    return total / len(truth)
