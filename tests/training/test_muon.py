"""Muon against its definition in fp64 by singular value decomposition, against torch's own, and under every ZeRO stage.

Two ranks train all that needs two (QUICK, or the slow rest); the losses have to be those of a plain
torch loop with the definition for an optimizer.
"""

from __future__ import annotations

import math
import re
import shutil

import pytest
import torch

from minillm.settings.run import OptimSection
from minillm.training.muon import is_matrix, orthogonalise, update_flops
from minillm.training.muon_exchange import Matrix, share_out
from minillm.training.optim import build_optimizer, moments_of
from minillm.utils.errors import UserError
from tests.support.in_process import train
from tests.support.launching import checkpoint, losses, same_bits
from tests.support.ranks import Ranks
from tests.support.toy_presets import toy_fields, toy_model
from tests.training.test_same_losses import BF16, DECAY, FP32, RATE, adamw, plain_torch, zero
from tests.training.test_same_losses import settings as settings  # a fixture

# Of three layers, so that the border between two ranks cuts a matrix at ZeRO-1 and 2.
MUON = {"optim.name": "muon", "model.num_hidden_layers": 3}
STEPS, HALF, MOMENTUM = 6, 3, 0.95
QUICK = {"zero0", "zero2", "zero2-broken", "zero3", "zero3-broken", "bf16-zero3", "experts-torch", "experts-autoep"}


def definition(matrix: torch.Tensor) -> torch.Tensor:
    """Jordan's quintic, five times, on the singular values of a matrix scaled to Frobenius norm 1, in fp64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt().clamp(min=1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


class Definition(torch.optim.Optimizer):
    """Muon of 2-D parameters, one after the other, with the size of arXiv:2502.16982."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            average = self.state[p].get("average", torch.zeros_like(p, dtype=torch.float64))
            average = self.state[p]["average"] = MOMENTUM * average + (1 - MOMENTUM) * p.grad
            ahead = MOMENTUM * average + (1 - MOMENTUM) * p.grad
            update = 0.2 * math.sqrt(max(p.shape)) * definition(ahead)
            p.copy_((1 - RATE * DECAY) * p - RATE * update)


class DefinitionAndAdamW:
    """The projections by the definition, the rest by torch's AdamW."""

    def __init__(self, model: torch.nn.Module):
        of_muon = {n: p for n, p in model.named_parameters() if re.search(r"(q|k|v|o|gate|up|down)_proj\.weight$", n)}
        assert len(of_muon) == 7 * model.config.num_hidden_layers
        self.muon, self.adamw = Definition(of_muon.values()), adamw(model)
        for group in self.adamw.param_groups:
            group["params"] = [p for p in group["params"] if all(p is not other for other in of_muon.values())]

    def zero_grad(self):
        self.muon.zero_grad(), self.adamw.zero_grad()

    def step(self):
        self.muon.step(), self.adamw.step()


def with_singular_values(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(rows)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=draw, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=draw, dtype=torch.float64)).Q
    return left @ torch.diag(values) @ right.T


@pytest.mark.parametrize("rows, columns", [(24, 24), (24, 60), (60, 24), (1, 24)])
def test_singular_values_end_near_1_and_their_vectors_stay(rows, columns):
    values = torch.logspace(0, -2, min(rows, columns), dtype=torch.float64)
    stack = torch.stack([with_singular_values(scale * values, rows, columns) for scale in (1e-4, 1.0, 1e4)])
    found = orthogonalise(stack.float())
    for one in found.double():
        assert ((torch.linalg.svdvals(one) - 1).abs() <= 0.5).all()  # "S' ~ Uniform(0.5, 1.5)", Jordan's source
        assert torch.allclose(one, definition(stack[1]), atol=1e-4)


def test_a_matrix_of_zeros_stays_zero():
    assert not orthogonalise(torch.zeros(2, 3, 4)).any()


def test_bf16_is_close_to_the_definition():
    matrix = with_singular_values(torch.logspace(0, -1, 24, dtype=torch.float64), 24, 60)
    found = orthogonalise(matrix.bfloat16()[None])[0].double()
    assert (found - definition(matrix)).norm() <= 0.05 * definition(matrix).norm()


OF_ADAMW = {  # what else of the layers has two dimensions: routers, gates, biases of experts, short convolutions
    "demo": set(),
    "moe-876m": {"mlp.gate.router.weight", "mlp.gate.noise.weight", "mlp.experts.up_bias", "mlp.experts.down_bias"},
    "deepseek-v3-mini": {"mlp.gate.weight"},
    "qwen3-next-mini": {"mlp.gate.weight", "mlp.shared_expert_gate.weight", "mixer.conv.weight"},
    "residual-moe-mini": {"mlp.gate.weight", "mlp.coefficient.weight", "mlp.experts.up_bias", "mlp.experts.down_bias"},
}


@pytest.mark.parametrize("preset", OF_ADAMW)
def test_the_projections_of_the_layers_are_muons(preset):
    model = toy_model(preset)
    optimizer = build_optimizer(model, OptimSection(name="muon"))
    of_muon = {id(p) for group in optimizer.param_groups if group.get("muon") for p in group["params"]}
    rest = {name for name, p in model.named_parameters() if id(p) not in of_muon and p.dim() >= 2}
    in_layers = {re.sub(r".*layers?\.(\d+\.)?", "", name) for name in rest if "layer" in name}
    assert in_layers == OF_ADAMW[preset]
    assert "model.embed_tokens.weight" in rest and not [name for name in rest if name.endswith("proj.weight")]
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def updates(model: torch.nn.Module, optim: OptimSection, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a first step adds to each parameter."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, optim)
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def random_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {name: torch.randn(p.shape, generator=draw) for name, p in model.named_parameters()}


def test_stacks_and_fused_projections_are_orthogonalised_matrix_by_matrix():
    model = toy_model("qwen3-next-mini")
    gradients, rate = random_gradients(model), 0.01
    found = updates(model, OptimSection(name="muon", learning_rate=rate, weight_decay=0), gradients)

    def expected(gradient: torch.Tensor) -> torch.Tensor:
        return -rate * 0.2 * math.sqrt(max(gradient.shape)) * definition(gradient)

    experts, qkv = "model.layers.1.mlp.experts", "model.layers.0.mixer.qkv_proj.weight"
    heads = model.model.layers[0].mixer.widths
    cases = [
        *((f"{experts}.gate_up_proj", (i, half)) for i in range(2) for half in (slice(0, 32), slice(32, 64))),
        *((f"{experts}.down_proj", (i,)) for i in range(2)),
        *((qkv, (slice(begin, begin + width),)) for begin, width in zip((0, heads[0], 2 * heads[0]), heads)),
    ]
    for name, place in cases:
        one, other = found[name][place], expected(gradients[name][place])
        assert (one - other).abs().max() <= 1e-3 * other.abs().max(), (name, place)


def test_adamw_has_the_rest_with_its_own_decay():
    model, plain = toy_model("demo"), toy_model("demo")
    gradients = random_gradients(model)
    found = updates(model, OptimSection(name="muon"), gradients)
    expected = updates(plain, OptimSection(name="adamw"), gradients)
    for name, update in expected.items():
        assert torch.equal(found[name], update) == ("_proj" not in name), name


def test_muons_own_rate_scales_its_update_alone():
    one, other = toy_model("demo"), toy_model("demo")
    gradients = random_gradients(one)
    plain = updates(one, OptimSection(name="muon", weight_decay=0), gradients)
    scaled = updates(other, OptimSection(name="muon", weight_decay=0, muon_learning_rate=4e-3), gradients)
    for name, update in plain.items():
        factor = 4 if "_proj" in name else 1
        assert torch.allclose(scaled[name], factor * update, rtol=1e-4, atol=1e-6), name


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
def test_five_steps_equal_torchs_own():
    """torch's computes in bf16, whose rounding an update shows; the momenta are in fp32 on both sides."""
    draw = torch.Generator().manual_seed(0)
    model = toy_model("demo")
    named = {name: p for name, p in model.named_parameters() if is_matrix(name, p.shape)}
    theirs = {name: p.detach().clone().requires_grad_() for name, p in named.items()}
    before = {name: p.detach().clone() for name, p in named.items()}
    ours = build_optimizer(model, OptimSection(name="muon", learning_rate=RATE, weight_decay=DECAY))
    ours.bind((), torch.device("cpu"), torch.bfloat16)
    options = {"momentum": MOMENTUM, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon(theirs.values(), lr=RATE, weight_decay=DECAY, **options)
    for _ in range(5):
        for name, parameter in named.items():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
            theirs[name].grad = parameter.grad.clone()
        ours.step()
        reference.step()
    for name, parameter in named.items():
        moved, expected = parameter - before[name], theirs[name] - before[name]
        assert (moved - expected).norm() <= 0.02 * expected.norm(), name
        average = reference.state[theirs[name]]["momentum_buffer"]
        assert torch.allclose(ours.state[parameter]["momentum_buffer"], average, rtol=1e-6, atol=1e-8)


def pieces_of(sizes: list[int], border: int, ranks: int) -> list[Matrix]:
    """Square matrices end to end, of which each rank has a stretch of `border` elements."""
    from minillm.compat.deepspeed_api import Slice

    matrices, begin = [], 0
    for size in sizes:
        end = begin + size * size
        stretches = [(max(begin, r * border), min(end, (r + 1) * border)) for r in range(ranks)]
        slices = [Slice(a - begin, max(a, b) - begin, a - r * border) for r, (a, b) in enumerate(stretches)]
        matrices += Matrix.all_of([(size, size)], slices, 0)
        begin = end
    return matrices


def test_only_what_a_border_cuts_travels_and_the_work_is_even():
    sizes = [8, 8, 16, 16, 8, 8, 16, 16] * 4
    border = sum(size * size for size in sizes) // 4 + 5  # cuts a matrix at each of the three borders
    matrices = pieces_of(sizes, border, 4)
    tasks = [task for bucket in share_out(matrices, update_flops, 2**20) for task in bucket]
    assert sorted(map(id, (task.matrix for task in tasks))) == sorted(map(id, matrices))
    sent = [task for task in tasks if any(task.sent_by(rank) for rank in range(4))]
    assert len(sent) == 3
    assert all(task.owner in task.matrix.holders() for task in tasks)
    loads = [sum(update_flops(task.matrix.shape) for task in tasks if task.owner == rank) for rank in range(4)]
    assert max(loads) - min(loads) <= 2 * update_flops((16, 16))


def test_where_everybody_holds_a_slice_the_work_is_shared_out_evenly():
    from minillm.compat.deepspeed_api import Slice

    slices = [Slice(start, start + 64, 0) for start in range(0, 256, 64)]
    matrices = [matrix for _ in range(10) for matrix in Matrix.all_of([(16, 16)], slices, 0)]
    buckets = share_out(matrices, update_flops, 512)  # of two matrices a rank
    owners = [task.owner for bucket in buckets for task in bucket]
    assert len(buckets) == 2 and sorted(owners.count(rank) for rank in range(4)) == [2, 2, 3, 3]


# Under DeepSpeed's engine


EXPERTS = {
    "model.preset": "mixtral-mini",
    **{f"model.{key}": value for key, value in toy_fields("mixtral-mini", vocab_size=384).items()
       if not key.endswith("token_id")},
}  # fmt: skip


def cases_of(settings: dict, root) -> dict[str, list[dict]]:
    """Run name -> its starts, one after the other."""
    common = {**settings["text"], **MUON, "train.train_micro_batch_size_per_gpu": 2, "run_root": str(root),
              "train.max_steps": STEPS, "checkpoint.every": HALF, "checkpoint.keep": 9}  # fmt: skip
    plain = {key: value for key, value in common.items() if not key.startswith("model.")}
    starts = {
        **{f"zero{stage}": [({}, zero(stage, FP32))] for stage in range(4)},
        "zero2-offload": [({}, zero(2, FP32, offload_optimizer={"device": "cpu"}))],
        "zero3-small": [({}, zero(3, FP32, sub_group_size=3000))],
        **{f"bf16-zero{stage}": [({}, zero(stage, BF16))] for stage in (1, 2, 3)},
        **{f"{name}-broken": [({"train.max_steps": steps}, json_file) for steps in (HALF, STEPS)]
           for name, json_file in (("zero2", zero(2, FP32)), ("zero3", zero(3, FP32)), ("bf16-zero2", zero(2, BF16)))},
        **{f"experts-{backend}": [
            ({**EXPERTS, "model.moe_backend": backend, "model.expert_parallel_size": size}, zero(stage, FP32))]
           for backend, size, stage in (("torch", 1, 2), ("deepspeed", 2, 1), ("autoep", 2, 3))},
    }  # fmt: skip
    return {
        name: [{"settings": {**(plain if name.startswith("experts") else common), "run_name": name, **own},
                "deepspeed": json_file} for own, json_file in of_run]
        for name, of_run in starts.items()
    }  # fmt: skip


def train_all(names: set[str], settings: dict, root, ranks: Ranks) -> None:
    ranks.train([start for name, of_run in cases_of(settings, root).items() if name in names for start in of_run])


@pytest.fixture(scope="module")
def trained(settings, two_ranks, tmp_path_factory):
    root = tmp_path_factory.mktemp("muon")
    train_all(QUICK, settings, root, two_ranks)
    return root


@pytest.fixture(scope="module")
def all_trained(trained, two_ranks, settings):
    train_all(cases_of(settings, trained).keys() - QUICK, settings, trained, two_ranks)
    return trained


@pytest.fixture
def runs(name: str, request):
    return request.getfixturevalue("trained" if name in QUICK else "all_trained")


def each(*names: str) -> list:
    """Names of runs, what needs a slow one marked so."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def expected(settings) -> list[float]:
    return plain_torch({**settings["text"], **MUON}, STEPS, DefinitionAndAdamW)


DENSE = ("zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-small", "bf16-zero1", "bf16-zero2", "bf16-zero3")


@pytest.mark.parametrize("name", each(*DENSE))
def test_losses_equal_plain_torch_with_the_definition(runs, expected, name):
    assert losses(runs / name) == pytest.approx(expected, rel=5e-3 if "bf16" in name else 1e-5)


@pytest.mark.parametrize("name", each("zero2-broken", "zero3-broken", "bf16-zero2-broken"))
def test_a_break_changes_no_bit(runs, name):
    straight = runs / name.removesuffix("-broken")
    assert losses(runs / name) == losses(straight)
    assert same_bits(checkpoint(runs / name, STEPS), checkpoint(straight, STEPS))


@pytest.mark.parametrize("name", each("experts-deepspeed", "experts-autoep"))
def test_shared_out_experts_train_as_experts_in_one_place(runs, name):
    assert losses(runs / name) == pytest.approx(losses(runs / "experts-torch"), rel=1e-5)


@pytest.mark.slow
def test_four_ranks_share_experts_out_and_share_them(trained, expected, settings, tmp_path):
    """Matrices in more pieces, and experts whose states are shared out among two of the ranks."""
    chosen = {"zero1", "zero3", "experts-deepspeed", "experts-autoep"}
    with Ranks(4) as four:
        train_all(chosen, settings, tmp_path, four)
    for name in chosen:
        straight = losses(trained / "experts-torch") if name.startswith("experts") else expected
        assert losses(tmp_path / name) == pytest.approx(straight, rel=1e-5), name


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name, stage", [("zero2", 1), ("zero3", 0), ("experts-autoep", 1)])
def test_one_rank_goes_on_at_another_stage(trained, settings, tmp_path, name, stage):
    shutil.copytree(trained / name, tmp_path / name)
    shutil.rmtree(tmp_path / name / "checkpoints" / f"step-{STEPS:06d}")
    (start,) = cases_of(settings, tmp_path)[name]
    alone = {"model.moe_backend": "torch", "model.expert_parallel_size": 1} if "experts" in name else {}
    train({**start["settings"], **alone}, zero(stage, FP32))
    assert losses(tmp_path / name) == pytest.approx(losses(trained / name), rel=1e-5)


def test_a_checkpoint_holds_one_momentum_for_each_matrix_and_adamws_moments_for_the_rest(trained):
    tensors = checkpoint(trained / "experts-autoep", STEPS)
    weights = {name: t for name, t in tensors.items() if not name.startswith(("exp_avg", "momentum_buffer"))}
    for name, weight in weights.items():
        kinds = ("momentum_buffer",) if re.search(r"_proj(\.weight)?$", name) else ("exp_avg", "exp_avg_sq")
        assert moments_of("muon", name, weight.shape) == kinds
        for kind in kinds:
            assert tensors[f"{kind}.{name}"].shape == weight.shape and tensors[f"{kind}.{name}"].any()
    assert len(tensors) == sum(1 + len(moments_of("muon", name, w.shape)) for name, w in weights.items())
    assert {name: t.shape for name, t in tensors.items()} == {
        name: t.shape for name, t in checkpoint(trained / "experts-torch", STEPS).items()
    }


@pytest.mark.usefixtures("group")
def test_a_run_keeps_its_optimizer(settings, tmp_path):
    own = {**settings["text"], **MUON, "run_root": str(tmp_path), "run_name": "r", "train.max_steps": 1}
    train(own)
    with pytest.raises(UserError, match="optim.name: was 'muon', now 'adamw'"):
        train({**own, "optim.name": "adamw", "train.max_steps": 2})
    path = tmp_path / "r" / "run.yaml"
    path.write_text(re.sub(r"\n  name: muon", "", path.read_text()))  # as of a run before there was a choice
    with pytest.raises(UserError, match="optim.name: was 'adamw', now 'muon'"):
        train({**own, "train.max_steps": 2})
