"""The first minute of a start: another run's folder is refused, a step warms everything up, and the state is restored.

Contract: nothing in a run folder changes before it is known to be this run's. After `warm_up_and_restore` the engine is
as it was at the checkpoint, to the last bit, or as a new run begins.
"""

from __future__ import annotations

import time

import torch

from minillm.compat.deepspeed_api import set_counters
from minillm.data.loader import Batch
from minillm.run_folder import Checkpoint
from minillm.settings.resume import check_resumable
from minillm.settings.run import RunConfig
from minillm.training import checkpoint
from minillm.training.build import Data
from minillm.training.engine import warm_up
from minillm.training.recovery import warn_once
from minillm.training.state import TrainState
from minillm.training.step import NonFiniteError, move_to_device
from minillm.training.zero_state import write_full_state
from minillm.utils import distributed
from minillm.utils.errors import UserError
from minillm.utils.logging import say


def check_same_run(run: RunConfig, data: Data, source: Checkpoint | None) -> None:
    """Refuse a folder of another run, or of this run on other data.

    Args:
        source: the checkpoint that the run goes on from, None for a fresh start.

    Raises:
        UserError: what differs, with both values.
    """
    recorded = run.folder.recorded_settings()
    if source is None:
        return
    if recorded is None:
        warn_once(f"{run.folder.settings} is missing: nobody can tell whether the seed is the same")
    else:
        check_resumable(run, recorded)
    _, values = checkpoint.read_state(source)
    then, now = values["data"], data.fingerprint
    if "validation" not in then:  # of a version that did not record it
        now.pop("validation")
    if then == now:
        return
    if {**then, "validation": None} == {**now, "validation": None}:
        raise UserError(
            f"{source.path} was validated on other data ({then['validation']}, now {now['validation']}): its losses "
            f"and those to come could not be compared. Put the shards back to resume, or choose another run_name"
        )
    raise UserError(
        f"{source.path} was trained on other data: {then}, now {now}. Put the shards back to resume, or choose another "
        f"run_name"
    )


def check_ranks_agree(run: RunConfig, data: Data) -> None:
    """Refuse ranks that would start from different weights or with different micro-batches.

    Raises:
        UserError: on every rank, what each of them has.
    """
    bases = distributed.gather_objects(str(data.base))
    if len(set(bases)) > 1:
        raise UserError(f"model.init_from = {run.model.init_from}: the ranks see different folders, {bases}; name one")
    micro_batches = distributed.gather_objects(run.train.train_micro_batch_size_per_gpu)
    if len(set(micro_batches)) > 1:
        raise UserError(
            f"train.train_micro_batch_size_per_gpu = auto: the ranks' GPUs hold different numbers of sequences, "
            f"{micro_batches}; set it to {min(micro_batches)}"
        )


def warm_up_and_restore(
    engine, batch: Batch, run: RunConfig, data: Data, source: Checkpoint | None, exact: dict[str, torch.Tensor] | None
) -> TrainState:
    """One step at learning rate 0, then the checkpoint's state, or a clean one.

    Args:
        batch: the first of the stream.
        source: the checkpoint that the run goes on from, None for a fresh start.
        exact: fp32 weights that a fresh start begins with, None for random ones.
    """
    (tokens,) = distributed.reduce_sum([batch.num_target_tokens])
    start = time.perf_counter()
    batches = [move_to_device(b, engine.device) for b in batch.micro_batches]
    try:
        warm_up(engine, batches, max(1, int(tokens)))
    except NonFiniteError as error:
        fix = "move that folder away to go on from an older one" if source else "choose other weights"
        folder = source.path if source else data.base
        raise NonFiniteError(f"the weights of {folder} are ruined: {error}; {fix}") from error
    except RuntimeError as error:
        if "deterministic implementation" not in str(error):
            raise
        first = str(error).split(". ")[0]
        raise UserError(f"train.deterministic = true: {first}; set train.deterministic=false") from error
    say(f"warm-up step: {time.perf_counter() - start:.1f} s")
    if source is not None:
        state = checkpoint.restore_training(engine, source, run.seed)
        say(f"resumed from step {state.step} of {source.path}")
        return state
    checkpoint.reset_optimizer_state(engine, 0)
    if exact is not None:
        write_full_state(engine, "weight", exact.__getitem__)
    set_counters(engine, 0)
    checkpoint.seed_rank(run.seed, 0)
    say(f"fresh start in {run.run_dir}" + (f", weights from {data.base}" if data.base else ""))
    return TrainState()
