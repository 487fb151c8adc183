"""Checkpoints that know no topology and survive a kill at any moment.

Contract: `step-000500/` holds, by parameter name, fp32 weights (model.safetensors) and AdamW moments
(optimizer.safetensors), the counters (trainer_state.json), every rank's generators (rng.json), config and tokenizer,
so that it is a Hugging Face folder too. It is written as `step-000500.tmp/`, synced, listed with sizes and sha256 in
manifest.json, and renamed. Rank 0 reads and writes files; nothing is pickled. A reader takes the newest folder whose
manifest holds.
"""

from __future__ import annotations

import os
import shutil
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open

from minillm.data.tokenizer import save_tokenizer
from minillm.interop.load import list_checkpoints
from minillm.training.expert_parallel import whole_parameters
from minillm.training.safetensors_stream import SafetensorsWriter
from minillm.training.state import TrainState
from minillm.training.zero_state import (
    MOMENTS,
    link_optimizer_states,
    loss_scale_state,
    read_full_state,
    reset_optimizer_state,
    restore_loss_scale,
    write_full_state,
)
from minillm.utils import distributed
from minillm.utils.errors import UserError
from minillm.utils.files import publish_directory, read_json, remove_directory, write_json
from minillm.utils.files import write_manifest as list_files
from minillm.utils.logging import say, warn
from minillm.utils.seeding import capture_rng, restore_rng, seed_everything

FORMAT = "minillm-checkpoint-1"
WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


def checkpoint_steps(directory: Path) -> dict[int, Path]:
    """step -> folder of every published checkpoint in `checkpoints/`, oldest first (damaged ones included)."""
    return {int(path.name.removeprefix("step-")): path for path in reversed(list_checkpoints(directory.parent))}


def save_checkpoint(directory: Path, engine, state: TrainState, extra: dict[str, object], tokenizer, keep: int) -> Path:
    """Save step `state.step` and delete what is older than the newest `keep` (the best by val_loss stays).

    Every rank calls this. A failed write (disk full, read-only folder) leaves earlier checkpoints as they were.

    Args:
        extra: what resume compares and reports (data fingerprint, run id), stored beside the counters.

    Raises:
        UserError: on every rank, when rank 0 could not write.
    """
    final = directory / f"step-{state.step:06d}"
    temporary = final.with_name(final.name + ".tmp")
    # Generators first: what follows must not change what is stored.
    generators = distributed.gather_objects(capture_rng())
    shapes = {whole.name: tuple(whole.shape) for whole in whole_parameters(engine.module)}
    problem = None
    checksums: dict[str, str] = {}
    if distributed.rank() == 0:
        problem = _attempt(lambda: _prepare(temporary, engine, state, extra, tokenizer, generators))
    for file, kinds in ((WEIGHTS, ("weight",)), (OPTIMIZER, MOMENTS)):
        entries = {_key(kind, name): shape for kind in kinds for name, shape in shapes.items()}
        tensors = read_full_state(engine, kinds)
        if file == WEIGHTS:
            buffers = persistent_buffers(engine.module)
            entries |= {name: tuple(buffer.shape) for name, buffer in buffers.items()}
            tensors = chain(tensors, ((name, "weight", buffer.float().cpu()) for name, buffer in buffers.items()))
        if distributed.rank() == 0 and problem is None:
            problem = _attempt(lambda: _write_tensors(temporary / file, entries, tensors, checksums))  # noqa: B023
        for _ in tensors:  # the other ranks, and rank 0 after a failure: the collectives have to be finished
            pass
    if distributed.rank() == 0 and problem is None:
        problem = _attempt(lambda: _publish(temporary, final, state, checksums))
    problem = distributed.broadcast_object(problem)
    if problem is not None:
        if distributed.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        steps = list(checkpoint_steps(directory))
        last = f"the last one, step {steps[-1]}, is untouched" if steps else "there is no earlier one"
        raise UserError(f"checkpoint {final} could not be written ({problem}); {last}. Mend that and run again")
    if distributed.rank() == 0 and (problem := _attempt(lambda: prune(directory, keep, state))):
        warn(f"old checkpoints in {directory} could not be deleted: {problem}")
    return final


def _attempt(action) -> str | None:
    """What went wrong, as text: an OSError, or what the tokenizers library raises for one (a bare Exception)."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _key(kind: str, name: str) -> str:
    return name if kind == "weight" else f"{kind}.{name}"


def _prepare(temporary: Path, engine, state: TrainState, extra: dict, tokenizer, generators: list) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    engine.module.config.save_pretrained(temporary)
    if engine.module.generation_config is not None:
        engine.module.generation_config.save_pretrained(temporary)
    save_tokenizer(tokenizer, temporary)
    scaler = loss_scale_state(engine)
    scale = {"loss_scale": scaler} if scaler else {}
    write_json(temporary / "trainer_state.json", {"format": FORMAT, "state": state.as_dict(), **scale, **extra})
    write_json(temporary / "rng.json", {"ranks": generators})


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers a saved model carries: the balancing biases of routers."""
    saved = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _write_tensors(path: Path, entries: dict, tensors, checksums: dict[str, str]) -> None:
    with SafetensorsWriter(path, entries) as writer:
        for name, kind, tensor in tensors:
            writer.write(_key(kind, name), tensor)
    checksums[path.name] = writer.sha256


def _publish(temporary: Path, final: Path, state: TrainState, checksums: dict[str, str]) -> None:
    list_files(temporary, {"format": FORMAT, "step": state.step}, checksums)
    if final.exists():  # a damaged one of the same step, which was passed over at the start
        remove_directory(final)
    publish_directory(temporary, final)


def prune(directory: Path, keep: int, state: TrainState) -> None:
    """Delete all but the newest `keep` up to this step and the best; leftovers of killed writers go too.

    What is newer than this step was damaged and passed over at the start.
    """
    steps = checkpoint_steps(directory)
    kept = [step for step in steps if step <= state.step][-keep:]
    for step, path in steps.items():
        if step not in (*kept, state.best_step):
            remove_directory(path)
    for leftover in (*directory.glob("step-*.tmp"), *directory.glob(".step-*.deleted")):
        shutil.rmtree(leftover, ignore_errors=True)


def read_state(path: Path) -> tuple[TrainState, dict]:
    """Counters and the rest of trainer_state.json.

    Raises:
        UserError: another format.
    """
    values = read_json(path / "trainer_state.json")
    if values.get("format") != FORMAT:
        raise UserError(f"{path}: format {values.get('format')!r}, this version reads {FORMAT!r}")
    return TrainState.from_dict(values["state"]), values


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Put a checkpoint's weights and buffers into a model that no engine holds yet.

    Raises:
        UserError: the names or shapes are not the model's (a checkpoint of another architecture).
    """
    parameters = {**dict(model.named_parameters()), **persistent_buffers(model)}
    with safe_open(path / WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        wrong = [n for n in names & set(parameters) if file.get_slice(n).get_shape() != list(parameters[n].shape)]
        if names != set(parameters) or wrong:
            differs = sorted(names ^ set(parameters)) + sorted(wrong)
            raise UserError(
                f"{path} holds another architecture: {len(differs)} tensors differ in name or shape, the first is "
                f"{differs[0]}; choose another run_name, or the model this run was started with"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(name))


def restore_training(engine, path: Path, seed: int) -> TrainState:
    """After the warm-up step: moments, fp32 weights, counters and generators of a checkpoint, at any topology.

    A rank that the checkpoint has no generator for (another number of ranks) is seeded from (seed, step, rank).
    """
    state, values = read_state(path)
    link_optimizer_states(engine)
    reset_optimizer_state(engine, state.step)
    with safe_open(path / OPTIMIZER, framework="pt") as file:
        for kind in MOMENTS:
            write_full_state(engine, kind, lambda name, kind=kind: file.get_tensor(_key(kind, name)))
    # Exactly: DeepSpeed made its own fp32 weights from the rounded low-precision ones.
    with safe_open(path / WEIGHTS, framework="pt") as file:
        write_full_state(engine, "weight", file.get_tensor)
    if "loss_scale" in values:
        restore_loss_scale(engine, values["loss_scale"])
    reset_counters(engine, state.step)
    generators = read_json(path / "rng.json")["ranks"]
    if len(generators) == distributed.world_size():
        restore_rng(generators[distributed.rank()])
    else:
        seed_rank(seed, state.step)
    return state


def reset_counters(engine, step: int) -> None:
    """DeepSpeed's own counters: micro_steps decides where an accumulation ends."""
    engine.global_steps, engine.micro_steps = step, step * engine.gradient_accumulation_steps()
    engine.global_samples = step * engine.train_batch_size()
    engine.skipped_steps = 0


def seed_rank(seed: int, step: int) -> None:
    """Generators for this rank at this step (dropout differs between ranks)."""
    seed_everything((seed * 1_000_003 + step * 10_007 + distributed.rank()) % 2**63)


def describe_size(path: Path) -> str:
    """Size of a checkpoint folder in MB, for the log."""
    return f"{sum(p.stat().st_size for p in path.iterdir() if p.is_file()) / 1e6:.0f} MB"


def announce(path: Path, seconds: float) -> None:
    say(f"saved {os.fspath(path)} ({describe_size(path)}, {seconds:.1f} s)")
