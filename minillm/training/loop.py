"""The training loop, for pretraining and fine-tuning alike.

Contract: set the stage, build, warm up, restore, then step until done; four `due` lines log, validate, sample and save.
Every number that outlives a step is in TrainState. A batch is a function of (seed, step), so resume is a jump.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from pathlib import Path

import torch

from minillm import run_folder
from minillm.compat.deepspeed_api import set_counters
from minillm.data.tokenizer import token_byte_lengths
from minillm.models import MiniLLMConfig
from minillm.settings.accounting import flops_per_token
from minillm.settings.deepspeed_json import precision
from minillm.settings.resolve import Resolved
from minillm.settings.resume import check_resumable
from minillm.settings.run import RunConfig, dump_run_config
from minillm.training import checkpoint
from minillm.training.build import (
    Data,
    build_loader,
    build_model,
    build_model_config,
    build_validation_loaders,
    copy_parameters,
    load_initial_weights,
    open_data,
)
from minillm.training.engine import (
    NonFiniteError,
    RejectedLossError,
    build_engine,
    move_to_device,
    process_group,
    run_step,
)
from minillm.training.engine import warm_up as warm_up_engine
from minillm.training.expert_load import (
    count_idle_steps,
    experts_record,
    idle_warning,
    sparse_layers,
    summary,
    update_router_biases,
)
from minillm.training.metrics import Meter, format_seconds, peak_flops, progress_line
from minillm.training.optim import learning_rate_at
from minillm.training.recovery import RollBack, SkippedBatches, record_event, spike_threshold
from minillm.training.signals import StopRequest
from minillm.training.state import TrainState
from minillm.training.threads import ThreadCount, product_seconds
from minillm.training.trackers import NoTracker, Tracker
from minillm.training.validation import sample, validate
from minillm.training.watch import HUNG, Watch
from minillm.training.zero_state import write_full_state
from minillm.utils import distributed
from minillm.utils.determinism import deterministic_kernels
from minillm.utils.errors import UserError
from minillm.utils.logging import say, warn
from minillm.utils.seeding import capture_rng, restore_rng


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
        with process_group():
            return train_in_group(resolved, data, stop)
    finally:
        stop.restore()


def check_precision(name: str, device: torch.device) -> None:
    """Refuse what would not run, or only in emulation.

    Args:
        name: bf16, fp16 or fp32.
    """
    if name == "fp16" and device.type == "cpu":
        raise UserError("fp16 needs a GPU, and this machine has none: use a bf16 JSON, such as ds_configs/zero2.json")
    if name == "bf16" and device.type == "cuda":
        torch.cuda.set_device(device)  # the question below is about the current one
        # PyTorch and DeepSpeed count emulation as support: no tensor cores, no fused attention, several times slower.
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(
                f"bf16: {torch.cuda.get_device_name(device)} has no bf16 arithmetic (cards from Ampere on have); use "
                f"--deepspeed ds_configs/zero2_fp16.json"
            )


def train_in_group(resolved: Resolved, data: Data, stop: StopRequest) -> int:
    """`train` where the ranks are already connected."""
    run = resolved.run
    bases = distributed.gather_objects(str(data.base))
    if len(set(bases)) > 1:
        raise UserError(f"model.init_from = {run.model.init_from}: the ranks see different folders, {bases}; name one")
    micro_batches = distributed.gather_objects(run.train.train_micro_batch_size_per_gpu)
    if len(set(micro_batches)) > 1:
        raise UserError(
            f"train.train_micro_batch_size_per_gpu = auto: the ranks' GPUs hold different numbers of sequences, "
            f"{micro_batches}; set it to {min(micro_batches)}"
        )
    config = build_model_config(resolved, data)
    with (
        deterministic_kernels(run.train.deterministic),
        contextlib.ExitStack() as held,
        contextlib.closing(Watch(run.faults.timeout)) as watch,
    ):
        distributed.on_rank_zero(lambda: held.enter_context(run_folder.only_writer(run.run_dir)) and None)
        while True:
            trainer = Trainer(run, data, watch)
            if trainer.is_complete():
                return 0
            try:
                trainer.build(resolved.deepspeed, config)
                code = trainer.run_to_end(stop)
            except RollBack:
                trainer.close(0)
                trainer.engine.destroy()
                code = None
            except BaseException as error:
                lost = None if isinstance(error, UserError) else watch.explain()
                trainer.close(exit_code=1)
                if lost is not None:
                    print(f"error (rank {distributed.rank()}): {lost}", file=sys.stderr, flush=True)
                    raise SystemExit(HUNG) from error
                raise
            if code is not None:
                trainer.close(code)
                return code
            del trainer  # here, as the frames of the error held it too
            release_memory()


def release_memory() -> None:
    """Give back what an engine held that nobody needs any more.

    DeepSpeed's objects refer to each other in circles, and the next engine may not fit beside its buffers.
    """
    gc.collect()
    torch.cuda.empty_cache()  # nothing where CUDA has not been used


class Trainer:
    """What one start of a run holds."""

    def __init__(self, run: RunConfig, data: Data, watch: Watch):
        self.config, self.data, self.watch = run, data, watch
        self.watch.at("opening checkpoint and data")
        self.checkpoints = run.run_dir / "checkpoints"
        self.source: Path | None = distributed.on_rank_zero(lambda: checkpoint.newest_to_resume(run.run_dir))
        self.source = distributed.broadcast_object(self.source)
        self.check_same_run()
        self.loader = build_loader(run, data.train, num_epochs=run.train.num_epochs)
        self.validation = build_validation_loaders(run, data.validation)
        self.max_steps = run.train.max_steps or self.loader.num_steps
        self.skipped = SkippedBatches(run.run_dir)
        self.loader.extend(self.skipped.num_batches)
        keep, asynchronous = run.checkpoint.keep, run.checkpoint.asynchronous
        self.writer = checkpoint.CheckpointWriter(self.checkpoints, keep, asynchronous)
        self.stall: float | None = None  # of the last save, until it is logged
        self.token_bytes = torch.from_numpy(token_byte_lengths(data.tokenizer))
        self.tracker: Tracker | NoTracker = NoTracker()

    def check_same_run(self) -> None:
        """Refuse a folder of another run before anything in it is touched."""
        recorded = run_folder.recorded_run(self.config.run_dir)
        if self.source is None:
            return
        if recorded is None:
            self.warn(f"{self.config.run_dir / 'run.yaml'} is missing: nobody can tell whether the seed is the same")
        else:
            check_resumable(self.config, recorded)
        _, values = checkpoint.read_state(self.source)
        if values["data"] != self.data.fingerprint:
            raise UserError(
                f"{self.source} was trained on other data: {values['data']}, now {self.data.fingerprint}. "
                f"Put the shards back to resume, or choose another run_name"
            )

    def is_complete(self) -> bool:
        """True, and a line that says so, when the newest checkpoint is already at the last step."""
        if self.source is None or checkpoint.read_state(self.source)[0].step < self.max_steps:
            return False
        say(f"{self.config.run_dir} is complete: {self.source} is its last step; raise train.max_steps to go on")
        return True

    def build(self, deepspeed_config: dict, config: MiniLLMConfig) -> None:
        """Everything that takes memory, after everything that can be refused."""
        run = self.config
        self.watch.at("building the model")
        distributed.on_rank_zero(
            lambda: run_folder.write_settings(
                run.run_dir, dump_run_config(run), deepspeed_config, config.to_diff_dict(), distributed.world_size()
            )
        )
        model = build_model(run, config)
        exact = None
        if self.source is not None:
            checkpoint.load_weights(model, self.source, run.optim.name)
        elif self.data.base is not None:
            load_initial_weights(model, self.data.base)
            exact = copy_parameters(model)
        if "sparse" in config.mlp_layer_types:
            own = config.num_experts // run.model.expert_parallel_size
            say(f"experts: {run.model.moe_backend}, {own} of {config.num_experts} of each layer on a rank")
        self.engine = build_engine(model, run, deepspeed_config)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision(deepspeed_config), torch.float32)
        peak, origin = peak_flops(dtype)
        say(f"peak for MFU: {peak / 1e12:.3g} TFLOP/s ({origin}), {distributed.world_size()} rank(s)")
        self.meter = Meter(flops_per_token(config.architecture, run.data.seq_len), peak, self.max_steps)
        self.state = self.warm_up_and_restore(exact)
        rows = run.train.train_micro_batch_size_per_gpu * run.data.seq_len
        work = product_seconds(rows, config.hidden_size, config.intermediate_size, dtype)
        self.threads = ThreadCount(run.run_dir, self.state.step, work)
        self.saved_step = self.state.step if self.source is not None else None
        self.tracker = distributed.on_rank_zero(lambda: Tracker(run, self.state.step)) or self.tracker
        self.event("started", step=self.state.step, checkpoint=str(self.source or ""), ranks=distributed.world_size())

    def warm_up_and_restore(self, exact_weights: dict[str, torch.Tensor] | None) -> TrainState:
        """One step at learning rate 0, then the checkpoint's state, or a clean one."""
        batch = self.loader.batch_at(0)
        (tokens,) = distributed.reduce_sum([batch.num_target_tokens])
        start = time.perf_counter()
        self.watch.at("the warm-up step")
        batches = [move_to_device(b, self.engine.device) for b in batch.micro_batches]
        try:
            warm_up_engine(self.engine, batches, max(1, int(tokens)))
        except NonFiniteError as error:
            fix = "move that folder away to go on from an older one" if self.source else "choose other weights"
            folder = self.source or self.data.base
            raise NonFiniteError(f"the weights of {folder} are ruined: {error}; {fix}") from error
        except RuntimeError as error:
            if "deterministic implementation" not in str(error):
                raise
            first = str(error).split(". ")[0]
            raise UserError(f"train.deterministic = true: {first}; set train.deterministic=false") from error
        say(f"warm-up step: {time.perf_counter() - start:.1f} s")
        if self.source is not None:
            state = checkpoint.restore_training(self.engine, self.source, self.config.seed)
            say(f"resumed from step {state.step} of {self.source}")
            return state
        checkpoint.reset_optimizer_state(self.engine, 0)
        if exact_weights is not None:
            write_full_state(self.engine, "weight", exact_weights.__getitem__)
        set_counters(self.engine, 0)
        checkpoint.seed_rank(self.config.seed, 0)
        say(f"fresh start in {self.config.run_dir}" + (f", weights from {self.data.base}" if self.data.base else ""))
        return TrainState()

    def run_to_end(self, stop: StopRequest) -> int:
        """The loop. Returns the exit code."""
        state, run = self.state, self.config
        if state.step == 0 and self.validation:
            self.validate()
        while state.step < self.max_steps:
            if signal := self.begin_step(stop):
                return self.leave_early(signal)
            if not self.step():
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
        """Load the next batch; agree on its target tokens, on unreadable rows, on signals and a failed checkpoint."""
        self.meter.start_step()
        self.watch.at(f"step {self.state.step + 1}, loading its batch")
        self.batch = self.loader.batch_at(self.skipped.batch_of(self.state.step))
        doubt = self.threads.doubt(self.state.step, self.meter.recent_seconds)
        # One collective: on a GPU the loop waits for each.
        tokens, bad, signals, failed, doubted = distributed.gather_numbers(
            [self.batch.num_target_tokens, self.batch.num_bad_rows, stop.number, self.writer.has_failed, doubt]
        )
        self.threads.begin_step(self.state.step, any(doubted))
        if any(failed):
            self.writer.wait()
        self.num_target_tokens = int(sum(tokens))
        self.state.bad_rows += int(sum(bad))
        if self.state.bad_rows > self.config.data.max_bad_samples:
            raise UserError(
                f"step {self.state.step + 1}: {self.state.bad_rows} unreadable sequences so far, "
                f"data.max_bad_samples = {self.config.data.max_bad_samples}; the warnings name the shards. Repair them "
                f"(python -m data_tools.shards verify), or raise the limit"
            )
        return int(max(signals))

    def step(self) -> bool:
        """Forward, backward and update over the global batch; False where it was left out."""
        state, faults = self.state, self.config.faults
        self.watch.at(f"step {state.step + 1}")
        self.lr = learning_rate_at(state.step, self.max_steps, self.config.optim)
        batches = [move_to_device(b, self.engine.device) for b in self.batch.micro_batches]
        limit = spike_threshold(state.recent_losses, faults.spike_window, faults.spike_deviations)
        # Only a skipped update has to be judged before it; the question costs a wait.
        accept = (lambda loss: limit is None or loss <= limit) if faults.on_loss_spike == "skip" else None
        if accept is None and faults.on_non_finite == "skip":
            accept = lambda loss: True  # noqa: E731
        generators = capture_rng() if accept is not None else None
        try:
            self.result = run_step(
                self.engine, batches, max(1, self.num_target_tokens), self.lr, accept=accept
            )
        except NonFiniteError as error:
            if generators is not None:  # a start that knows of this batch does not draw for it
                restore_rng(generators)
            return self.recover("non_finite", str(error), faults.on_non_finite)
        except RejectedLossError as error:
            restore_rng(generators)
            return self.recover("loss_spike", f"{error}, above {limit:.4f}", "skip", loss=error.loss, limit=limit)
        if limit is not None and self.result.loss > limit and faults.on_loss_spike != "ignore":
            found = {"loss": self.result.loss, "limit": limit}
            if not self.recover("loss_spike", f"the loss is {found['loss']:.4f}, above {limit:.4f}",
                                faults.on_loss_spike, **found):  # fmt: skip
                return False
        state.record_loss(self.result.loss, faults.spike_window)
        if self.result.routing is not None:
            self.balance_experts(self.result.routing["counts"])
        state.step += 1
        state.tokens += self.num_target_tokens
        state.train_seconds += self.meter.end_step(self.num_target_tokens)
        return True

    def recover(self, event: str, problem: str, policy: str, **details: float) -> bool:
        """What the policy says of a step whose loss or gradient is bad; True where training goes on as if it were not.

        Raises:
            NonFiniteError, UserError: the run stops here, with its last checkpoint.
            RollBack: it goes on from there, past the batches since.
        """
        step, batch = self.state.step + 1, self.skipped.batch_of(self.state.step)
        self.event(event, step=step, batch=batch, problem=problem, policy=policy, **details,
                   documents=self.loader.places_of(batch))  # fmt: skip
        if policy == "log":
            self.warn(f"step {step}: {problem}; see events.jsonl")
            return True
        last = "none" if self.saved_step is None else f"step {self.saved_step}"
        if policy == "stop":
            kind = NonFiniteError if event == "non_finite" else UserError
            raise kind(
                f"step {step}: {problem}. Nothing was updated; the last checkpoint is {last}. Lower "
                f"optim.learning_rate or optim.gradient_clipping, or set faults.on_{event}"
            )
        if self.skipped.occasions >= self.config.faults.max_recoveries:
            raise UserError(
                f"step {step}: {problem}, for the {self.skipped.occasions + 1}. time; faults.max_recoveries = "
                f"{self.config.faults.max_recoveries}. The last checkpoint is {last}"
            )
        if policy == "skip":
            self.skipped.add(batch, batch)
            self.loader.extend(1)
            self.warn(f"step {step}: {problem}; batch {batch} is left out")
            return False
        self.writer.wait()
        first = self.skipped.batch_of(self.saved_step or 0)
        self.skipped.add(first, batch)
        self.warn(f"step {step}: {problem}; back to {last}, past batches {first} to {batch}")
        raise RollBack

    def event(self, event: str, **details: object) -> None:
        """A line of events.jsonl."""
        distributed.on_rank_zero(lambda: record_event(self.config.run_dir, event, **details))

    def warn(self, message: str) -> None:
        if distributed.rank() == 0:
            warn(message)

    def balance_experts(self, counts: torch.Tensor) -> None:
        """Move the routers' biases, and warn of experts that get nothing."""
        config, state = self.engine.module.config, self.state
        update_router_biases(self.engine.module, counts)
        before, state.expert_idle_steps = state.expert_idle_steps, count_idle_steps(state.expert_idle_steps, counts)
        every = self.config.log.idle_expert_steps
        warning = idle_warning(before, state.expert_idle_steps, every, sparse_layers(config), config)
        if warning:
            self.warn(f"step {state.step + 1}: {warning}")

    def log(self, validated: bool) -> None:
        """One record a step: training, and validation where it is due."""
        record = {
            "loss": self.result.loss,
            "lr": self.lr,
            "grad_norm": self.result.grad_norm,
            "tokens": self.state.tokens,
            **self.result.auxiliary,
            **self.meter.read(),
        }
        experts = None
        if self.result.routing is not None:
            experts = experts_record(self.result.routing, sparse_layers(self.engine.module.config))
            record |= summary(experts)
        if self.stall is not None:
            record["checkpoint_stall_s"], self.stall = round(self.stall, 3), None
        if self.state.bad_rows:
            record["bad_rows"] = self.state.bad_rows
        if self.meter.line_is_due(self.state.step) or validated:
            say(progress_line(record, self.state, self.meter))
        if validated and self.validation:
            record |= self.validate()
        self.tracker.log(self.state.step, record, experts)

    def validate(self) -> dict[str, float]:
        start = time.perf_counter()
        max_bad_rows = self.config.data.max_bad_samples
        record = validate(self.engine, self.validation, self.token_bytes, max_bad_rows, progress=self.watch.at)
        self.state.record_validation(record["val_loss"])
        sources = "".join(f", {name[9:]} {value:.4f}" for name, value in record.items() if name.startswith("val_loss/"))
        say(
            f"validation at step {self.state.step}: loss {record['val_loss']:.4f}, perplexity {record['val_ppl']:.2f}, "
            f"{record['val_bpb']:.3f} bits per byte{sources} ({time.perf_counter() - start:.1f} s)"
        )
        return record

    def sample(self) -> None:
        self.watch.at(f"samples after step {self.state.step}")
        section = self.config.samples
        chat = self.config.stage == "sft"
        texts = sample(self.engine, self.data.tokenizer, section.prompts, section.max_new_tokens, chat)
        self.tracker.sample(self.state.step, texts)
        for item in texts:
            say(f"sample: {item['prompt']!r} -> {item['text']!r}")

    def save(self) -> None:
        self.watch.at(f"saving step {self.state.step}")
        self.state.note_checkpoint()
        extra = {"data": self.data.fingerprint}
        self.stall = self.writer.save(self.engine, self.state, extra, self.data.tokenizer)
        self.saved_step = self.state.step

    def leave_early(self, signal: int) -> int:
        """Save and go: the step in flight is done."""
        if self.saved_step != self.state.step and self.state.step:
            self.save()
        self.writer.wait()
        self.event("stopped", step=self.state.step, signal=signal)
        say(f"stopped by signal {signal} after step {self.state.step}; the same command resumes")
        self.draw()  # last: whoever sent the signal may not wait for it
        return 128 + signal

    def conclude(self) -> None:
        """The last line of the log, and the pictures of the run."""
        state = self.state
        self.watch.at("concluding")
        self.writer.wait()
        self.event("finished", step=state.step)
        self.draw()
        before = f"{state.first_val_loss:.4f} -> " if state.first_val_loss is not None else ""
        loss = f", validation loss {before}{state.val_loss:.4f}" if state.val_loss is not None else ""
        say(
            f"done: {state.step} steps, {state.tokens:,} tokens in {format_seconds(state.train_seconds)}{loss}; "
            f"run folder {self.config.run_dir}"
        )

    def draw(self) -> None:
        """plots/loss.png, and plots/experts.png where there are experts, of what has been logged."""
        if distributed.rank() != 0:
            return
        from minillm.training import plots  # here, on the rank that draws: importing matplotlib takes time

        run_dir = self.config.run_dir
        try:
            pictures = plots.draw_loss(run_dir, self.state.first_val_loss), plots.draw_experts(run_dir)
        except (OSError, ValueError) as error:  # the run itself is whole, and saved
            warn(f"no picture could be written to {run_dir / 'plots'}: {error}")
            return
        for picture in filter(None, pictures):
            say(f"drew {picture}")

    def close(self, exit_code: int) -> None:
        self.writer.close()
        for loader in (self.loader, *self.validation.values()):
            loader.close()
        self.tracker.close(exit_code)


def due(step: int, every: int, max_steps: int) -> bool:
    """Every `every` steps (0: never), and at the last one."""
    return step == max_steps or (every > 0 and step % every == 0)
