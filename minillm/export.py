"""Write a trained model as a folder for others: `python -m minillm.export RUN OUT`.

Contract: `hf` (the default) is a native LlamaForCausalLM that transformers, and whatever reads Llama folders, loads
without minillm; `minillm` keeps our own class. Both carry the tokenizer, a generation config whose end tokens fit a
chat, and a record of where they came from. OUT appears whole or not at all. fp32, the default, loses nothing; bf16 is
half as large.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minillm.utils.errors import UserError, exit_on_user_error
from minillm.utils.files import publish_directory, read_json, write_json
from minillm.utils.logging import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from minillm.interop.load import ModelFolder

FORMATS = ("hf", "minillm")


def build_parser() -> argparse.ArgumentParser:
    """The command line; stdlib only, so that --help is quick."""
    parser = argparse.ArgumentParser(
        prog="python -m minillm.export", description="Export a run's newest checkpoint as a model folder."
    )
    parser.add_argument("run", metavar="RUN", help="run name or folder, a checkpoint of it, or a model folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must be empty or not exist")
    parser.add_argument(
        "--format", default="hf", choices=FORMATS, help="hf: transformers' Llama class; minillm: ours (default hf)"
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
    from minillm.interop.load import describe_model_folder, load_model_folder, load_tokenizer, resolve_model_folder

    folder = resolve_model_folder(run)
    tokenizer = load_tokenizer(folder)
    model = _as_format(load_model_folder(folder, device="cpu", dtype=dtype), format)
    temporary = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write(temporary, model, tokenizer, describe_model_folder(folder))
        publish_directory(temporary, out.absolute())
    except Exception as error:  # a full disk is OSError, SafetensorError or bare Exception, by who was writing
        raise UserError(f"{out} could not be written ({error}); nothing was left there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _as_format(model: PreTrainedModel, format: str) -> PreTrainedModel:
    from minillm.interop.llama import from_transformers, to_transformers
    from minillm.models import MiniLLMForCausalLM

    own = isinstance(model, MiniLLMForCausalLM)
    if format == "hf" and own:
        return to_transformers(model)
    if format == "minillm" and not own:
        return from_transformers(model)
    return model


def _write(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, origin: ModelFolder) -> None:
    from transformers import GenerationConfig

    from minillm.inference.generate import stop_token_ids
    from minillm.interop.load import EXPORT_RECORD

    stops = stop_token_ids(model, tokenizer)
    model.generation_config = GenerationConfig(
        eos_token_id=stops or None, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)  # safetensors writes them for the owner alone
    write_json(folder / EXPORT_RECORD, {"run": origin.run, "step": origin.step, "stage": origin.stage})


def describe(out: Path, format: str, dtype: str) -> list[str]:
    """Lines for the person: what was written, and how to load it."""
    model_class = read_json(out / "config.json")["architectures"][0]
    size = sum(path.stat().st_size for path in out.iterdir())
    auto_class = f'AutoModelForCausalLM.from_pretrained("{out}")'
    usage = {
        "hf": f"from transformers import AutoModelForCausalLM; model = {auto_class}",
        "minillm": f'import minillm; model = minillm.load("{out}"); print(model.chat("Hello"))',
    }
    return [
        f"wrote {out}: {size / 1e6:,.1f} MB, {dtype}, {model_class}",
        f"load it with: {usage[format]}",
        f"talk to it with: python -m minillm.chat {out}",
    ]


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    with exit_on_user_error():
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
