"""A folder of any known family as our own config or model: the start of a fine-tuning run.

Contract: one table from `model_type` to its converter; a folder of another family is a UserError with the valid names.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig

from minillm.interop.llama import config_from_llama, from_transformers
from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.utils.errors import UserError
from minillm.utils.files import read_json

CONFIGS = {
    "minillm": MiniLLMConfig.from_pretrained,
    "llama": lambda folder: config_from_llama(LlamaConfig.from_pretrained(folder)),
}
MODELS = {
    "minillm": lambda folder: MiniLLMForCausalLM.from_pretrained(folder, dtype=torch.float32),
    "llama": from_transformers,
}


def load_config_as_minillm(folder: Path) -> MiniLLMConfig:
    """The architecture in a model folder."""
    return CONFIGS[_family(folder)](folder)


def load_as_minillm(folder: Path) -> MiniLLMForCausalLM:
    """The model in a model folder, in fp32."""
    return MODELS[_family(folder)](folder).float()


def _family(folder: Path) -> str:
    family = read_json(folder / "config.json").get("model_type")
    if family not in CONFIGS:
        raise UserError(f"{folder} holds a {family} model; training can start from: {', '.join(sorted(CONFIGS))}")
    return family
