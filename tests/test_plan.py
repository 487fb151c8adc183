"""The plan against reality: states against a running engine's tensors, activations against what autograd saved, peak
memory against a GPU's where there is one; its choices against arithmetic done by hand.

Not checked: step times, which rest on assumptions that the plan prints.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch

from minillm import plan
from minillm.models import MiniLLMConfig, MiniLLMForCausalLM, normalization
from minillm.models import linear as model_linear
from minillm.planning.activations import activations
from minillm.planning.devices import DEVICES
from minillm.planning.published import LLAMA_7B, MPT_1B, MPT_3B, MPT_7B, MPT_13B, TINYLLAMA
from minillm.planning.states import (
    Group,
    Zero,
    gathered,
    orthogonalisation_flops,
    parameter_groups,
    states,
    traffic,
)
from minillm.planning.step import Setup, exchanged, largest_micro_batch, memory, speed
from minillm.settings.accounting import flops_per_token, num_parameters, parameter_shapes
from minillm.settings.architecture import Architecture
from minillm.settings.deepspeed_json import read_deepspeed_json, resolve_deepspeed_config
from minillm.settings.presets import PRESETS, preset
from minillm.settings.run import OptimSection, RunConfig
from minillm.training.gradient_parity import MODELS, Case, run_config
from minillm.training.muon import update_flops
from minillm.training.optim import build_optimizer
from tests.support.launching import ROOT
from tests.support.planned import measure
from tests.support.toy_presets import toy_architecture, toy_model

JSONS = sorted((ROOT / "ds_configs").glob("*.json"))
YAMLS = sorted((ROOT / "launch" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_built_model_in_order(name):
    with torch.device("meta"):
        model = MiniLLMForCausalLM(MiniLLMConfig(**PRESETS[name]))
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(parameter_shapes(PRESETS[name]).items()) == list(built.items())


# ---- states: the bytes of a running engine, exactly

NOT_KEPT = {"stage3_param_persistence_threshold": 500}
FEW_LIVE = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 20_000}
OFFLOADED = ("offload_optimizer", "offload_param")
CASES = {
    1: [
        (Case("tied", "fp32", 0, 2), {}),
        (Case("tied", "bf16", 1, 2), {}),
        (Case("tied", "fp32", 2, 2), {}),
        (Case("tied", "bf16", 3, 2), {}),
        (Case("tied", "fp32", 0, 2, optimizer="muon"), {}),
    ],
    2: [
        *((Case("tied", "fp32", stage, 2), {}) for stage in range(4)),
        *((Case("tied", "bf16", stage, 2), {}) for stage in (1, 2, 3)),
        (Case("tied", "bf16", 2, 2), {"offload_optimizer": {"device": "cpu"}}),
        (Case("tied", "bf16", 3, 2), {**NOT_KEPT, **{part: {"device": "cpu"} for part in OFFLOADED}}),
        (Case("multi-token", "bf16", 3, 2), NOT_KEPT),
        (Case("multi-token", "bf16", 3, 2), {**NOT_KEPT, **FEW_LIVE}),
        (Case("noisy experts with biases", "fp32", 2, 2), {}),
        (Case("noisy experts with biases", "bf16", 2, 2, "deepspeed", 2), {}),
        (Case("sigmoid experts, multi-token", "bf16", 2, 2, "autoep", 2), {}),
        (Case("sigmoid experts, multi-token", "bf16", 3, 2, "autoep", 2), NOT_KEPT),
        (Case("tied", "bf16", 1, 2, optimizer="muon"), {}),
        (Case("noisy experts with biases", "bf16", 2, 2, "deepspeed", 2, optimizer="muon"), {}),
        (Case("sigmoid experts, multi-token", "bf16", 3, 2, "autoep", 2, optimizer="muon"), NOT_KEPT),
    ],
}


@pytest.fixture(scope="module", params=CASES)
def engines(request) -> tuple[int, list]:
    """Ranks, and what each rank of each case holds."""
    ranks = request.param
    if ranks == 1:  # this process is a rank already
        request.getfixturevalue("group")
        return ranks, [[measure(case, zero)] for case, zero in CASES[ranks]]
    cases = [[list(vars(case).values()), zero] for case, zero in CASES[ranks]]
    return ranks, request.getfixturevalue("two_ranks").call("tests.support.planned:measure_everywhere", cases)


def test_states_are_the_engines_to_the_byte(engines):
    ranks, found = engines
    assert len(found) == len(CASES[ranks])
    for (case, zero), held in zip(CASES[ranks], found, strict=True):
        _, values = run_config(case, ranks)
        values["zero_optimization"] = {**values["zero_optimization"], **zero}
        fields = Architecture(**MODELS[case.model])
        groups = parameter_groups(fields, case.backend, case.expert_parallel, ranks, case.optimizer)
        for rank, measured in enumerate(held):
            whole, predicted = measured.pop("gathered"), states(groups, Zero.of(values), rank)
            assert {part: getattr(predicted, part) for part in measured} == measured, f"{case}, {zero}, rank {rank}"
            bound = gathered(groups, Zero.of(values)) if case.stage == 3 else 0
            if "stage3_max_live_parameters" in zero:
                assert 0 < whole < sum(sum(group.sizes) for group in groups) and whole <= bound <= 1.2 * whole
            else:
                assert whole == bound, f"{case}, {zero}: gathered"


@pytest.mark.parametrize("stage, bf16", [(0, False), *((stage, low) for stage in (1, 2, 3) for low in (False, True))])
def test_states_follow_the_zero_paper(stage, bf16):
    """arXiv:1910.02054, section 3, on 8 ranks: low + low + K bytes of a parameter, of which stage 1 shares out K, 2 the
    gradients, 3 the weights. K = 12, also in fp32 from stage 1 on; gradients add up in fp32 from stage 2 on."""
    low, k = (2, 12) if bf16 else (4, 12 if stage else 8)
    values = {"bf16": {"enabled": bf16}, "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    if stage >= 2:
        values["data_types"] = {"grad_accum_dtype": "fp32"}
    summed = 4 if stage >= 2 else low
    each = [4 + 4 + 8, low + low + k / 8, low + (summed + k) / 8, (low + summed + k) / 8][stage]
    held = states([Group((8000,) * 8, 8)], Zero.of(values))
    steps = 32 if stage == 0 else 4  # AdamW's counters, one a tensor
    assert held.parameters + held.gradients + held.optimizer - steps == 64_000 * each


# ---- activations: what autograd saved


class Saved:
    """A tensor that the graph keeps; when a node goes, so does this."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def tensors_by_id() -> dict[int, torch.Tensor]:
    gc.collect()
    return {id(o): o for o in gc.get_objects() if isinstance(o, torch.Tensor)}


class FusedNorm(torch.autograd.Function):
    """What CUDA's kernel of F.rms_norm keeps (torch.ops.aten._fused_rms_norm): its input and 1 / rms, in fp32. Nobody
    goes back through it."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale * weight.float()).to(x.dtype)


@pytest.fixture
def like_a_gpu(monkeypatch):
    """No products through fp32 copies, and norms in one kernel where their weights are of the input's type."""
    plain = normalization.rms_norm

    def rms_norm(x, weight, eps):
        return FusedNorm.apply(x, weight, eps) if isinstance(weight, torch.nn.Parameter) else plain(x, weight, eps)

    monkeypatch.setattr(model_linear, "CPU_MULTIPLIES_BF16", True)
    monkeypatch.setattr(normalization, "rms_norm", rms_norm)


def saved_bytes(model: torch.nn.Module, batch: int, length: int) -> int:
    """Bytes that one training forward keeps for backward, parameters and buffers apart, each storage once; under
    checkpointing what its closures keep as well."""
    ids = torch.randint(0, model.config.vocab_size, (batch, length))
    positions = torch.arange(length).expand(batch, -1).contiguous()
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    packed: list[weakref.ref[Saved]] = []

    def pack(tensor: torch.Tensor) -> Saved:
        holder = Saved(tensor)
        packed.append(weakref.ref(holder))
        return holder

    checkpointing = model.model.gradient_checkpointing
    before = tensors_by_id() if checkpointing else {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        output = model(ids, labels=ids, position_ids=positions)
    alive = [holder.tensor for reference in packed if (holder := reference()) is not None]
    if checkpointing:
        kept = [tensor for number, tensor in tensors_by_id().items() if number not in before]
        alive += [tensor for tensor in kept if tensor.dtype != torch.uint8]  # states of the generator, 5 KB a layer
    held = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in alive)}
    assert output.loss.requires_grad
    return sum(size for address, size in held.items() if address not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PRESETS)
def test_activations_are_what_autograd_keeps(name, dtype, like_a_gpu):
    """Within 5 %: not predicted are fp32 copies of norm weights, on the CPU a window's mask, and what routers keep of
    constant size."""
    model = toy_model(name).to(dtype)
    made = activations(toy_architecture(name), dtype.itemsize, 2, 64)
    predicted = made.saved(False) + made.log_probabilities
    assert predicted == pytest.approx(saved_bytes(model, 2, 64), rel=0.05)


@pytest.mark.parametrize("name", ["demo", "deepseek-v3-mini"])
def test_checkpointing_keeps_the_inputs_of_layers(name, like_a_gpu):
    model = toy_model(name).to(torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made = activations(toy_architecture(name), 2, 2, 64)
    predicted = made.saved(True) + made.log_probabilities
    assert predicted == pytest.approx(saved_bytes(model, 2, 64), rel=0.05)
    assert made.saved(True) < made.saved(False) / 3


def test_activations_grow_with_tokens_and_layers():
    fields = PRESETS["dense-26m"]
    one, four = (activations(fields, 2, rows, 512) for rows in (1, 4))
    assert four.saved(False) == 4 * one.saved(False) and four.logits == 4 * one.logits
    deeper = activations(preset("dense-26m", num_hidden_layers=16), 2, 1, 512)
    assert sum(deeper.layers) == 2 * sum(one.layers) and deeper.outside == one.outside
    # By hand, for a token: two norms of 512, 8 + 2 + 2 heads of 64 in bf16 with 8 sums, SwiGLU of 1408.
    norms, attention, mlp = 2 * (2 * 512 + 4 + 2 * 512), 2 * 64 * (8 + 2 + 2 + 8) + 4 * 8, 4 * 2 * 1408
    assert one.layers[0] == 512 * (norms + attention + mlp)


# ---- the peak, on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="peak memory is a GPU's: torch.cuda.max_memory_allocated")
@pytest.mark.parametrize("stage, checkpointing", [(1, False), (2, False), (2, True), (3, False)])
def test_peak_memory_is_that_of_a_gpu(group, stage, checkpointing):
    """Within 5 %, one GPU, two micro-steps of 8 x 512 tokens through dense-26m."""
    from minillm.training.engine import build_engine
    from minillm.training.step import take_step

    run_values = {
        "train": {"max_steps": 1, "train_batch_size": 16, "train_micro_batch_size_per_gpu": 8,
                  "gradient_checkpointing": checkpointing},
    }  # fmt: skip
    run = RunConfig.model_validate(run_values)
    run.model.moe_backend, run.model.expert_parallel_size = "torch", 1
    given = read_deepspeed_json(ROOT / "ds_configs" / f"zero{stage}.json")
    values, problems = resolve_deepspeed_config(given, run, 1, "the test's JSON")
    assert not problems
    setup = Setup(PRESETS["dense-26m"], values, 1, "torch", 1, 16, 512, 8, checkpointing)
    square = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (square @ square).sum().backward()  # cuBLAS's workspaces are there, and not measured
    setup = replace(setup, workspace=0)
    gc.collect()  # earlier engines: DeepSpeed's objects refer to each other
    before = torch.cuda.memory_allocated()
    engine = build_engine(MiniLLMForCausalLM(MiniLLMConfig(**PRESETS["dense-26m"])), run, values)
    ids = torch.randint(0, 6400, (8, 512), device=engine.device)
    for step in range(3):
        if step == 2:
            torch.cuda.reset_peak_memory_stats()
        take_step(engine, [{"input_ids": ids, "labels": ids}] * 2, num_target_tokens=8192, learning_rate=1e-4)
    measured = torch.cuda.max_memory_allocated() - before
    engine.destroy()
    assert memory(setup).allocated == pytest.approx(measured, rel=0.05)


def test_what_cublas_holds_is_part_of_the_peak():
    """Two handles: 8,519,680 bytes each (what torch.cuda.memory_allocated shows after a first product: pytorch issue
    95668), on Hopper 32 MiB (pytorch pull request 89027)."""
    setup = setup_of("dense-26m", "zero1")
    other, hopper = (memory(replace(setup, workspace=DEVICES[name].workspace)).allocated for name in ("a100", "h100"))
    assert memory(replace(setup, workspace=0)).allocated + 2 * 8_519_680 == other
    assert hopper - other == 2 * (32 * 2**20 - 8_519_680)


# ---- traffic, speed, choice


def zero_of(name: str) -> Zero:
    return Zero.of(read_deepspeed_json(ROOT / "ds_configs" / f"{name}.json"))


def test_traffic_by_hand():
    """arXiv:1910.02054, section 7: gradients by all-reduce 2 N, weights N elements, of which 7/8 travel; bf16."""
    groups, unit = [Group((400_000, 400_000), 8)], 2 * 800_000 * 7 / 8
    one, two, three = (traffic(groups, zero_of(f"zero{stage}"), 4) for stage in (1, 2, 3))
    assert (one.reduce, one.gather) == (2 * unit, unit)  # once a step
    assert (two.reduce, two.gather) == (4 * 2 * unit, unit)  # at every micro-step
    assert (three.reduce, three.gather) == (4 * unit, 4 * unit)  # reduce-scatter and gather at every micro-step
    alone = traffic([Group((400_000, 400_000), 1)], zero_of("zero2"), 4)
    assert alone.total == 0


def setup_of(preset: str, name: str, **changes) -> Setup:
    values = read_deepspeed_json(ROOT / "ds_configs" / f"{name}.json")
    return replace(Setup(PRESETS[preset], values, 8, "torch", 1, 256, 512, 8, False), **changes)


def test_tokens_sent_to_experts_by_hand():
    """12 layers; 8 x 512 tokens, 4 copies of 1024 bf16 numbers out and back, twice; 7/8 leave; buffers 1.25 fold."""
    whole = setup_of("moe-876m", "zero2")
    shared = replace(whole, backend="deepspeed", expert_parallel=8)
    assert exchanged(whole) == 0
    assert exchanged(shared) == 12 * 4 * (8 * 512) * 4 * 1024 * 2 * 7 / 8 * 1.25
    assert exchanged(replace(shared, capacity=2.0)) == exchanged(shared) / 1.25 * 2.0
    assert exchanged(replace(shared, backend="autoep")) == exchanged(shared) / 1.25
    routed = num_parameters(PRESETS["moe-876m"])["routed"]
    fewer = memory(whole).parameters - memory(shared).parameters
    assert fewer == pytest.approx(2 * routed * 7 / 8, rel=1e-6)


def test_compute_time_by_hand():
    fields, device = PRESETS["dense-26m"], DEVICES["rtx3090"]
    seconds = flops_per_token(fields, 512) * 256 * 512 / 8 / (71e12 * 0.5)
    found = speed(setup_of("dense-26m", "zero1"), device, mfu=0.5)
    assert found.compute == pytest.approx(seconds)
    again = speed(setup_of("dense-26m", "zero1", checkpointing=True), device, mfu=0.5)
    assert again.compute == pytest.approx(4 / 3 * seconds)
    assert found.tokens_per_s == pytest.approx(256 * 512 / found.seconds)
    hidden, open_ = (speed(setup_of("dense-171m", "zero2"), device._replace(overlap=part)) for part in (1.0, 0.0))
    assert 0 < hidden.waiting < open_.waiting and hidden.traffic == open_.traffic  # the last bucket is waited for


@pytest.mark.parametrize("name", PRESETS)
def test_muons_matrices_and_their_operations_are_the_trainers(name):
    """training.muon has the rule and the count; the plan repeats both because it runs without torch."""
    with torch.device("meta"):
        model = MiniLLMForCausalLM(MiniLLMConfig(**PRESETS[name]))
    optimizer = build_optimizer(model, OptimSection(name="muon"))
    of_muon = [p for group in optimizer.param_groups if group.get("muon") for p in group["params"]]
    planned_groups = parameter_groups(PRESETS[name], "torch", 1, 1, "muon")
    assert sorted(p.numel() for p in of_muon) == sorted(size for g in planned_groups if g.muon for size in g.sizes)
    operations = [update_flops(shape) for p in of_muon for shape in optimizer._shapes[p]]
    assert orthogonalisation_flops(PRESETS[name]) == (sum(operations), max(operations))


def test_muon_keeps_one_moment_and_multiplies_in_the_update():
    adamw = setup_of("dense-26m", "zero1")
    muon = replace(adamw, optimizer="muon")
    shapes = parameter_shapes(PRESETS["dense-26m"])
    matrices = sum(math.prod(shape) for name, shape in shapes.items() if name.endswith("_proj.weight"))
    saved = memory(adamw).optimizer - memory(muon).optimizer
    assert saved == pytest.approx(4 * matrices / 8, rel=1e-4)  # shared out among 8 ranks, padding apart
    device = DEVICES["rtx3090"]
    # 8 layers: q and o 512 x 512, k and v 128 x 512, gate, up and down 512 x 1408; five steps each.
    each = [(512, 512)] * 2 + [(128, 512)] * 2 + [(512, 1408)] * 3
    operations = 8 * sum(5 * (4 * s * s * t + 2 * s**3) for s, t in each)
    more = speed(muon, device, 0.5).update - speed(adamw, device, 0.5).update
    assert more == pytest.approx(operations / 8 / (0.5 * 71e12) - 8 * matrices / 8 / 936e9)


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    setup = setup_of("dense-171m", "zero2")
    for gib in (6, 9, 24):
        largest = largest_micro_batch(setup, gib * 2**30)
        assert memory(replace(setup, micro=largest)).total <= gib * 2**30
        assert largest == 32 or memory(replace(setup, micro=2 * largest)).total > gib * 2**30
    assert largest_micro_batch(setup, 2**30) == 0
    assert memory(replace(setup, checkpointing=True)).total < memory(setup).total


def planned(capsys, *words: str) -> dict:
    assert plan.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_zero_1_wins_with_accumulation_on_cards_without_peer_to_peer(capsys):
    found = planned(capsys, "--config", "dense-171m")
    rows = {row["ds_config"]: row for row in found["rows"]}
    assert found["best"]["ds_config"] == "zero1"
    assert "once a step, ZeRO-2 at each of the 2 micro-steps" in found["why"][1]
    reduced = {name: rows[name]["traffic_bytes_per_step"]["reduce"] for name in ("zero1", "zero2")}
    assert reduced["zero2"] == 2 * reduced["zero1"]
    assert rows["zero1"]["tokens_per_s"] > rows["zero2"]["tokens_per_s"] > rows["zero2_offload"]["tokens_per_s"]
    # Where the batch needs no accumulation the two send the same, and the one that keeps less is named.
    once = planned(capsys, "--config", "dense-171m", "train.train_micro_batch_size_per_gpu=32")
    rows = {row["ds_config"]: row for row in once["rows"]}
    assert rows["zero1"]["traffic_bytes_per_step"] == rows["zero2"]["traffic_bytes_per_step"]


def test_expert_rows_are_the_legal_ones_and_the_rest_is_refused(capsys):
    found = planned(capsys, "--config", "moe-876m", "--gpus", "8")
    legal = {(row["ds_config"], row["moe_backend"], row["expert_parallel_size"]) for row in found["rows"]}
    assert ("zero2", "deepspeed", 8) in legal and ("zero3", "torch", 1) in legal
    assert not [row for row in legal if row[1] == "autoep"]  # its experts have biases
    why = {(r["ds_config"], r["experts"]): r["reason"] for r in found["refused"]}
    assert "cannot run under ZeRO-3" in why["zero3", "deepspeed x 8"]
    assert "gated experts without biases" in why["zero1", "autoep x 8"]
    assert {name for name, _, _ in legal} | {name for name, _ in why} == {path.stem for path in JSONS}
    gated = planned(capsys, "--config", "moe-demo", "--gpus", "2")
    assert ("moe_zero3", "autoep", 2) in {
        (row["ds_config"], row["moe_backend"], row["expert_parallel_size"]) for row in gated["rows"]
    }


@pytest.mark.parametrize("config", YAMLS, ids=lambda path: path.stem)
def test_every_config_has_a_row_for_every_json_in_120_columns(config, capsys):
    words = ["--config", config.stem, "--gpus", "8", "--tokens", "1e9", "--price-per-gpu-hour", "0.25"]
    assert plan.main(words) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    for path in JSONS:
        assert any(path.stem in line.replace(",", " ").replace(":", " ").split() for line in text.splitlines()), path
    assert "best: " in text and "assumed:" in text


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_one_json_in_detail_or_the_reason_it_is_refused(path, capsys):
    for config in ("dense-171m", "moe-876m", "moe-demo"):
        try:
            assert plan.main(["--config", config, "--deepspeed", str(path)]) == 0
        except SystemExit as end:
            assert end.code == 2 and path.stem == "moe_zero3" and config != "moe-demo"
            assert "refused: " in capsys.readouterr().err
        else:
            text = capsys.readouterr().out
            assert "each GPU sends in a step: gradients" in text and f"best: {path.stem}" in text


def test_days_and_cost_follow_the_budget(capsys):
    found = planned(capsys, "--config", "dense-171m", "--tokens", "2e9", "--price-per-gpu-hour", "0.5")
    for row in found["rows"]:
        assert row["days"] == pytest.approx(2e9 / row["tokens_per_s"] / 86_400)
        assert row["cost"] == pytest.approx(row["days"] * 24 * 8 * 0.5)
    steps = planned(capsys, "--config", "demo", "--gpus", "1", "train.max_steps=10")
    assert steps["tokens"] == 10 * 8 * 128


def test_too_little_memory_asks_for_checkpointing_or_says_what_it_takes(capsys):
    words = ["--config", "moe-876m", "data.seq_len=4096", "model.max_position_embeddings=4096", "--gpu-memory"]
    assert plan.main([*words, "5"]) == 0
    assert "nothing fits as configured: set train.gradient_checkpointing=true" in capsys.readouterr().out
    assert planned(capsys, *words, "5", "train.gradient_checkpointing=true")["best"] is not None
    with pytest.raises(SystemExit) as end:
        plan.main([*words, "1"])
    message = capsys.readouterr().err
    assert end.value.code == 2 and "nothing fits on 8 GPU(s)" in message and "the least is" in message


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config", "dense-17m"], "did you mean `dense-171m`"),
        (["--config", "demo", "--gpus", "0"], "--gpus 0: it must be a whole number above 0"),
        (["--config", "demo", "--gpus", "1.5"], "--gpus 1.5"),
        (["--config", "demo", "--gpus", "8,x"], "--gpus 8,x: it must be a whole number above 0"),
        (["--config", "demo", "--gpus", "64..8"], "--gpus 64..8"),
        (["--config", "demo", "--gpus", "8..16,32"], "--gpus 8..16,32"),
        (["--config", "demo", "--weak"], "--weak: it compares sizes"),
        (["--config", "demo", "--gpus-per-node", "0"], "--gpus-per-node 0"),
        (["--config", "demo", "--network", "-1", "--disk", "0"], "--disk 0: it must be a number above 0"),
        ([], "--config is missing"),
        (["--config", "demo", "--gpu-memory", "x", "--mfu", "2"], "--mfu 2: it must be a number above 0, at most 1"),
        (["--config", "demo", "--gpu-memory", "nan"], "--gpu-memory nan"),
        (["--config", "demo", "--device", "rtx3091"], "did you mean `rtx3090`"),
        (["--config", "demo", "--gpus", "3"], "does not divide"),
        (["--config", "demo", "--tokens", "-5"], "--tokens -5"),
        (["--config", "demo", "--deepspeed", "nowhere.json"], "no such file"),
        (["--config", "demo", "train.max_stepz=3"], "did you mean `max_steps`"),
    ],
)
def test_mistakes_are_one_error(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        plan.main(words)
    printed = capsys.readouterr()
    assert end.value.code == 2 and message in printed.err and not printed.out


# ---- growth, and what others measured


def test_growth_is_one_line_a_size(capsys):
    found = planned(capsys, "--config", "dense-171m", "--gpus", "8..1024", "--device", "a100")
    sizes = {size["gpus"]: size for size in found["sizes"]}
    assert list(sizes) == [8, 16, 32, 64, 128, 256, 512, 1024]
    for gpus, size in sizes.items():
        assert size["train_batch_size"] == 256 and size["nodes"] == gpus // 8
        if gpus > 256:
            assert "does not divide" in size["reason"] and size["best"] is None
            continue
        best = size["best"]
        micro = best["train_micro_batch_size_per_gpu"]
        assert micro == min(16, 256 // gpus) and micro * best["gradient_accumulation_steps"] * gpus == 256
        assert (best["waiting_seconds_between_nodes"] > 0) == (gpus > 8)
    one_node, many = sizes[8], sizes[256]
    assert one_node["of_node"] == 1.0 and one_node["of_one_gpu"] < 1.0
    assert many["of_node"] < one_node["of_node"] and many["of_one_gpu"] < one_node["of_one_gpu"]
    assert many["of_node"] == pytest.approx(many["best"]["tokens_per_s"] / (32 * one_node["best"]["tokens_per_s"]))


def test_weak_growth_keeps_the_batch_of_a_gpu(capsys):
    words = ["--config", "dense-171m", "--gpus", "8,64,512", "--device", "a100"]
    found = planned(capsys, *words, "--weak")
    assert [size["train_batch_size"] for size in found["sizes"]] == [256, 2048, 16_384]
    shares = [size["best"]["compute_seconds"] for size in found["sizes"]]
    assert shares == pytest.approx([shares[0]] * 3)
    slow = planned(capsys, *words, "--weak", "--network", "3")
    assert slow["sizes"][2]["of_one_gpu"] < found["sizes"][2]["of_one_gpu"]


@pytest.mark.parametrize("words", [["dense-171m"], ["moe-876m", "--weak"], ["llama2-7b", "--device", "h100"]], ids=str)
def test_growth_is_a_table_in_120_columns(words, capsys):
    assert plan.main(["--gpus", "8..1024", "--tokens", "1e12", "--price-per-gpu-hour", "2", "--config", *words]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    for part in ("between", "of 1 GPU", "stall s", "data MB/s a node", "days", "cost", "us a hop", "sha256"):
        assert part in text


def test_growth_without_a_size_that_can_run_is_one_error(capsys):
    with pytest.raises(SystemExit):
        plan.main(["--config", "demo", "--gpus", "64,128"])
    assert "64, 128 GPUs: a batch of 8 sequences does not divide among so many GPUs" in capsys.readouterr().err


def test_what_others_measured_is_printed_with_the_error(capsys):
    """The part of the peak is one number for all; growth on NVLink and InfiniBand is known well, on PCIe roughly."""
    records = planned(capsys, "--check-published")
    assert len(records) >= 15 and all("github.com" in record["source"] for record in records)
    for record in records:
        assert record["error"] == pytest.approx(record["predicted"] / record["published"] - 1)
        assert abs(record["error"]) < 0.5
        assert abs(record.get("growth_error", 0)) < (0.1 if record["device"] in ("A100", "H100") else 0.3), record
    assert plan.main(["--check-published"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120 and "mean size of the error" in text


def test_the_shapes_of_published_runs_are_theirs():
    """Parameters as the sources count them; MPT's have no biases and few norms' weights, here layernorms have both."""
    for fields, published in [(TINYLLAMA, 1_100_048_384), (LLAMA_7B, 6_738_415_616)]:
        assert num_parameters(fields)["total"] == published  # the checkpoints of TinyLlama and meta-llama/Llama-2-7b-hf
    counted = {"1B": 1_315_950_592, "3B": 2_651_837_440, "7B": 6_658_859_008, "13B": 12_853_954_560}
    for fields, published in zip((MPT_1B, MPT_3B, MPT_7B, MPT_13B), counted.values(), strict=True):
        assert num_parameters(fields)["total"] == pytest.approx(published, rel=5e-3)


def test_the_command_needs_no_torch():
    code = "import sys; from minillm.plan import main; code = main(sys.argv[1:]); "
    code += "sys.exit(code or bool({'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules)))"
    words = [sys.executable, "-c", code, "--config", "moe-876m", "--gpus", "8", "--gpu-memory", "24"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert math.isfinite(float(done.stdout.split("tokens/s, ")[1].split()[0]))
