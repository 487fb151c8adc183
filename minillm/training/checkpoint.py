"""Checkpoints that know no topology and survive a kill at any moment.

Contract: `step-000500/` holds, by parameter name, fp32 weights (model.safetensors) and the optimizer's moments
(optimizer.safetensors), the counters (trainer_state.json), every rank's generators (rng.json), config and tokenizer,
so that it is a Hugging Face folder too. It is written as `step-000500.tmp/`, synced, listed with sizes and sha256 in
manifest.json, and renamed. Rank 0 reads and writes files, in the background if asked (CheckpointWriter); nothing is
pickled. A reader takes the newest folder whose manifest holds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PretrainedConfig

from minillm.compat.deepspeed_api import link_optimizer_states, set_counters
from minillm.data.tokenizer import save_tokenizer
from minillm.run_folder import list_checkpoints, newest_checkpoint
from minillm.training.expert_parallel import whole_parameters
from minillm.training.optim import MOMENTS, moments_of
from minillm.training.safetensors_stream import SafetensorsWriter
from minillm.training.state import TrainState
from minillm.training.zero_state import (
    has_state,
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
FILES = {WEIGHTS: ("weight",), OPTIMIZER: MOMENTS}
COUNTERS, GENERATORS = "trainer_state.json", "rng.json"


def checkpoint_steps(directory: Path) -> dict[int, Path]:
    """step -> folder of every published checkpoint in `checkpoints/`, oldest first (damaged ones included)."""
    return {int(path.name.removeprefix("step-")): path for path in reversed(list_checkpoints(directory.parent))}


def newest_to_resume(run_dir: Path) -> Path | None:
    """The checkpoint that a run goes on from; None before its first.

    Raises:
        UserError: it has checkpoints and none is whole: a fresh start would delete them.
    """
    found = newest_checkpoint(run_dir, needed=(*FILES, COUNTERS, GENERATORS))
    if found is None and list_checkpoints(run_dir):
        raise UserError(
            f"every checkpoint of {run_dir} is damaged (the warnings name the files); nothing was changed. Put whole "
            f"files back, or move {run_dir / 'checkpoints'} away to start anew"
        )
    return found


class CheckpointWriter:
    """Saves steps of a run: at once, or on a thread of rank 0 while training goes on.

    Every method is called by every rank. At most one checkpoint is being written at a time. A failed write (disk full,
    read-only folder) leaves earlier checkpoints as they were.

    Args:
        directory: the run's `checkpoints/`.
        keep: the newest so many stay, and the best by val_loss besides.
        asynchronous: copy weights and moments to host memory (rank 0, 12 bytes a parameter), write in the background.
    """

    def __init__(self, directory: Path, keep: int, asynchronous: bool):
        self.directory, self.keep, self.asynchronous = directory, keep, asynchronous
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="minillm-checkpoint") if asynchronous else None
        self._running: Future[str | None] | None = None
        self._final: Path | None = None

    def save(self, engine, state: TrainState, extra: dict[str, object], tokenizer) -> float:
        """Save step `state.step`.

        Args:
            extra: what resume compares and reports (data fingerprint, run id), stored beside the counters.

        Returns:
            Seconds for which training stood still.

        Raises:
            UserError: on every rank, when rank 0 could not write this checkpoint or the one before.
        """
        start = time.perf_counter()
        self.wait()
        self._final = self.directory / f"step-{state.step:06d}"
        job = _prepare(self._final, engine, state, extra, tokenizer, self.keep)
        streams = {file: _tensors(engine, kinds) for file, kinds in FILES.items()}
        if self._thread is None:
            problem = job.write(streams) if distributed.rank() == 0 else None
            for stream in streams.values():  # the other ranks, and rank 0 after a failure: collectives are finished
                for _ in stream:
                    pass
            self._raise(problem)
        elif distributed.rank() == 0:
            held = {file: list(stream) for file, stream in streams.items()}
            self._running = self._thread.submit(job.write, held, time.perf_counter() - start)
        else:
            for stream in streams.values():
                for _ in stream:
                    pass
        return time.perf_counter() - start

    @property
    def has_failed(self) -> bool:
        """Whether a background write has ended in a problem, on rank 0; `wait` then raises it on every rank."""
        return self._running is not None and self._running.done() and self._running.result() is not None

    def wait(self) -> None:
        """Until the files are on disk.

        Raises:
            UserError: on every rank, when they could not be written.
        """
        running, self._running = self._running, None
        if self._thread is not None:
            self._raise(running.result() if running is not None else None)

    def close(self) -> None:
        """Wait for what is being written, whatever comes of it; no other rank is needed."""
        if self._thread is not None:
            self._thread.shutdown()

    def _raise(self, problem: str | None) -> None:
        """Rank 0's problem, on every rank."""
        problem = distributed.broadcast_object(problem)
        if problem is None:
            return
        steps = list(checkpoint_steps(self.directory))
        last = f"the last one, step {steps[-1]}, is untouched" if steps else "there is no earlier one"
        raise UserError(f"checkpoint {self._final} could not be written ({problem}); {last}. Mend that and run again")


Stream = Iterable[tuple[str, torch.Tensor]]  # name in the file, fp32 tensor on the CPU


@dataclass
class _Job:
    """All of a checkpoint but its tensors."""

    final: Path
    entries: dict[str, dict[str, tuple[int, ...]]]  # file -> name -> shape
    config: PretrainedConfig
    generation_config: GenerationConfig | None
    tokenizer: object
    state: TrainState
    trainer_state: dict[str, object]
    generators: list[dict[str, str]]
    keep: int

    def write(self, streams: Mapping[str, Stream], stall: float | None = None) -> str | None:
        """On rank 0: the folder, whole or not at all; then old ones are deleted. Returns what went wrong.

        Args:
            stall: seconds that training stood still for this, where it goes on meanwhile.
        """
        start = time.perf_counter()
        temporary = self.final.with_name(self.final.name + ".tmp")
        problem = _attempt(lambda: self._write(temporary, streams))
        if problem is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            return problem
        seconds = time.perf_counter() - start
        still = "" if stall is None else f", training stood still for {stall:.1f} s"
        say(f"saved {os.fspath(self.final)} ({describe_size(self.final)}, written in {seconds:.1f} s{still})")
        if problem := _attempt(lambda: prune(self.final.parent, self.keep, self.state)):
            warn(f"old checkpoints in {self.final.parent} could not be deleted: {problem}")
        return None

    def _write(self, temporary: Path, streams: Mapping[str, Stream]) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self.config.save_pretrained(temporary)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(temporary)
        save_tokenizer(self.tokenizer, temporary)
        write_json(temporary / COUNTERS, self.trainer_state)
        write_json(temporary / GENERATORS, {"ranks": self.generators})
        checksums = {}
        for file, stream in streams.items():
            with SafetensorsWriter(temporary / file, self.entries[file]) as writer:
                for name, tensor in stream:
                    writer.write(name, tensor)
            checksums[file] = writer.sha256
        list_files(temporary, {"format": FORMAT, "step": self.state.step}, checksums)
        if os.path.lexists(self.final):  # a damaged one of the same step, which was passed over at the start
            remove_directory(self.final)
        publish_directory(temporary, self.final)


def _prepare(final: Path, engine, state: TrainState, extra: dict, tokenizer, keep: int) -> _Job:
    # Generators first: what follows must not change what is stored.
    generators = distributed.gather_objects(capture_rng())
    wholes = list(whole_parameters(engine.module))
    buffers = {name: tuple(buffer.shape) for name, buffer in persistent_buffers(engine.module).items()}
    entries = {
        file: {_key(kind, w.name): tuple(w.shape) for kind in kinds for w in wholes if has_state(engine, w, kind)}
        for file, kinds in FILES.items()
    }
    entries[WEIGHTS] |= buffers
    scaler = loss_scale_state(engine)
    scale = {"loss_scale": scaler} if scaler else {}
    return _Job(
        final,
        entries,
        engine.module.config,
        engine.module.generation_config,
        tokenizer,
        replace(state),
        {"format": FORMAT, "state": state.as_dict(), **scale, **extra},
        generators,
        keep,
    )


def _tensors(engine, kinds: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Collective: every rank goes through it to the end."""
    for name, kind, tensor in read_full_state(engine, kinds):
        yield _key(kind, name), tensor
    if "weight" in kinds:
        for name, buffer in persistent_buffers(engine.module).items():
            yield name, buffer.detach().float().cpu().clone()


def _attempt(action) -> str | None:
    """What went wrong, as text: an OSError, or what the tokenizers library raises for one (a bare Exception)."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _key(kind: str, name: str) -> str:
    return name if kind == "weight" else f"{kind}.{name}"


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers a saved model carries: the balancing biases of routers."""
    saved = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


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
        UserError: another format, counters of another step or that are none.
    """
    values = read_json(path / COUNTERS)
    with _named(path / COUNTERS):
        if values.get("format") != FORMAT:
            raise UserError(f"{path}: format {values.get('format')!r}, this version reads {FORMAT!r}")
        try:
            state = TrainState.from_dict(values["state"])
        except UserError as error:
            raise UserError(f"{path / COUNTERS}: {error}") from error
        if state.step != int(path.name.removeprefix("step-")):
            raise ValueError(f"it holds step {state.step}")
        values["data"]  # noqa: B018
    return state, values


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """Where a file is read that its manifest agrees with: whatever is wrong in it is an error with its name."""
    try:
        yield
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{file} is damaged, though its manifest agrees with it ({what}); move {file.parent} away to go on from an "
            f"older checkpoint"
        ) from error


def load_weights(model: torch.nn.Module, path: Path, optimizer: str = "adamw") -> None:
    """Put a checkpoint's weights and buffers into a model that no engine holds yet.

    Args:
        optimizer: `optim.name` of the run, which says what moments there have to be.

    Raises:
        UserError: the names or shapes of weights or moments are not the model's (a checkpoint of another
            architecture), or they are no numbers.
    """
    parameters = {**dict(model.named_parameters()), **persistent_buffers(model)}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _check_tensors(path / WEIGHTS, parameters)
    moments = {_key(k, name): p for name, p in trained.items() for k in moments_of(optimizer, name, p.shape)}
    _check_tensors(path / OPTIMIZER, moments)
    with _named(path / WEIGHTS), safe_open(path / WEIGHTS, framework="pt") as file, torch.no_grad():
        for name, parameter in parameters.items():
            tensor = file.get_tensor(name)
            if not tensor.isfinite().all():
                raise UserError(
                    f"the weights of {path} are ruined: {name} holds what is no finite number; move that folder away "
                    f"to go on from an older one"
                )
            parameter.copy_(tensor)


def _check_tensors(path: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """Names, shapes and type of a file of a checkpoint."""
    with _named(path), safe_open(path, framework="pt") as file:
        names = set(file.keys())
        wrong = [n for n in names & set(expected) if file.get_slice(n).get_shape() != list(expected[n].shape)]
        if names != set(expected) or wrong:
            differs = sorted(names ^ set(expected)) + sorted(wrong)
            raise UserError(
                f"{path} holds another architecture: {len(differs)} tensors differ in name or shape, the first is "
                f"{differs[0]}; choose another run_name, or the model this run was started with"
            )
        for name in sorted(names):
            if (dtype := file.get_slice(name).get_dtype()) != "F32":
                raise ValueError(f"{name} is {dtype}, not F32")


def restore_training(engine, path: Path, seed: int) -> TrainState:
    """After the warm-up step: moments, fp32 weights, counters and generators of a checkpoint, at any topology.

    A rank that the checkpoint has no generator for (another number of ranks) is seeded from (seed, step, rank).
    """
    state, values = read_state(path)
    link_optimizer_states(engine)
    reset_optimizer_state(engine, state.step)
    with _named(path / OPTIMIZER), safe_open(path / OPTIMIZER, framework="pt") as file:

        def moment(name: str) -> torch.Tensor:
            tensor = file.get_tensor(name)
            if tensor.isnan().any():  # it would make weights of the same kind
                raise ValueError(f"{name} holds nan")
            return tensor

        for kind in MOMENTS:
            write_full_state(engine, kind, lambda name, kind=kind: moment(_key(kind, name)))
    # Exactly: DeepSpeed made its own fp32 weights from the rounded low-precision ones.
    with safe_open(path / WEIGHTS, framework="pt") as file:
        write_full_state(engine, "weight", file.get_tensor)
    if "loss_scale" in values:
        restore_loss_scale(engine, values["loss_scale"])
    set_counters(engine, state.step)
    with _named(path / GENERATORS):
        generators = read_json(path / GENERATORS)["ranks"]
        if not isinstance(generators, list) or not generators:
            raise ValueError("no list of ranks")
        if len(generators) == distributed.world_size():
            restore_rng(generators[distributed.rank()])
        else:
            seed_rank(seed, state.step)
    return state


def seed_rank(seed: int, step: int) -> None:
    """Generators for this rank at this step (dropout differs between ranks)."""
    seed_everything((seed * 1_000_003 + step * 10_007 + distributed.rank()) % 2**63)


def describe_size(path: Path) -> str:
    """Size of a checkpoint folder in MB, for the log."""
    return f"{sum(p.stat().st_size for p in path.iterdir() if p.is_file()) / 1e6:.0f} MB"
