"""A small form of `python -m minillm.parity`: it passes where it should; a planted wrong gradient fails it by name."""

from __future__ import annotations

import sys

import pytest

from minillm.training.gradient_parity import MODELS, TOLERANCE, Case, Result, legal_cases, run_case
from minillm.utils import distributed
from tests.support.launching import run

CASES = [
    Case("tied", "fp32", 0, 3),
    Case("multi-token", "fp32", 3, 3),
    Case("softmax experts, tied", "fp32", 2, 3, "deepspeed", 2),
    Case("softmax experts, tied", "bf16", 3, 1, "autoep", 2),
    Case("sigmoid experts, multi-token", "fp32", 3, 3, "autoep", 2),
    Case("noisy experts with biases", "fp32", 1, 3, "deepspeed", 2),
    Case("noisy experts with biases", "bf16", 2, 1, "deepspeed", 2),
    Case("softmax experts, tied", "fp32", 2, 1, "deepspeed", 2, capacity_factor=0.8),
    Case("tied", "fp32", 1, 3, optimizer="muon"),
    Case("tied", "bf16", 2, 3, optimizer="muon"),
    Case("sigmoid experts, multi-token", "fp32", 2, 1, "deepspeed", 2, optimizer="muon"),
]


def on_a_rank(words: list, factor: float) -> list:
    """The errors of a case; the gradients of rank 1's experts of one layer are `factor` times what they should be."""

    def disturb(module) -> None:
        for name, parameter in module.named_parameters():
            if "layers.1.mlp" in name and "experts" in name and distributed.rank() == 1:
                parameter.register_hook(lambda gradient: gradient * factor)

    result = run_case(Case(*words), *([disturb] if factor != 1 else []))
    return [result.gradient, result.weight, result.norm]


@pytest.fixture(scope="module")
def found(two_ranks) -> list:
    planted = [(case, 1.001 if case.precision == "fp32" else 2.0) for case in CASES if case.expert_parallel > 1]
    arguments = [[list(vars(case).values()), factor] for case, factor in [*((case, 1) for case in CASES), *planted]]
    return two_ranks.call("tests.training.test_gradient_parity:on_a_rank", arguments)


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(str, CASES))
def test_the_engine_equals_plain_torch(found, number):
    (gradient, _), (weight, _), norm = found[number]
    assert 0 < gradient <= TOLERANCE[CASES[number].precision]
    assert weight <= TOLERANCE[CASES[number].precision] and norm <= TOLERANCE[CASES[number].precision]


def test_a_wrong_gradient_is_found_and_named(found):
    """One rank's experts of one layer wrong by a thousandth (bf16: by a factor of 2): named, and past the tolerance."""
    shared_out = [case for case in CASES if case.expert_parallel > 1]
    assert len(found) == len(CASES) + len(shared_out)
    for case, ((gradient, name), _, _) in zip(shared_out, found[len(CASES) :]):
        assert gradient == pytest.approx(1e-3 if case.precision == "fp32" else 1.0, rel=0.2), case
        assert gradient > TOLERANCE[case.precision] and "layers.1.mlp.experts" in name


@pytest.mark.parametrize("place", range(3))
def test_nan_is_within_no_tolerance(place):
    errors = [(0.0, "a"), (0.0, "b"), (0.0, "c")]
    errors[place] = (float("nan"), "wrong")
    result = Result(errors[0], errors[1], errors[2][0])
    assert not result.within(1e-5)
    assert result.worst()[1] == (errors[place][1] if place < 2 else "the gradient norm")


def test_the_whole_covers_every_legal_combination():
    cases = list(legal_cases(2))
    assert len(set(cases)) == len(cases)
    assert {case.model for case in cases} == set(MODELS)
    assert {(c.backend, c.stage) for c in cases if c.expert_parallel == 2} == {
        ("deepspeed", 1), ("deepspeed", 2), ("autoep", 1), ("autoep", 2), ("autoep", 3)
    }  # fmt: skip
    assert not [c for c in cases if c.model.startswith("noisy") and c.backend == "autoep"]  # experts with biases
    assert not [c for c in cases if c.precision == "bf16" and c.stage == 0]
    assert {(c.precision, c.stage) for c in cases if c.model == "tied"} == {
        *(("fp32", stage) for stage in range(4)), *(("bf16", stage) for stage in range(1, 4))
    }  # fmt: skip


@pytest.mark.slow
def test_the_command_exits_1_when_a_case_is_past_the_tolerance(tmp_path):
    words = [sys.executable, "-m", "minillm.parity", "--only", "tied, ZeRO-2", "fp32", "accumulation 3"]
    good = run(words, cwd=tmp_path)
    assert "0 of 1 cases wrong" in good.stdout
    code = "import sys; from minillm import parity; from minillm.training import gradient_parity as cases; "
    code += "cases.TOLERANCE['fp32'] = 0.0; sys.exit(parity.main())"
    alone = [sys.executable, "-c", code, "--only", "tied, ZeRO-2", "fp32", "accumulation 3"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "--no-python"]
    bad = run([*launcher, *alone], cwd=tmp_path, check=False)
    assert bad.returncode == 1 and "1 of 1 cases wrong" in bad.stdout and "WRONG: " in bad.stdout
