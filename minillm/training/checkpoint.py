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
from transformers import PreTrainedModel

from minillm.compat.deepspeed_api import link_optimizer_states, set_counters
from minillm.data.tokenizer import save_tokenizer
from minillm.run_folder import COUNTERS, GENERATORS, OPTIMIZER, WEIGHTS, Checkpoint, RunFolder
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
from minillm.utils.files import publish_directory, read_json, remove_directory, write_json, write_manifest
from minillm.utils.logging import say, warn
from minillm.utils.seeding import capture_rng, restore_rng, seed_everything

FORMAT = "minillm-checkpoint-1"
FILES = {WEIGHTS: ("weight",), OPTIMIZER: MOMENTS}


Stream = Iterable[tuple[str, torch.Tensor]]  # name in the file, fp32 tensor on the CPU


class CheckpointWriter:
    """Saves steps of a run: at once, or on a thread of rank 0 while training goes on.

    Every method is called by every rank. At most one checkpoint is being written at a time. A failed write (disk full,
    read-only folder) leaves earlier checkpoints as they were.

    Args:
        keep: the newest so many stay, and the best by val_loss besides.
        asynchronous: copy weights and moments to host memory (rank 0, 12 bytes a parameter), write in the background.
    """

    def __init__(self, folder: RunFolder, keep: int, asynchronous: bool):
        self.folder, self.keep = folder, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="minillm-checkpoint") if asynchronous else None
        self._running: Future[str | None] | None = None
        self._final: Checkpoint | None = None

    def save(self, engine, state: TrainState, extra: dict[str, object], tokenizer) -> float:
        """Save step `state.step`.

        Args:
            extra: what resume compares (the data's fingerprint), stored beside the counters.

        Returns:
            Seconds for which training stood still.

        Raises:
            UserError: on every rank, when rank 0 could not write this checkpoint or the one before.
        """
        start = time.perf_counter()
        self.wait()
        self._final = self.folder.checkpoint(state.step)
        contents = _contents(engine, state, extra, tokenizer)
        streams = {file: _tensors(engine, kinds) for file, kinds in FILES.items()}
        if self._thread is None:
            problem = self._write(self._final, contents, streams) if distributed.rank() == 0 else None
            for stream in streams.values():  # the other ranks, and rank 0 after a failure: collectives are finished
                for _ in stream:
                    pass
            self.agree(problem)
        elif distributed.rank() == 0:
            held = {file: list(stream) for file, stream in streams.items()}
            stall = time.perf_counter() - start
            self._running = self._thread.submit(self._write, self._final, contents, held, stall)
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
            self.agree(running.result() if running is not None else None)

    def close(self) -> None:
        """Wait for what is being written, whatever comes of it; no other rank is needed."""
        if self._thread is not None:
            self._thread.shutdown()

    def agree(self, problem: str | None) -> None:
        """Raise rank 0's problem, if there is one, on every rank."""
        problem = distributed.broadcast_object(problem)
        if problem is None:
            return
        found = self.folder.checkpoints()
        last = f"the last one, step {found[0].step}, is untouched" if found else "there is no earlier one"
        name = self._final.path if self._final is not None else "?"
        raise UserError(f"checkpoint {name} could not be written ({problem}); {last}. Mend that and run again")

    def _write(
        self, final: Checkpoint, contents: Contents, streams: Mapping[str, Stream], stall: float | None = None
    ) -> str | None:
        """On rank 0: the folder, whole or not at all; then old ones are deleted. Returns what went wrong.

        Args:
            stall: seconds that training stood still for this, where it goes on meanwhile.
        """
        start = time.perf_counter()
        temporary = final.path.with_name(final.path.name + ".tmp")
        problem = _attempt(lambda: write_folder(temporary, final, contents, streams))
        if problem is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            return problem
        seconds = time.perf_counter() - start
        still = "" if stall is None else f", training stood still for {stall:.1f} s"
        say(f"saved {os.fspath(final.path)} ({describe_size(final.path)}, written in {seconds:.1f} s{still})")
        if problem := _attempt(lambda: prune(self.folder, self.keep, contents.state)):
            warn(f"old checkpoints in {self.folder.checkpoints_folder} could not be deleted: {problem}")
        return None


@dataclass
class Contents:
    """All of a checkpoint but its tensors; nothing in it changes while training goes on."""

    model: PreTrainedModel  # for its config and generation config
    tokenizer: object
    state: TrainState
    counters: dict[str, object]  # trainer_state.json
    generators: list[dict[str, str]]  # of every rank
    shapes: dict[str, dict[str, tuple[int, ...]]]  # file -> name of a tensor -> shape


def _contents(engine, state: TrainState, extra: dict[str, object], tokenizer) -> Contents:
    """Collective: every rank calls it. Generators come first: what follows must not change what is stored."""
    generators = distributed.gather_objects(capture_rng())
    wholes = list(whole_parameters(engine.module))
    shapes = {
        file: {_key(kind, w.name): tuple(w.shape) for kind in kinds for w in wholes if has_state(engine, w, kind)}
        for file, kinds in FILES.items()
    }
    shapes[WEIGHTS] |= {name: tuple(buffer.shape) for name, buffer in persistent_buffers(engine.module).items()}
    scaler = loss_scale_state(engine)
    counters = {"format": FORMAT, "state": state.as_dict(), **({"loss_scale": scaler} if scaler else {}), **extra}
    return Contents(engine.module, tokenizer, replace(state), counters, generators, shapes)


def write_folder(temporary: Path, final: Checkpoint, contents: Contents, streams: Mapping[str, Stream]) -> None:
    """Write everything into `temporary`, list it with checksums, sync it and give it its name."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    contents.model.config.save_pretrained(temporary)
    if contents.model.generation_config is not None:
        contents.model.generation_config.save_pretrained(temporary)
    save_tokenizer(contents.tokenizer, temporary)
    write_json(temporary / COUNTERS, contents.counters)
    write_json(temporary / GENERATORS, {"ranks": contents.generators})
    checksums = {}
    for file, stream in streams.items():
        with SafetensorsWriter(temporary / file, contents.shapes[file]) as writer:
            for name, tensor in stream:
                writer.write(name, tensor)
        checksums[file] = writer.sha256
    write_manifest(temporary, {"format": FORMAT, "step": final.step}, checksums)
    if os.path.lexists(final.path):  # a damaged one of the same step, which was passed over at the start
        remove_directory(final.path)
    publish_directory(temporary, final.path)


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


def prune(folder: RunFolder, keep: int, state: TrainState) -> None:
    """Delete all but the newest `keep` up to this step and the best; leftovers of killed writers go too.

    What is newer than this step was damaged and passed over at the start.
    """
    found = folder.checkpoints()
    kept = [one.step for one in found if one.step <= state.step][:keep]
    for checkpoint in reversed(found):
        if checkpoint.step not in (*kept, state.best_step):
            remove_directory(checkpoint.path)
    for leftover in folder.leftovers():
        shutil.rmtree(leftover, ignore_errors=True)


def read_state(checkpoint: Checkpoint) -> tuple[TrainState, dict]:
    """Counters and the rest of trainer_state.json, the data's fingerprint among it.

    Raises:
        UserError: another format, counters of another step, or something that is not counters.
    """
    path = checkpoint.counters
    values = read_json(path)
    with _named(path):
        if values.get("format") != FORMAT:
            raise UserError(f"{checkpoint.path}: format {values.get('format')!r}, this version reads {FORMAT!r}")
        try:
            state = TrainState.from_dict(values["state"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if state.step != checkpoint.step:
            raise ValueError(f"it holds step {state.step}")
        if "data" not in values:
            raise KeyError("data")
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


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint, optimizer: str = "adamw") -> None:
    """Put a checkpoint's weights and buffers into a model that no engine holds yet.

    Args:
        optimizer: `optim.name` of the run, which says what moments there have to be.

    Raises:
        UserError: the names or shapes of weights or moments are not the model's (a checkpoint of another
            architecture), or they are not numbers.
    """
    parameters = {**dict(model.named_parameters()), **persistent_buffers(model)}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _check_tensors(checkpoint.weights, parameters)
    moments = {_key(k, name): p for name, p in trained.items() for k in moments_of(optimizer, name, p.shape)}
    _check_tensors(checkpoint.optimizer, moments)
    path = checkpoint.weights
    with _named(path), safe_open(path, framework="pt") as file, torch.no_grad():
        for name, parameter in parameters.items():
            tensor = file.get_tensor(name)
            if not tensor.isfinite().all():
                raise UserError(
                    f"the weights of {checkpoint.path} are ruined: {name} holds what is not a finite number; move that "
                    f"folder away to go on from an older one"
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


def restore_training(engine, checkpoint: Checkpoint, seed: int) -> TrainState:
    """After the warm-up step: moments, fp32 weights, counters and generators of a checkpoint, at any topology.

    A rank that the checkpoint has no generator for (another number of ranks) is seeded from (seed, step, rank).
    """
    state, values = read_state(checkpoint)
    link_optimizer_states(engine)
    reset_optimizer_state(engine, state.step)
    with _named(checkpoint.optimizer), safe_open(checkpoint.optimizer, framework="pt") as file:

        def moment(name: str) -> torch.Tensor:
            tensor = file.get_tensor(name)
            if tensor.isnan().any():  # it would make weights of the same kind
                raise ValueError(f"{name} holds nan")
            return tensor

        for kind in MOMENTS:
            write_full_state(engine, kind, lambda name, kind=kind: moment(_key(kind, name)))
    # Exactly: DeepSpeed made its own fp32 weights from the rounded low-precision ones.
    with safe_open(checkpoint.weights, framework="pt") as file:
        write_full_state(engine, "weight", file.get_tensor)
    if "loss_scale" in values:
        restore_loss_scale(engine, values["loss_scale"])
    set_counters(engine, state.step)
    with _named(checkpoint.generators):
        generators = read_json(checkpoint.generators)["ranks"]
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
