"""The table of native families, and which of them a config of ours is: a question to its fields, never to its name."""

from __future__ import annotations

from minillm.interop.deepseek import DEEPSEEK_V3
from minillm.interop.family import Family
from minillm.interop.gpt2 import GPT2
from minillm.interop.llama import LLAMA, MISTRAL, MIXTRAL, QWEN3, QWEN3_MOE
from minillm.interop.qwen3_next import QWEN3_NEXT
from minillm.models import MiniLLMConfig
from minillm.utils.errors import UserError

# Where two would do, the first is taken: a Mistral without a window is a Llama.
FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN3, MIXTRAL, QWEN3_MOE, DEEPSEEK_V3, QWEN3_NEXT, GPT2)
}


def native_family(config: MiniLLMConfig) -> str | None:
    """The model_type of the transformers class that computes the same as `config`; None where there is none."""
    arch = config.architecture
    return next((name for name, family in FAMILIES.items() if not family.differences(arch)), None)


def require_native_family(config: MiniLLMConfig) -> Family:
    """The native family; UserError with the nearest one and what it lacks."""
    if name := native_family(config):
        return FAMILIES[name]
    arch = config.architecture
    nearest = min(FAMILIES.values(), key=lambda family: len(family.differences(arch)))
    raise UserError(
        f"no class of transformers computes this config (the nearest is {nearest.model_name}, but "
        f"{'; '.join(nearest.differences(arch))}): `python -m minillm.export` writes it with its own code"
    )


def require_known_family(model_type: object, place: object) -> Family:
    """The family of that name; UserError with `place` and the valid names."""
    if model_type not in FAMILIES:
        raise UserError(f"{place}: model_type is {model_type!r}: those that can be converted are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
