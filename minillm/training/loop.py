"""The training loop, for pretraining and fine-tuning alike.

Contract: set the stage, build, warm up, restore, then step until done; four `due` lines log, validate, sample and save.
Every number that outlives a step is in TrainState. A batch is a function of (seed, step), so resume is a jump.
"""

from __future__ import annotations

import contextlib
import os
import sys

import torch

from minillm.data.text_encoding import token_byte_lengths
from minillm.models import MiniLLMConfig
from minillm.run_folder import Checkpoint, check_content
from minillm.settings.accounting import flops_per_token
from minillm.settings.deepspeed_json import precision
from minillm.settings.resolve import Resolved
from minillm.settings.run import RunConfig, dump_run_config
from minillm.training import checkpoint
from minillm.training.build import (
    Data,
    build_loader,
    build_model,
    build_model_config,
    build_validation_loaders,
    load_initial_weights,
    open_data,
)
from minillm.training.engine import build_engine, check_precision, group_timeout, process_group, release_memory
from minillm.training.expert_load import balance_experts, experts_record, sparse_layers, summary
from minillm.training.metrics import Meter, last_line, peak_flops, progress_line, step_record
from minillm.training.optim import learning_rate_at
from minillm.training.recovery import Guard, Verdict, warn_once
from minillm.training.samples import sample
from minillm.training.signals import StopRequest
from minillm.training.start import check_ranks_agree, check_same_run, warm_up_and_restore
from minillm.training.step import move_to_device, take_step
from minillm.training.threads import ThreadCount, product_seconds
from minillm.training.trackers import NoTracker, Tracker
from minillm.training.validation import validate
from minillm.training.watch import HUNG, Watch
from minillm.utils import distributed
from minillm.utils.determinism import deterministic_kernels
from minillm.utils.errors import UserError
from minillm.utils.logging import say


def train(resolved: Resolved) -> int:
    """Train a run to its last step, or until a signal asks to stop.

    Data is opened (compiled, downloaded) before the process group exists, so that no collective waits for it.

    Returns:
        The exit code: 0, or 128 + the signal's number.

    Raises:
        UserError: before data is opened, a precision or a number of ranks that the devices are not made for.
    """
    check_precision(precision(resolved.deepspeed), distributed.check_device())
    stop = StopRequest(launched="RANK" in os.environ)
    try:
        data = open_data(resolved)
        with process_group(group_timeout(resolved.run.faults.timeout)):
            return train_in_group(resolved, data, stop)
    finally:
        stop.restore()


def train_in_group(resolved: Resolved, data: Data, stop: StopRequest) -> int:
    """`train` where the ranks are already connected."""
    run = resolved.run
    check_ranks_agree(run, data)
    config = build_model_config(resolved, data)
    with (
        deterministic_kernels(run.train.deterministic),
        contextlib.ExitStack() as held,
        contextlib.closing(Watch(run.faults.timeout)) as watch,
    ):
        distributed.on_rank_zero(lambda: held.enter_context(run.folder.only_writer()))
        while True:
            trainer = Trainer(run, data, watch)
            if trainer.is_complete():
                return 0
            try:
                trainer.build(resolved.deepspeed, config)
                code = trainer.run_to_end(stop)
            except BaseException as error:
                lost = None if isinstance(error, UserError) else watch.explain()
                trainer.close(exit_code=1)
                if lost is not None:
                    print(f"error (rank {distributed.rank()}): {lost}", file=sys.stderr, flush=True)
                    raise SystemExit(HUNG) from error
                raise
            trainer.close(code or 0)
            if code is not None:
                return code
            trainer.engine.destroy()
            del trainer
            release_memory()


class Trainer:
    """What one start of a run holds."""

    def __init__(self, run: RunConfig, data: Data, watch: Watch):
        self.run, self.data, self.watch = run, data, watch
        self.watch.at("opening checkpoint and data")
        found = distributed.on_rank_zero(lambda: run.folder.newest_to_resume(check="content"))
        self.source: Checkpoint | None = distributed.broadcast_object(found)
        check_same_run(run, data, self.source)
        self.loader = build_loader(run, data.train, num_epochs=run.train.num_epochs)
        self.validation = build_validation_loaders(run, data.validation)
        self.max_steps = run.train.max_steps or self.loader.num_steps
        keep, asynchronous = run.checkpoint.keep, run.checkpoint.asynchronous
        self.writer = checkpoint.CheckpointWriter(run.folder, keep, asynchronous)
        self.guard = Guard(run, self.loader, self.writer)
        self.stall: float | None = None  # of the last save, until it is logged
        self.token_bytes = torch.from_numpy(token_byte_lengths(data.tokenizer))
        self.tracker: Tracker | NoTracker = NoTracker()

    def is_complete(self) -> bool:
        """True, and a line that says so, when the newest checkpoint is already at the last step."""
        if self.source is None or checkpoint.read_state(self.source)[0].step < self.max_steps:
            return False
        say(f"{self.run.run_dir} is complete: {self.source.path} is its last step; raise train.max_steps to go on")
        return True

    def build(self, deepspeed_config: dict, config: MiniLLMConfig) -> None:
        """Everything that takes memory, after everything that can be refused."""
        run = self.run
        self.watch.at("building the model")
        distributed.on_rank_zero(
            lambda: run.folder.write_settings(
                dump_run_config(run), deepspeed_config, config.to_diff_dict(), distributed.world_size()
            )
        )
        model = build_model(run, config)
        exact = None
        if self.source is not None:
            checkpoint.load_weights(model, self.source, run.optim.name)
        elif (base := self.data.base) is not None:
            distributed.on_rank_zero(lambda: check_content(base))
            exact = load_initial_weights(model, base)
        self.engine = build_engine(model, run, deepspeed_config)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision(deepspeed_config), torch.float32)
        peak, origin = peak_flops(dtype)
        say(f"peak for MFU: {peak / 1e12:.3g} TFLOP/s ({origin}), {distributed.world_size()} rank(s)")
        self.meter = Meter(flops_per_token(config.architecture, run.data.seq_len), peak, self.max_steps)
        self.watch.at("the warm-up step")
        first = self.loader.batch_at(0)
        self.state = warm_up_and_restore(self.engine, first, run, self.data, self.source, exact)
        rows = run.train.train_micro_batch_size_per_gpu * run.data.seq_len
        work = product_seconds(rows, config.hidden_size, config.intermediate_size, dtype)
        self.threads = ThreadCount(run.folder, self.state.step, work)
        self.guard.saved_step = self.state.step if self.source is not None else None
        self.tracker = distributed.on_rank_zero(lambda: Tracker(run, self.state.step)) or self.tracker
        source, ranks = str(self.source.path) if self.source is not None else "", distributed.world_size()
        self.guard.event("started", step=self.state.step, checkpoint=source, ranks=ranks)

    def run_to_end(self, stop: StopRequest) -> int | None:
        """The loop. Returns the exit code; None where the run has to go on from its last checkpoint."""
        state, run = self.state, self.run
        if state.step == 0 and self.validation:
            self.validate()
        while state.step < self.max_steps:
            if signal := self.begin_step(stop):
                return self.leave_early(signal)
            verdict = self.step()
            if verdict is Verdict.ROLL_BACK:
                return None
            if verdict is Verdict.LEAVE_OUT:
                continue
            if due(state.step, run.log.every, self.max_steps) or due(state.step, run.validation.every, self.max_steps):
                self.log(validated=due(state.step, run.validation.every, self.max_steps))
            if run.samples.every and due(state.step, run.samples.every, self.max_steps):
                self.sample()
            if due(state.step, run.checkpoint.every, self.max_steps):
                self.save()
        self.conclude()
        return 0

    def begin_step(self, stop: StopRequest) -> int:
        """Load the next batch; agree on its tokens, on unreadable rows, on signals and a failed checkpoint."""
        step = self.state.step
        self.meter.start_step()
        self.watch.at(f"step {step + 1}, loading its batch")
        self.batch = batch = self.loader.batch_at(self.guard.skipped.batch_of(step))
        doubt = self.threads.doubt(step, self.meter.recent_seconds)
        # One collective: on a GPU the loop waits for each.
        targets, tokens, bad, signals, failed, doubted = distributed.gather_numbers(
            [batch.num_target_tokens, batch.num_tokens, batch.num_bad_rows, stop.number, self.writer.has_failed, doubt]
        )
        self.threads.begin_step(step, any(doubted))
        if any(failed):
            self.writer.wait()
        self.num_targets, self.num_tokens, self.num_bad_rows = int(sum(targets)), int(sum(tokens)), int(sum(bad))
        if (total := self.state.bad_rows + self.num_bad_rows) > self.run.data.max_bad_samples:
            raise UserError(
                f"step {step + 1}: {total} unreadable sequences so far, data.max_bad_samples = "
                f"{self.run.data.max_bad_samples}; the warnings name the shards. Repair them "
                f"(python -m data_tools.shards verify), or raise the limit"
            )
        return int(max(signals))

    def step(self) -> Verdict:
        """Take the step, and count it where it stands."""
        state, run = self.state, self.run
        self.watch.at(f"step {state.step + 1}")
        self.lr = learning_rate_at(state.step, self.max_steps, run.optim)
        batches = [move_to_device(b, self.engine.device) for b in self.batch.micro_batches]
        self.guard.begin_step(state.recent_losses)
        result = take_step(self.engine, batches, max(1, self.num_targets), self.lr, self.guard)
        verdict = self.guard.decide(result, state.step + 1)
        if verdict is not Verdict.KEEP:
            return verdict
        self.result = result
        state.record_loss(result.loss, run.faults.spike_window)
        if result.routing is not None:
            counts, every = result.routing["counts"], run.log.idle_expert_steps
            idle, warning = balance_experts(self.engine.module, counts, state.expert_idle_steps, every)
            state.expert_idle_steps = idle
            if warning is not None:
                warn_once(f"step {state.step + 1}: {warning}")
        state.step += 1
        state.tokens += self.num_targets
        state.bad_rows += self.num_bad_rows
        state.train_seconds += self.meter.end_step(self.num_targets, self.num_tokens)
        return verdict

    def log(self, validated: bool) -> None:
        """One record a step: training, and validation where it is due."""
        state, experts = self.state, None
        record = step_record(self.result, self.lr, state, self.meter)
        if self.result.routing is not None:
            experts = experts_record(self.result.routing, sparse_layers(self.engine.module.config))
            record |= summary(experts)
        if self.stall is not None:
            record["checkpoint_stall_s"], self.stall = round(self.stall, 3), None
        if self.meter.line_is_due(state.step) or validated:
            say(progress_line(record, state, self.meter))
        if validated and self.validation:
            record |= self.validate()
        self.tracker.log(state.step, record, experts)

    def validate(self) -> dict[str, float]:
        allowed = self.run.data.max_bad_samples
        record = validate(self.engine, self.validation, self.token_bytes, allowed, self.state.step, self.watch.at)
        self.state.record_validation(record["val_loss"])
        return record

    def sample(self) -> None:
        self.watch.at(f"samples after step {self.state.step}")
        texts = sample(self.engine, self.data.tokenizer, self.run.samples, chat=self.run.stage == "sft")
        self.tracker.sample(self.state.step, texts)

    def save(self) -> None:
        self.watch.at(f"saving step {self.state.step}")
        self.state.note_checkpoint()
        self.stall = self.writer.save(self.engine, self.state, {"data": self.data.fingerprint}, self.data.tokenizer)
        self.guard.saved_step = self.state.step

    def leave_early(self, signal: int) -> int:
        """Save and go: the step in flight is done."""
        if self.guard.saved_step != self.state.step and self.state.step:
            self.save()
        self.writer.wait()
        self.guard.event("stopped", step=self.state.step, signal=signal)
        say(f"stopped by signal {signal} after step {self.state.step}; the same command resumes")
        self.draw()  # last: whoever sent the signal may not wait for it
        return 128 + signal

    def conclude(self) -> None:
        """The last line of the log, and the pictures of the run."""
        self.watch.at("concluding")
        self.writer.wait()
        self.guard.event("finished", step=self.state.step)
        self.draw()
        say(f"done: {last_line(self.state)}; run folder {self.run.run_dir}")

    def draw(self) -> None:
        """The pictures of the run, on the rank that draws: importing matplotlib takes time."""
        if distributed.rank() == 0:
            from minillm.training import plots

            plots.draw(self.run.folder, self.state.first_val_loss)

    def close(self, exit_code: int) -> None:
        self.writer.close()
        for loader in (self.loader, *self.validation.values()):
            loader.close()
        self.tracker.close(exit_code)


def due(step: int, every: int, max_steps: int) -> bool:
    """Every `every` steps (0: never), and at the last one."""
    return step == max_steps or (every > 0 and step % every == 0)
