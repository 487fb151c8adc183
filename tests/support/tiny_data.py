"""A small corpus with structure to learn, made from a seed: the same text on every machine and Python version."""

from __future__ import annotations

import json
import random
from pathlib import Path

from data_tools.shards import build_shards
from minillm.data.tokenizer import train_bpe_tokenizer

NOUNS = "list tuple string number module class method object value key file line word tree graph".split()
VERBS = "returns takes holds reads writes sorts joins splits counts copies".split()
ENDS = ["of the given size", "in order", "or None", "for each item", "再次", "without a copy"]


def sentences(seed: int, count: int) -> list[str]:
    """`count` documents of one to six sentences."""
    draw = random.Random(seed)

    def sentence() -> str:
        return f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} a {draw.choice(NOUNS)} {draw.choice(ENDS)}."

    return [" ".join(sentence() for _ in range(draw.randint(1, 6))) for _ in range(count)]


def write_tiny_data(root: Path, documents: int = 400) -> dict[str, str]:
    """Text shards, a tokenizer of 384 tokens, and conversations.

    Returns:
        The `data.*` settings that use them (text), and the same for conversations under `chat.*`.
    """
    root.mkdir(parents=True, exist_ok=True)
    parts = {"train": sentences(1, documents), "validation": sentences(2, 24)}
    train_bpe_tokenizer(parts["train"], 384).save_pretrained(root / "tokenizer")
    for name, texts in parts.items():
        text, chat = root / f"{name}.jsonl", root / f"chat-{name}.jsonl"
        text.write_text("".join(json.dumps({"id": f"{name}{i}", "text": t}) + "\n" for i, t in enumerate(texts)))
        chat.write_text("".join(json.dumps({"id": f"{name}{i}", "messages": turns(t)}) + "\n"
                                for i, t in enumerate(texts)))  # fmt: skip
        build_shards([text], root / "shards" / name)
        build_shards([chat], root / "shards" / f"chat-{name}")
    settings = {"data.tokenizer": str(root / "tokenizer"), "data.cache_dir": str(root / "cache")}
    for prefix, kind in (("data", ""), ("chat", "chat-")):
        settings[f"{prefix}.train"] = str(root / "shards" / f"{kind}train")
        settings[f"{prefix}.validation"] = str(root / "shards" / f"{kind}validation")
    return settings


def turns(text: str) -> list[dict[str, str]]:
    """A question about the first sentence of a document, answered by the rest."""
    first, *rest = text.split(". ")
    return [{"role": "user", "content": first + "?"}, {"role": "assistant", "content": ". ".join(rest) or "Yes."}]


TINY_MODEL = {
    "model.vocab_size": 384, "model.hidden_size": 48, "model.intermediate_size": 96, "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4, "model.num_key_value_heads": 2, "model.head_dim": 12,
    "model.max_position_embeddings": 64,
}  # fmt: skip
TINY_RUN = {
    "train.max_steps": 12, "train.train_batch_size": 8, "train.train_micro_batch_size_per_gpu": 1, "data.seq_len": 64,
    "optim.learning_rate": 3e-3, "log.every": 1, "log.wandb": "disabled", "validation.every": 6, "samples.every": 0,
    "checkpoint.every": 4, "checkpoint.keep": 9,
}  # fmt: skip
