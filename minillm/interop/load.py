"""From what a user names (a run, a checkpoint, an exported folder) to a model folder, and from the folder to a model.

Contract: the folder search is stdlib and yaml only; torch and transformers are imported by `load_*`. A damaged
checkpoint is never loaded: inside a run it is skipped with a warning that names the file, and named directly it is an
error. Weights that are missing from a file are an error, never a fresh initialisation. Nothing is downloaded and no
code from a model folder is run.
"""

from __future__ import annotations

import difflib
import os
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from minillm.utils.errors import UserError
from minillm.utils.files import MANIFEST, manifest_problems, read_json
from minillm.utils.logging import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXPORT_RECORD = "minillm_export.json"
DTYPES = ("auto", "fp32", "bf16")
_CHECKPOINT_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class ModelFolder:
    """Where a model came from: `run`, `step` and `stage` (pretrain | sft) are None where the folder does not say."""

    path: Path
    run: str | None = None
    step: int | None = None
    stage: str | None = None


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The finished checkpoint folders of a run, newest (highest step) first; unfinished `.tmp` ones do not count."""
    found = [
        (int(match[1]), path)
        for path in (run_folder / "checkpoints").glob("step-*")
        if (match := _CHECKPOINT_NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def newest_checkpoint(run_folder: Path, needed: Sequence[str] = ()) -> Path | None:
    """The newest checkpoint whose manifest holds; a warning names what is wrong with each newer one.

    Args:
        needed: files without which it is of no use.
    """
    for path in list_checkpoints(run_folder):
        problems = manifest_problems(path, needed=needed) or _wrong_step(path)
        if not problems:
            return path
        warn(f"skipping the checkpoint {path}: {'; '.join(problems)}")
    return None


def _wrong_step(path: Path) -> list[str]:
    """A folder that was renamed, or holds the files of another."""
    step = read_json(path / MANIFEST).get("step")
    if step == int(_CHECKPOINT_NAME.fullmatch(path.name)[1]):
        return []
    return [f"{path / MANIFEST} is of step {step}, its folder is named otherwise"]


def resolve_model_folder(path: str | Path | None = None, run_root: str | Path = "runs") -> Path:
    """Find the Hugging Face folder that `path` means.

    Args:
        path: a folder (run, checkpoint, exported, any model folder), the name of a run under `run_root`, or None for
            the run with the newest checkpoint.

    Raises:
        UserError: nothing there, no whole checkpoint, or a named checkpoint is damaged.
    """
    root = Path(run_root)
    if path is None:
        return newest_run_checkpoint(root)
    for folder in (Path(path), root / path):
        if (folder / "config.json").is_file() or (folder / MANIFEST).is_file():
            return _checked_folder(folder)
        if (folder / "checkpoints").is_dir():
            return _run_checkpoint(folder)
    if Path(path).is_dir():
        raise UserError(
            f"{path} is neither a model folder (no config.json) nor a run (no checkpoints/): name a run, a checkpoint "
            f"or an exported folder{_known_runs(root)}"
        )
    raise UserError(
        f"there is no run or folder {str(path)!r} (looked for ./{path} and {root / path}): name a run under {root}/ or "
        f"a model folder on this machine{_known_runs(root, str(path))}"
    )


def describe_model_folder(folder: Path) -> ModelFolder:
    """What a resolved folder says about its origin: its place in a run, or the record an export left in it."""
    match = _CHECKPOINT_NAME.fullmatch(folder.name)
    run_folder = folder.absolute().parent.parent
    if match and folder.absolute().parent.name == "checkpoints":
        return ModelFolder(folder, run_folder.name, int(match[1]), _stage_of_run(run_folder))
    if (folder / EXPORT_RECORD).is_file():
        record = read_json(folder / EXPORT_RECORD)
        return ModelFolder(folder, record.get("run"), record.get("step"), record.get("stage"))
    return ModelFolder(folder)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a model folder."""
    from transformers import AutoTokenizer

    import minillm.models  # noqa: F401 (AutoTokenizer reads config.json, which has to be a class it knows)

    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise UserError(f"{folder} has no tokenizer (tokenizer.json): copy the tokenizer's files beside the weights")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust library raises bare Exception for a damaged file
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {error}") from error


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


def _checked_folder(folder: Path) -> Path:
    if (folder / MANIFEST).is_file() and (problems := manifest_problems(folder)):
        raise UserError(f"{folder} is damaged: {'; '.join(problems)}; name its run to use the newest whole checkpoint")
    return folder


def _run_checkpoint(run_folder: Path) -> Path:
    if not list_checkpoints(run_folder):
        raise UserError(f"the run {run_folder} has no checkpoint yet: train it further, or name another run")
    checkpoint = newest_checkpoint(run_folder)
    if checkpoint is None:
        raise UserError(f"every checkpoint of the run {run_folder} is damaged (see the warnings): name another run")
    return checkpoint


def _runs_newest_first(root: Path) -> Iterator[Path]:
    """Runs that have a checkpoint, by when their newest one was finished (the manifest is the last file written)."""

    def finished(run_folder: Path) -> tuple[float, str]:
        newest = list_checkpoints(run_folder)[0]
        manifest = newest / MANIFEST
        return ((manifest if manifest.exists() else newest).stat().st_mtime, run_folder.name)

    if root.is_dir():
        yield from sorted((path for path in root.iterdir() if list_checkpoints(path)), key=finished, reverse=True)


def newest_run_checkpoint(root: Path, stage: str | None = None) -> Path:
    """The newest whole checkpoint of the newest run under `root` (of that `stage`, where one is named)."""
    for run_folder in _runs_newest_first(root):
        if stage is not None and _stage_of_run(run_folder) != stage:
            continue
        if checkpoint := newest_checkpoint(run_folder):
            return checkpoint
        warn(f"skipping the run {run_folder}: it has no whole checkpoint")
    raise UserError(
        f"there is no {stage or 'trained'} run under {root}{os.sep} yet: train one (`python -m minillm pretrain`, in a "
        "checkout `bash launch/quickstart.sh`), or name a run or model folder"
    )


def _known_runs(root: Path, wanted: str = "") -> str:
    names = [path.name for path in _runs_newest_first(root)]
    if not names:
        return ""
    near = difflib.get_close_matches(Path(wanted).name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"; the runs with a checkpoint are {', '.join(names[:10])}{hint}"


def _stage_of_run(run_folder: Path) -> str | None:
    config = run_folder / "run.yaml"
    if not config.is_file():
        return None
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{config} is not valid YAML: {error}") from error
    return values.get("stage") if isinstance(values, dict) else None
