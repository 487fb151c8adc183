"""From a model folder (minillm.run_folder finds it) to a model.

Contract: torch and transformers are imported by `load_*`. Weights that are missing from a file are an error, never a
fresh initialisation. Nothing is downloaded and no code from a model folder is run.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import TYPE_CHECKING

from minillm.run_folder import resolve_model_folder
from minillm.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = ("auto", "fp32", "bf16")


def load_model(
    path: str | Path | None = None, device: str = "auto", dtype: str = "auto", run_root: str | Path = "runs"
) -> PreTrainedModel:
    """`load_model_folder` of what `resolve_model_folder` finds."""
    return load_model_folder(resolve_model_folder(path, run_root), device, dtype)


def load_model_folder(folder: Path, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """Load a Hugging Face folder on `device` in `dtype`, in eval mode, with a `.chat` method.

    Models of other families (a Llama folder, say) stay transformers' own class and get minillm's `.chat` on top.

    Raises:
        UserError: an unreadable or incomplete weight file, no causal language model, a device that is not there.
    """
    torch_device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, torch_device)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from minillm.models import MiniLLMForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch_dtype, local_files_only=True, output_loading_info=True
        )
    except SafetensorError as error:
        raise UserError(f"a weight file in {folder} is damaged ({error}): copy or export it again") from error
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded as a causal language model: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"the weights in {folder} lack {len(missing)} of the tensors its config.json asks for ({missing[0]}, ...): "
            "config and weights are of different models"
        )
    if not hasattr(model, "chat"):
        model.chat = types.MethodType(MiniLLMForCausalLM.chat, model)
    return model.to(torch_device).eval()


def resolve_device(device: str):
    """The torch device meant by "auto", "cpu", "cuda" or any torch device name; a UserError when it is not there."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device!r} is not a device: use auto, cpu or cuda") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={device!r}: torch sees no CUDA device on this machine: use cpu or auto")
    return resolved


def resolve_dtype(dtype: str, device):
    """The torch dtype meant by "auto" (bf16 on CUDA cards that have it, fp32 elsewhere), "fp32" or "bf16"."""
    import torch

    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not known: use one of {', '.join(DTYPES)}")
    if dtype == "auto":
        fast = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]


