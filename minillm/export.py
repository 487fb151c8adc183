"""Write a trained model as a folder for others: `python -m minillm.export RUN OUT`.

Contract: `hf` (the default) loads in transformers without minillm: as the native class that computes the same (Llama,
Mistral, Qwen3, Mixtral, Qwen3-MoE, DeepSeek-V3, Qwen3-Next, GPT-2), or, where there is none, as our class with its code
in the folder (`trust_remote_code=True`). `minillm` keeps our own class without code. Every folder carries the
tokenizer, a generation config whose end tokens fit a chat, a model card with the run's numbers, and a record of where
it came from. OUT appears whole or not at all. fp32, the default, loses nothing; bf16 is half as large.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minillm.compat.versions import INFERENCE, check_environment
from minillm.utils.commands import command_name
from minillm.utils.errors import UserError, exit_on_user_error
from minillm.utils.files import publish_directory, read_json, write_json
from minillm.utils.logging import say
from minillm.utils.threads import set_wait_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from minillm.run_folder import ModelFolder

FORMATS = ("hf", "minillm")


def build_parser() -> argparse.ArgumentParser:
    """The command line; stdlib only, so that --help is quick."""
    parser = argparse.ArgumentParser(
        prog=command_name("minillm.export"), description="Export a run's newest checkpoint as a model folder."
    )
    parser.add_argument("run", metavar="RUN", help="run name or folder, a checkpoint of it, or a model folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must be empty or not exist")
    parser.add_argument(
        "--format",
        default="hf",
        choices=FORMATS,
        help="hf: the family's own class in transformers, or ours with its code in OUT where it has none (then it is "
        "loaded with trust_remote_code=True); minillm: our class without its code (default hf)",
    )
    parser.add_argument("--dtype", default="fp32", choices=("bf16", "fp32"), help="of the weights (default fp32)")
    return parser


def export(run: str | Path, out: Path, format: str = "hf", dtype: str = "fp32") -> None:
    """Export what `run` names to the folder `out`.

    Raises:
        UserError: `out` holds files, `run` names nothing whole, the format cannot express the model, the disk is full.
    """
    if format not in FORMATS:
        raise UserError(f"format={format!r} is not known: use one of {', '.join(FORMATS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: name a new folder, or delete it first")
    from minillm.data.foreign_tokenizer import open_tokenizer
    from minillm.interop.load import load_model_folder
    from minillm.run_folder import describe_model_folder, resolve_model_folder

    folder = resolve_model_folder(run)
    tokenizer = open_tokenizer(folder)
    model, needs_code = _as_format(load_model_folder(folder, device="cpu", dtype="fp32"), format)
    _cast_parameters(model, dtype)
    temporary = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write(temporary, model, tokenizer, describe_model_folder(folder), out.name, needs_code)
        publish_directory(temporary, out.absolute())
    except Exception as error:  # a full disk is OSError, SafetensorError or bare Exception, by who was writing
        raise UserError(f"{out} could not be written ({error}); nothing was left there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _as_format(model: PreTrainedModel, format: str) -> tuple[PreTrainedModel, bool]:
    """The model as the class it is written as, and whether its code goes with it."""
    from minillm.interop import from_transformers, native_family, to_transformers
    from minillm.interop.families import FAMILIES
    from minillm.models import MiniLLMForCausalLM

    own = isinstance(model, MiniLLMForCausalLM)
    if format == "minillm":
        return (model if own else from_transformers(model)), False
    if not own:
        return model, False
    family = native_family(model.config)
    if family is None:
        return model, True
    if lost := FAMILIES[family].left_out(model.config.architecture):
        say(f"left out, because {FAMILIES[family].config_name} has no such setting of training: {', '.join(lost)}")
    return to_transformers(model), False


def _cast_parameters(model: PreTrainedModel, dtype: str) -> None:
    """Parameters alone: buffers, the balancing biases of routers, change by less than bf16 can hold."""
    import torch

    model.config.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(model.config.dtype)


def _write(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    origin: ModelFolder,
    name: str,
    needs_code: bool,
) -> None:
    from transformers import GenerationConfig

    from minillm.interop.model_card import model_card
    from minillm.interop.own_code import add_own_code
    from minillm.models.chat import end_of_turn_ids
    from minillm.run_folder import EXPORT_RECORD

    stops = end_of_turn_ids(tokenizer, model.generation_config)
    model.generation_config = GenerationConfig(
        eos_token_id=stops or None, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if needs_code:
        add_own_code(folder)
    (folder / "README.md").write_text(model_card(model, origin, name, needs_code), encoding="utf-8")
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)  # safetensors writes them for the owner alone
    write_json(folder / EXPORT_RECORD, {"run": origin.run, "step": origin.step, "stage": origin.stage})


def describe(out: Path, format: str, dtype: str) -> list[str]:
    """Lines for the person: what was written, and how to load it."""
    config = read_json(out / "config.json")
    needs_code = "auto_map" in config
    size = sum(path.stat().st_size for path in out.iterdir())
    family = {
        True: "no class of transformers computes it, so its code is in the folder; trust_remote_code is needed",
        False: f"family {config['model_type']}, no trust_remote_code needed",
    }[needs_code]
    if format == "minillm":
        family = "minillm's own class, which minillm loads"
        usage = f'import minillm; model = minillm.load("{out}"); print(model.chat("Hello"))'
    else:
        trust = ", trust_remote_code=True" if needs_code else ""
        usage = (
            "from transformers import AutoModelForCausalLM; "
            f'model = AutoModelForCausalLM.from_pretrained("{out}"{trust})'
        )
    return [
        f"wrote {out}: {size / 1e6:,.1f} MB, {dtype}, {config['architectures'][0]} ({family})",
        f"load it with: {usage}",
        f"talk to it with: python -m minillm.chat {out}",
    ]


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    set_wait_policy()
    args = build_parser().parse_args(argv)
    with exit_on_user_error():
        check_environment(INFERENCE)
        # Imported late, so that --help and a wrong OUT answer at once.
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        export(args.run, args.out, args.format, args.dtype)
        for line in describe(args.out, args.format, args.dtype):
            say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
