"""Bad configurations for the damage campaign: the words, the YAML or the JSON of each, and what the error has to say.

Contract: data only. Every case is one mistake; `says` are regular expressions that the one error message matches, the
key, the rule and the fix among them.
"""

from __future__ import annotations

from dataclasses import dataclass

FP32 = '{"zero_optimization": {"stage": 2}}'


@dataclass(frozen=True)
class Bad:
    """One mistake: overrides, or the text of the YAML (over the demo's) or of the JSON."""

    says: tuple[str, ...]
    words: tuple[str, ...] = ()
    yaml: str | None = None
    json: str = FP32


def words(*given: str, says: tuple[str, ...]) -> Bad:
    return Bad(says, words=given)


def ds(json: str, *says: str) -> Bad:
    return Bad(says, json=json)


def yml(text: str, *says: str) -> Bad:
    return Bad(says, yaml=text)


KEYS = {
    "an unknown key": words("optim.learning_rat=1", says=("optim.learning_rat: unknown key", "`learning_rate`")),
    "a key in the wrong section": words("train.learning_rate=1", says=("train.learning_rate: unknown key",)),
    "a key without its section": words("learning_rate=1", says=("did you mean `optim.learning_rate`",)),
    "an unknown section": words("optimizer.lr=1", says=("optimizer: unknown key", "`optim`")),
    "a section for a value": words("train.max_steps.more=1", says=("max_steps", "not a section|integer")),
    "a value for a section": words("optim=3", says=("optim = 3", "dictionary|mapping")),
    "no value": words("train.max_steps", says=("`train.max_steps`", "section.key=value")),
    "no key": words("=3", says=("`=3`", "section.key=value")),
    "a key that ends in a dot": words("train.=3", says=("train.: ", "unknown key|section.key=value")),
    "a value that is no YAML": words("run_name=[a", says=("run_name", "`\\[a`", "quote it")),
    "the stage": words("stage=sft", says=("stage",)),
}
VALUES = {
    "a negative learning rate": words("optim.learning_rate=-1e-3", says=("optim.learning_rate", "greater than 0")),
    "a learning rate that is no number": words("optim.learning_rate=.nan", says=("optim.learning_rate", "finite")),
    "an infinite learning rate": words("optim.learning_rate=.inf", says=("optim.learning_rate", "finite")),
    "an infinite weight decay": words("optim.weight_decay=.inf", says=("optim.weight_decay", "finite")),
    "an infinite clipping": words("optim.gradient_clipping=.inf", says=("optim.gradient_clipping", "finite")),
    "endless epochs": words("train.max_steps=null", "train.num_epochs=.inf", says=("train.num_epochs", "finite")),
    "a timeout of nan": words("faults.timeout=.nan", says=("faults.timeout", "finite")),
    "a spike of nan deviations": words("faults.spike_deviations=.nan", says=("faults.spike_deviations", "finite")),
    "a learning rate in words": words("optim.learning_rate=small", says=("optim.learning_rate", "valid number")),
    "no steps": words("train.max_steps=0", says=("train.max_steps = 0", "greater than or equal to 1")),
    "half a step": words("train.max_steps=2.5", says=("train.max_steps = 2.5", "integer")),
    "steps and epochs": words("train.num_epochs=2", says=("both are given", "set one")),
    "neither steps nor epochs": words("train.max_steps=null", says=("neither is given", "set one")),
    "true for a number": words(
        "train.train_batch_size=true", says=("train.train_batch_size = True: must be a number, not true or false",)),
    "keep nothing": words("checkpoint.keep=0", says=("checkpoint.keep = 0", "greater than or equal to 1")),
    "checkpoints every -1 steps": words("checkpoint.every=-1", says=("checkpoint.every = -1", "equal to 0")),
    "perhaps for yes or no": words("checkpoint.asynchronous=perhaps", says=("checkpoint.asynchronous", "boolean")),
    "warm-up for the whole run": words("optim.warmup_ratio=1", says=("optim.warmup_ratio = 1", "less than 1")),
    "warm-up longer than the run": words("optim.warmup_ratio=1.5", says=("optim.warmup_ratio = 1.5", "less than 1")),
    "warm-up and decay longer than the run": words(
        "optim.lr_schedule=wsd", "optim.warmup_ratio=0.6", "optim.decay_ratio=0.6", says=("must not exceed 1",)),
    "an unknown schedule": words("optim.lr_schedule=linear", says=("optim.lr_schedule = 'linear'", "cosine.*wsd")),
    "an unknown policy": words("faults.on_non_finite=ignore", says=("faults.on_non_finite", "stop.*skip.*rollback")),
    "a negative seed": words("seed=-1", says=("seed = -1", "equal to 0")),
    "a seed of 2^63": words("seed=9223372036854775808", says=("seed", "less than")),
    "a run name that is a path": words("run_name=../../etc", says=("run_name = '../../etc'",)),
    "an empty run name": words("run_name=''", says=("run_name",)),
    "a run root that is a list": words("run_root=[a]", says=("run_root", "string")),
    "samples without prompts": words("samples.every=5", "samples.prompts=[]", says=("samples.prompts",)),
}  # fmt: skip
FITTING = {
    "a batch that does not divide": words(
        "train.train_batch_size=10", "train.train_micro_batch_size_per_gpu=4",
        says=("train.train_batch_size = 10 does not divide", "use train.train_micro_batch_size_per_gpu=2")),
    "a micro-batch above the batch": words(
        "train.train_batch_size=4", "train.train_micro_batch_size_per_gpu=8", says=("does not divide", "use train")),
    "sequences beyond the context": words("data.seq_len=4096", says=("data.seq_len = 4096", "positions", "lower it")),
    "a stride above the sequence": words("data.stride=129", says=("data.stride = 129", "choose 1 to 128")),
    "a stride without packing": words(
        "data.packing=none", "data.stride=8", says=("data.stride = 8", "only data.packing=concat")),
    "an unknown preset": words("model.preset=dense-26", says=("model.preset = 'dense-26'", "`dense-26m`")),
    "an unknown field of a model": words("model.hiden_size=64", says=("model.hiden_size", "`hidden_size`")),
    "heads that do not divide": words("model.num_key_value_heads=3", says=("num_key_value_heads is 3", "must divide")),
    "an odd rotating head": words("model.head_dim=15", says=("head_dim is 15", "even")),
    "a vocabulary of one": words("model.vocab_size=0", says=("model.vocab_size", "above 0")),
    "experts in a dense model": words("model.num_experts=4", says=("num_experts is 4", "only sparse layers")),
    "more experts chosen than there are": words(
        "model.preset=moe-876m", "model.num_experts_per_tok=1000", says=("num_experts_per_tok",)),
    "expert parallelism on one rank": words(
        "model.preset=moe-876m", "model.expert_parallel_size=7", says=("expert_parallel_size 7", )),
    "another shape than init_from's": words(
        "model.init_from=x", "model.hidden_size=64", says=("its shape cannot change",)),
    "data without a tokenizer": words("data.train=/nowhere", says=("data.tokenizer: needed",)),
    "validation without training data": words("data.validation=/nowhere", says=("data.validation",)),
    "no sources": words("data.train=[]", says=("data.train", "at least 1")),
    "a source without a path": words(
        "data.train=[{name: a}]", "data.tokenizer=x", says=(r"data.train.0.path", "required")),
    "a source with a negative weight": words(
        "data.train=[{name: a, path: b, weight: -1}]", "data.tokenizer=x", says=("data.train.0.weight", "than 0")),
    "a source with an infinite weight": words(
        "data.train=[{name: a, path: b, weight: .inf}]", "data.tokenizer=x", says=("data.train.0.weight", "finite")),
    "two sources of one name": words(
        "data.train=[{name: a, path: b}, {name: a, path: c}]", "data.tokenizer=x", says=("data.train", "twice")),
    "a training folder that is not there": words(
        "data.train=/nowhere/shards", "data.tokenizer=/nowhere/t", says=("data.train = .*nowhere/shards", "not there")),
    "a tokenizer that is not there": words(
        "data.train=.", "data.tokenizer=/nowhere/t", says=("data.tokenizer = .*/nowhere/t", "not there")),
    "a pipe for a shard": words(
        "data.train=pipe:cat x.tar", "data.tokenizer=.", says=("data.train", "pipe: is not supported")),
}  # fmt: skip
JSONS = {
    "not JSON": ds("{", "ds.json is not valid JSON"),
    "empty": ds("", "ds.json is not valid JSON"),
    "not UTF-8": ds("\udcff{}", "ds.json is not valid JSON"),
    "a list": ds("[]", "ds.json must hold a JSON object"),
    "a key twice": ds('{"bf16": {}, "bf16": {}}', "bf16 given twice"),
    "NaN in it": ds('{"zero_optimization": {"stage": NaN}}', "stage"),
    "an unknown key": ds('{"zero_optimisation": {}}', "zero_optimisation", "`zero_optimization`"),
    "an unknown key of ZeRO": ds('{"zero_optimization": {"stage": 2, "overlap_com": true}}', "`overlap_comm`"),
    "an unknown stage": ds('{"zero_optimization": {"stage": 4}}', "stage = 4", "0, 1, 2 or 3"),
    "a stage in words": ds('{"zero_optimization": {"stage": "two"}}', "stage = 'two'", "0, 1, 2 or 3"),
    "a stage of true": ds('{"zero_optimization": {"stage": true}}', "stage = True", "0, 1, 2 or 3"),
    "ZeRO as a number": ds('{"zero_optimization": 2}', "zero_optimization must be an object"),
    "an optimizer": ds('{"optimizer": {"type": "Adamm"}}', "optimizer belongs to the `optim` section"),
    "a scheduler": ds('{"scheduler": {}}', "scheduler belongs to optim.lr_schedule"),
    "another batch": ds('{"train_batch_size": 99}', "train_batch_size = 99", "train.train_batch_size", "auto"),
    "another micro-batch": ds('{"train_micro_batch_size_per_gpu": 3}', "train_micro_batch_size_per_gpu = 3"),
    "another accumulation": ds('{"gradient_accumulation_steps": 3}', "gradient_accumulation_steps = 3"),
    "another clipping": ds('{"gradient_clipping": 5.0}', "gradient_clipping = 5.0", "optim.gradient_clipping"),
    "bf16 and fp16": ds(
        '{"bf16": {"enabled": true}, "fp16": {"enabled": true}, "zero_optimization": {"stage": 2}}', "both enabled"),
    "fp16 at stage 0": ds('{"fp16": {"enabled": true}}', "fp16 at ZeRO stage 0"),
    "bf16 at stage 0": ds('{"bf16": {"enabled": true}}', "bf16 at ZeRO stage 0"),
    "bf16 in words": ds('{"bf16": {"enabled": "yes"}, "zero_optimization": {"stage": 1}}', "bf16.enabled"),
    "offload to nvme": ds(
        '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}', "must be cpu or none"),
    "offload as text": ds('{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}', "offload_optimizer"),
    "offloaded weights at stage 2": ds(
        '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', "offload_param needs stage 3"),
    "a negative bucket": ds('{"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}', "reduce_bucket_size"),
    "a bucket in words": ds('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}', "reduce_bucket_size"),
    "curriculum learning": ds('{"curriculum_learning": {}}', "curriculum_learning was removed"),
    "AutoEP in a dense model": ds(
        '{"expert_parallel": {"enabled": true}, "zero_optimization": {"stage": 2}}', "the model has no experts"),
}  # fmt: skip
JSONS |= {
    "ZeRO-3 with DeepSpeed's experts": Bad(
        ("cannot run under ZeRO-3", "moe_backend"), words=("model.preset=moe-876m", "model.moe_backend=deepspeed"),
        json='{"bf16": {"enabled": true}, "zero_optimization": {"stage": 3}}'),
}  # fmt: skip
YAMLS = {
    "tabs": yml("train:\n\tmax_steps: 3\n", "bad.yaml is not valid YAML", "line 2|\\\\t"),
    "cut": yml("train: {max_steps: 3", "bad.yaml is not valid YAML"),
    "a key twice": yml("train:\n  max_steps: 3\ntrain:\n  max_steps: 4\n", "train.* twice"),
    "a key twice in a section": yml("train:\n  max_steps: 3\n  max_steps: 4\n", "max_steps.* twice"),
    "a list": yml("- a\n", "bad.yaml must be a mapping of sections, not a list"),
    "text": yml("just words\n", "bad.yaml must be a mapping of sections, not a str"),
    "a number": yml("0\n", "bad.yaml must be a mapping of sections, not a"),
    "two documents": yml("train: {max_steps: 3}\n---\ntrain: {max_steps: 4}\n", "bad.yaml is not valid YAML"),
    "an anchor that is not there": yml("train: *other\n", "bad.yaml is not valid YAML", "other"),
    "an anchor that holds itself": yml("train: &a {max_steps: *a}\n", "train"),
    "a billion laughs": yml(
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join('*' + a for _ in range(9))}]\n" for a, b in zip("abcdefgh", "bcdefghi")),
        "a: unknown key"),
    "Python in it": yml("train: !!python/object/apply:os.mkdir [pwned]\n", "bad.yaml is not valid YAML", "python"),
    "a section that is a list": yml("train: [1]\ndata: {}\n", "train = \\[1\\]", "dictionary|mapping"),
    "an empty section": yml("train:\n", "train", "dictionary|neither"),
    "a key that is a list": yml("? [a, b]\n: 3\n", "bad.yaml is not valid YAML"),
    "keys that are numbers": yml("1: 2\ntrain: {max_steps: 3}\n", "1 = 1: keys should be strings"),
    "not UTF-8": yml("train: {max_steps: 3} # \udcff\n", "bad.yaml is not valid YAML"),
    "a zero byte": yml("train: {max_steps: 3}\0\n", "bad.yaml is not valid YAML"),
    "a date for a number": yml("train: {max_steps: 2024-01-01}\n", "train.max_steps", "integer"),
    "a merged section with an unknown key": yml(
        "base: &b {max_steps: 3}\ntrain:\n  <<: *b\n", "base: unknown key"),
    "an empty file": yml("", "neither is given"),
}  # fmt: skip
ALL = {
    "overrides and keys": KEYS, "values": VALUES, "what fits what": FITTING, "DeepSpeed's JSON": JSONS, "YAML": YAMLS,
}  # fmt: skip
