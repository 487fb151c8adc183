"""Real but tiny runs for tests: a tokenizer trained on a few sentences, a decoder with random weights, a run folder.

Contract: the folders have the layout the trainer writes (`run.yaml`, `checkpoints/step-N/` with a manifest); the
weights are the same in every process.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import yaml

from minillm.data.tokenizer import train_bpe_tokenizer
from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.settings.presets import preset
from minillm.utils.files import write_manifest

TEXTS = (
    "What does len do? len returns the number of items of a container, such as a list or a string.",
    "Return the absolute value of a number. The argument may be an integer or a floating point number.",
    "你好，世界。今天天气很好，我们一起学习语言模型。",
)


@functools.cache
def tiny_tokenizer():
    """Byte-level BPE of 320 tokens: every Chinese character that is not in TEXTS takes several tokens."""
    return train_bpe_tokenizer(list(TEXTS), vocab_size=320)


def tiny_model(context: int = 128, seed: int = 0) -> MiniLLMForCausalLM:
    """Two layers with random weights large enough that greedy replies vary; the end tokens never win, so none ends."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": context,
        "initializer_range": 0.3,
    }
    model = MiniLLMForCausalLM(MiniLLMConfig(**preset("demo", **shape))).eval()
    ends = tiny_tokenizer().convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    with torch.no_grad():
        model.get_output_embeddings().weight[ends] = 0
    return model


def write_checkpoint(run_folder: Path, step: int, model: MiniLLMForCausalLM | None = None) -> Path:
    """One published checkpoint of the run."""
    folder = run_folder / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (model or tiny_model(seed=step)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    write_manifest(folder, {"format": "minillm-checkpoint-1", "step": step})
    return folder


def write_run(root: Path, name: str, stage: str = "sft", steps: tuple[int, ...] = (10,), context: int = 128) -> Path:
    """A run folder with checkpoints at `steps`, each with weights of its own."""
    run_folder = root / name
    for step in steps:
        write_checkpoint(run_folder, step, tiny_model(context, seed=step))
    (run_folder / "run.yaml").write_text(yaml.safe_dump({"run_name": name, "stage": stage}), encoding="utf-8")
    return run_folder
