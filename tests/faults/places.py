"""Where a run can be killed: every phase of a save, of a step, of a start and of the data, by name.

A place names a file and what happens to it (opened, written, synced, renamed, deleted), or a public function of the
product, and the moment: before, after, inside. tests/faults/
kill_at.py sets the trap. `rank`: where it springs (None: on whichever rank comes by first); `victim`: that process
alone (self), or the launcher and all ranks (all). Saves are those of one start, the second one unless a name says
otherwise, so that an older checkpoint is there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

CHECKPOINT, LOOP = "minillm.training.checkpoint", "minillm.training.loop"
STREAM, DATA = "minillm.training.safetensors_stream", "minillm.data"
DEEPSPEED = "deepspeed.runtime.engine:DeepSpeedEngine"


@dataclass(frozen=True)
class Place:
    """`what` finishes the sentence "... was killed"; the rest is as in tests/faults/kill_at.py."""

    what: str
    target: str
    when: str = "before"
    match: str = ""
    nth: int = 1
    rank: int | None = 0
    victim: str = "self"
    delay: float = 0.0
    damage: bool = False  # the newest checkpoint is damaged first

    def on(self, rank: int | None) -> Place:
        return replace(self, rank=rank)

    def all(self) -> Place:
        return replace(self, victim="all")

    def after(self, seconds: float) -> Place:
        """The kill comes so much later, and training goes on meanwhile."""
        return replace(self, delay=seconds)

    def __str__(self) -> str:
        who = "everything" if self.victim == "all" else "a rank" if self.rank is None else f"rank {self.rank}"
        meanwhile = f", training going on for {self.delay:g} s" if self.delay else ""
        return f"{who}: {self.what}{meanwhile}"


# A save, in the order of its phases.
BEFORE_SAVE = Place("before a save", f"{LOOP}:Trainer.save", nth=2)
GENERATORS = Place("in a save, generators collected", f"{CHECKPOINT}:capture_rng", "after", nth=2)
GATHER_WEIGHTS = Place("in a save, weights half gathered", f"{CHECKPOINT}:read_full_state", "items", "'weight'", 30)
GATHER_MOMENTS = Place("in a save, moments half gathered", f"{CHECKPOINT}:read_full_state", "items", "'exp_avg'", 60)
BACKGROUND = Place("in a save, before the first byte in the background", "shutil:rmtree",
                   match=r"step-\d+\.tmp$", nth=2)  # fmt: skip
EMPTY = Place("in a save, the folder still empty", "transformers:PretrainedConfig.save_pretrained", nth=2)
TOKENIZER = Place("in a save, before the tokenizer's files", f"{CHECKPOINT}:save_tokenizer", nth=2)
COUNTERS = Place("in a save, trainer_state.json not renamed yet", "os:replace", match=r"trainer_state\.json$", nth=2)
RNG = Place("in a save, rng.json just written", "os:replace", "after", r"rng\.json$", 2)
HALF_WEIGHTS = Place("inside model.safetensors, half a tensor written", "builtins:open", "half", r"/model\.", 30)
UNSYNCED = Place("in a save, model.safetensors written, not synced", "os:fsync", match=r"/model\.safetensors$", nth=3)
HALF_MOMENTS = Place("inside optimizer.safetensors, half a tensor written", "builtins:open", "half", r"/optimizer\.",
                     60)  # fmt: skip
UNLISTED = Place("in a save, all files but the manifest written", f"{CHECKPOINT}:write_manifest", nth=2)
MANIFEST = Place("inside manifest.json, not renamed yet", "os:replace", match=r"manifest\.json$", nth=2)
LISTED = Place("in a save, the manifest just written", f"{CHECKPOINT}:publish_directory", nth=2)
SYNCING = Place("in a save, the files half synced", "os:fsync", match=r"step-\d+\.tmp/optimizer\.safetensors$", nth=4)
BEFORE_RENAME = Place("in a save, before the folder is renamed", "os:rename", match=r"step-\d+\.tmp$", nth=2)
AFTER_RENAME = Place("in a save, the folder renamed, not synced", "os:rename", "after", r"step-\d+\.tmp$", 2)
PUBLISHED = Place("in a save, published, old ones still there", f"{CHECKPOINT}:prune", nth=2)
OLD_RENAMED = Place("deleting an old checkpoint, renamed only", "os:rename", "after", r"\.deleted$", 2)
OLD_HALF = Place("deleting an old checkpoint, half of its files gone", "os:unlink", "after", r"\.deleted$", 4)
LEFTOVER = Place("deleting what a killed save had left", "os:unlink", "after", r"step-\d+\.tmp$", 3)
PRUNED = Place("in a save, old ones deleted", f"{CHECKPOINT}:prune", "after", nth=2)
AGREEING = Place("in a save, before the ranks agree how it went", f"{CHECKPOINT}:CheckpointWriter.agree", nth=2)
SAVED = Place("after a save", f"{LOOP}:Trainer.save", "after", nth=2)
REPLACING = Place("saving a damaged checkpoint's step again, the damaged one gone, the new one not yet there",
                  f"{CHECKPOINT}:remove_directory", "after", damage=True)  # fmt: skip

# A step. Numbers count the warm-up step, of which a start has one. Two micro-steps make a step.
MICRO_STEPS = Place("between two micro-steps", f"{DEEPSPEED}.backward", "after", nth=11)
BEFORE_UPDATE = Place("before the optimizer's update", f"{DEEPSPEED}._take_model_step", nth=6)
IN_UPDATE = Place(
    "in the update, own share of the weights done, not gathered", "torch.optim:AdamW.step", "after", nth=7
)
AFTER_UPDATE = Place("after the update, before it is counted", f"{LOOP}:take_step", "after", nth=6)
AGREEING_LOSS = Place("before the ranks add up their losses", "minillm.training.step:sum_over_ranks", nth=6)
LOGGING = Place("inside metrics.jsonl, half a line written", "builtins:open", "half", r"metrics\.jsonl$", 6)
VALIDATING = Place("in a validation", "minillm.training.validation:sums_of", nth=2)
CONCLUDING = Place("after the last save", f"{LOOP}:Trainer.conclude")
DRAWING = Place("drawing the pictures at the end", "minillm.training.plots:draw_loss")

# The data.
TOKENIZING = Place("a tokenizing process, at its work", f"{DATA}.compile_shards:encode_unit", rank=None)
TOKENS_HALF = Place("in the middle of a token shard", "builtins:open", "half", r"tokens-\d+\.tar", 9, rank=None)
TOKENS_WHOLE = Place("token shards written, not published", f"{DATA}.compile_shards:publish_directory", rank=None)
TOKENS_PUBLISHED = Place("token shards just published", f"{DATA}.compile_shards:publish_directory", "after", rank=None)
LOADER = Place("in the loader's thread, before the next batch is made", f"{DATA}.loader:BatchLoader.build", nth=7)
ROWS = Place("in the loader's thread, rows read, batch not made", f"{DATA}.sequence_stream:SequenceStream.take",
             "after", nth=7)  # fmt: skip
BATCH = Place("the batch loaded, before the ranks agree on it", f"{LOOP}:Trainer.begin_step", "after", nth=5)

# A start.
LOCKED = Place("the run folder locked, nothing else done", f"{LOOP}:Trainer.__init__")
SETTINGS = Place("inside run.yaml, not renamed yet", "os:replace", match=r"run\.yaml$")
SETTINGS_LEFT = Place("run.yaml written, ds_config.json not", "os:replace", match=r"ds_config\.json$")
WARM_UP = Place("before the warm-up step", "minillm.training.start:warm_up")
FIRST_VALIDATION = Place("after the validation before the first step", f"{LOOP}:validate", "after")
FIRST_STEP = Place("after the first update of all", f"{LOOP}:take_step", "after")
FIRST_SAVE = replace(HALF_WEIGHTS, what="inside the first model.safetensors of all", nth=5)
WEIGHTS_LOADED = Place("resuming, weights loaded, no engine yet", f"{CHECKPOINT}:load_weights", "after")
RESTORING = Place("resuming, half of the moments restored", f"{CHECKPOINT}:write_full_state", nth=2)
RNG_LEFT = Place("resuming, all but the generators restored", f"{CHECKPOINT}:restore_rng")
CUTTING = Place("resuming, metrics.jsonl cut back, not renamed yet", "os:replace", match=r"metrics\.jsonl$")
STARTED = Place("resuming, half a line in events.jsonl", "builtins:open", "half", r"events\.jsonl$")

# Experts.
ROUTER_BIASES = "minillm.training.expert_load:update_router_biases"
GATHER_EXPERTS = Place(
    "in a save, experts half gathered", "minillm.training.expert_parallel:WholeParameter.join", nth=70
)
BEFORE_BALANCE = Place("after the update, router biases not moved", ROUTER_BIASES, nth=5)
AFTER_BALANCE = Place("router biases moved, step not counted", ROUTER_BIASES, "after", nth=5)
LOGGING_EXPERTS = Place("inside experts.jsonl, half a line written", "builtins:open", "half", r"experts\.jsonl$", 5)
