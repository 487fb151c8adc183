"""Balance of the experts: the record of a step, the watch over idle experts, and both in real runs."""

from __future__ import annotations

import json
import random
import re
import signal

import matplotlib.image
import pytest
import torch

from minillm.models import MiniLLMConfig
from minillm.models.moe import SparseMoE
from minillm.run_folder import RunFolder
from minillm.training.checkpoint import read_state
from minillm.training.expert_load import (
    count_idle_steps,
    experts_record,
    idle_warning,
    scalars,
    sparse_layers,
    summary,
    update_router_biases,
)
from minillm.training.plots import draw_experts
from minillm.training.state import TrainState
from tests.support.in_process import built_trainer
from tests.support.launching import metrics
from tests.support.toy_presets import toy_fields, toy_model

ROUTING = {
    "counts": torch.tensor([[6, 2, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0]], dtype=torch.float64),
    "dropped": torch.tensor([2, 0, 0], dtype=torch.float64),
    "entropy": torch.tensor([4.0, 5.0, 0.0], dtype=torch.float64),
    "tokens": torch.tensor([4, 4, 0], dtype=torch.float64),
    "load_balancing": torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64),
}
LAYERS = [1, 3, "mtp1"]


# the record of a step


def test_a_record_by_hand():
    assert experts_record(ROUTING, LAYERS) == {
        "layers": LAYERS,
        "share": [[0.75, 0.25, 0, 0], [0.25] * 4, [0] * 4],
        "max_over_mean": [3.0, 1.0, None],
        "max_over_min": [None, 1.0, None],
        "dropped": [0.25, 0.0, 0.0],
        "entropy": [1.0, 1.25, None],
        "load_balancing": [3.0, 2.0, 0.0],
    }


def test_the_summary_is_of_the_layers_that_had_tokens():
    found = summary(experts_record(ROUTING, LAYERS))
    assert found == {"moe/max_over_mean": 3.0, "moe/dropped": pytest.approx(0.25 / 3, rel=1e-5), "moe/entropy": 1.125}
    assert summary(experts_record({name: value * 0 for name, value in ROUTING.items()}, LAYERS)) == {}


def test_scalars_are_named_by_layer_and_expert():
    found = scalars(experts_record(ROUTING, LAYERS))
    assert found["experts/layer_01/share_00"] == 0.75 and found["experts/layer_03/max_over_min"] == 1.0
    assert found["experts/layer_01/load_balancing"] == 3.0 and found["experts/mtp1/share_03"] == 0
    assert "experts/layer_01/max_over_min" not in found and "experts/mtp1/entropy" not in found


@pytest.mark.parametrize("preset", ["deepseek-v3-mini", "residual-moe-mini", "gpt2-124m"])
def test_layers_are_those_with_experts(preset):
    model = toy_model(preset)
    places = [name for name, module in model.named_modules() if isinstance(module, SparseMoE)]
    named = [int(m[1]) if (m := re.match(r"model\.layers\.(\d+)", p)) else "mtp1" for p in places]
    assert sparse_layers(model.config) == named
    assert ("mtp1" in named) == (preset == "deepseek-v3-mini")


def test_biases_follow_the_counts_of_their_own_layer():
    model = toy_model("deepseek-v3-mini")
    experts, layers = model.config.num_experts, sparse_layers(model.config)
    counts = torch.full((len(layers), experts), 4, dtype=torch.float64)
    for row in range(len(layers)):
        counts[row, row] = 9
    update_router_biases(model, counts)
    blocks = [module for module in model.modules() if isinstance(module, SparseMoE)]
    for row, block in enumerate(blocks):
        assert block.gate.e_score_correction_bias.argmin() == row


# idle experts


def slow_idle_steps(history: list[list[list[int]]]) -> list[list[int]]:
    """Steps back to the last that gave the expert a token, over those that gave its layer one at all."""
    found = []
    for layer in range(len(history[0])):
        seen = [step[layer] for step in history if sum(step[layer])]
        found.append([
            next((back for back, counts in enumerate(reversed(seen)) if counts[expert]), len(seen))
            for expert in range(len(history[0][0]))
        ])  # fmt: skip
    return found


def test_idle_steps_equal_a_look_back_over_all_steps():
    draw, idle, history, longest = random.Random(1), None, [], 0
    for _ in range(60):
        history.append([[draw.choice([0, 0, 0, 5]) for _ in range(4)] for _ in range(3)])
        idle = count_idle_steps(idle, torch.tensor(history[-1], dtype=torch.float64))
        assert idle == slow_idle_steps(history)
        longest = max(longest, *map(max, idle))
    assert longest > 5 and any(not sum(layer) for step in history for layer in step)


def warnings_over(steps: int, counts: list[list[int]], every: int, layers, **fields) -> dict[int, str]:
    """By step, what is said when every step has these counts."""
    idle, said = None, {}
    for step in range(1, steps + 1):
        before, idle = idle, count_idle_steps(idle, torch.tensor(counts, dtype=torch.float64))
        if warning := idle_warning(before, idle, every, layers, MiniLLMConfig(**toy_fields("mixtral-mini", **fields))):
            said[step] = warning
    return said


def test_an_idle_expert_is_warned_of_by_name_every_so_many_steps():
    counts = [[1, 1, 1, 1, 1, 0, 1, 1], [0, 1, 0, 1, 1, 1, 1, 1], [2] * 8]
    said = warnings_over(25, counts, 10, [3, 7, "mtp1"], router_aux_loss_coef=0.01)
    assert said == {
        steps: f"no token for {steps} steps: layer 3 expert 5, layer 7 experts 0 and 2; raise "
        f"model.router_aux_loss_coef (now 0.01) in a new run, or lower optim.learning_rate in this one"
        for steps in (10, 20)
    }
    assert warnings_over(25, counts, 0, [3, 7, "mtp1"]) == {}


def test_a_step_without_tokens_warns_of_nothing_again():
    config, layers = MiniLLMConfig(**toy_fields("mixtral-mini")), [0]
    idle = [[10, 0]]
    assert idle_warning([[9, 0]], idle, 10, layers, config)
    assert idle_warning(idle, count_idle_steps(idle, torch.zeros(1, 2)), 10, layers, config) is None


def test_a_warning_stays_readable_and_names_what_the_model_balances_with():
    counts = [[0, 0, 0, 1, 0, 1, 0, 0]] * 12
    (warning,) = warnings_over(4, counts, 4, range(12), router_type="sigmoid", router_aux_loss_coef=0.0,
                               router_bias_update_speed=0.001, router_z_loss_coef=0.1).values()  # fmt: skip
    assert "layer 0 experts 0 to 2, 4, 6 and 7, layer 1" in warning and "layer 7" in warning
    assert "layer 8" not in warning and "and 4 more layers (see experts.jsonl)" in warning
    assert "raise model.router_bias_update_speed (now 0.001) in" in warning
    (warning,) = warnings_over(1, counts, 1, range(12), router_aux_loss_coef=0.0).values()
    assert "set model.router_aux_loss_coef (now 0)" in warning


def test_a_checkpoint_from_before_the_watch_loads():
    values = TrainState(step=7).as_dict()
    del values["expert_idle_steps"]
    assert TrainState.from_dict(values).expert_idle_steps is None


# real runs

EVERY = 3


class SignalAfter:
    """A StopRequest that has a signal after so many looks, one a step."""

    def __init__(self, steps: int | None):
        self.left = steps

    @property
    def number(self) -> int:
        if self.left is None:
            return 0
        self.left -= 1
        return 0 if self.left >= 0 else signal.SIGTERM


@pytest.fixture
def moe_settings(settings) -> dict[str, object]:
    fields = toy_fields("mixtral-mini", vocab_size=384, router_type="sigmoid", router_z_loss_coef=1e-3)
    own = {f"model.{name}": value for name, value in fields.items() if not name.endswith("token_id")}
    settings = {name: value for name, value in settings.items() if not name.startswith("model.")}
    return {
        **settings, **own, "model.preset": "mixtral-mini", "train.max_steps": 7, "validation.every": 0,
        "checkpoint.every": 0, "log.idle_expert_steps": EVERY,
    }  # fmt: skip


def run_with_idle_experts(settings: dict, stop_after: int | None = None) -> int:
    """Train; before the first step the biases of three experts sink, so that no token chooses them."""
    trainer = built_trainer(settings)
    if trainer.state.step == 0:
        layers = trainer.engine.module.model.layers
        for layer, expert in ((1, 5), (3, 0), (3, 2)):
            layers[layer].mlp.gate.e_score_correction_bias[expert] = -10
    try:
        return trainer.run_to_end(SignalAfter(stop_after))
    finally:
        trainer.close(0)


def experts_lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "experts.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("group")
def test_a_collapse_warns_by_name_and_shows_in_the_files(moe_settings, tmp_path, capsys):
    assert run_with_idle_experts(moe_settings) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "no token" in line]
    assert [line.split(";")[0] for line in said] == [
        f"[minillm] warning: step {steps}: no token for {steps} steps: layer 1 expert 5, layer 3 experts 0 and 2"
        for steps in (3, 6)
    ]
    records = experts_lines(tmp_path / "r")
    assert [record["step"] for record in records] == list(range(1, 8))
    for record, line in zip(records, metrics(tmp_path / "r"), strict=True):
        assert record["layers"] == [0, 1, 2, 3]
        for layer, share in enumerate(record["share"]):
            assert len(share) == 8 and sum(share) == pytest.approx(1, abs=1e-5)
            assert record["max_over_mean"][layer] == pytest.approx(8 * max(share), rel=1e-4)
        assert record["share"][1][5] == record["share"][3][0] == record["share"][3][2] == 0
        assert record["max_over_min"][1] is None and record["dropped"] == [0] * 4
        assert all(0 < entropy <= 2.0795 for entropy in record["entropy"])  # log 8
        for name in ("load_balancing", "router_z"):
            assert sum(record[name]) == pytest.approx(line[name], rel=1e-5)
        assert line["moe/max_over_mean"] == max(record["max_over_mean"]) and line["moe/dropped"] == 0
    assert matplotlib.image.imread(tmp_path / "r" / "plots" / "experts.png").shape[0] > 300


@pytest.mark.usefixtures("group")
def test_resume_continues_the_watch_to_the_bit(moe_settings, tmp_path, capsys):
    straight, broken = {**moe_settings, "run_name": "straight"}, {**moe_settings, "run_name": "broken"}
    assert run_with_idle_experts(straight) == 0
    assert run_with_idle_experts(broken, stop_after=4) == 128 + signal.SIGTERM
    for picture in ("loss.png", "experts.png"):  # a run that has to leave shows where it was
        assert (tmp_path / "broken" / "plots" / picture).stat().st_size > 5000
    with open(tmp_path / "broken" / "experts.jsonl", "a") as file:  # of a step after the checkpoint, then a kill
        file.write(json.dumps({**experts_lines(tmp_path / "broken")[-1], "step": 5}) + '\n{"step": 6, "la')
    capsys.readouterr()
    assert run_with_idle_experts(broken) == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "no token" in line]
    assert "step 6: no token for 6 steps: layer 1 expert 5, layer 3 experts 0 and 2;" in said
    states = [read_state(RunFolder(tmp_path / name).checkpoint(7))[0] for name in ("straight", "broken")]
    assert states[0].expert_idle_steps == states[1].expert_idle_steps
    assert states[0].expert_idle_steps[1][5] == 7
    assert experts_lines(tmp_path / "straight") == experts_lines(tmp_path / "broken")


@pytest.mark.usefixtures("group")
def test_accumulation_does_not_change_the_record(moe_settings, tmp_path):
    records = {}
    for micro in (1, 4):  # 8 micro-batches, and 2
        own = {"run_name": f"by-{micro}", "train.train_micro_batch_size_per_gpu": micro, "train.max_steps": 1}
        run_with_idle_experts({**moe_settings, **own})
        (records[micro],) = experts_lines(tmp_path / f"by-{micro}")
    assert records[1]["share"] == records[4]["share"]
    for name in ("entropy", "load_balancing", "router_z"):
        assert records[1][name] == pytest.approx(records[4][name], rel=2e-5)


# the picture


def history(run_dir, layers: int, experts: int, steps: int, idle: tuple[int, int]) -> None:
    """A run folder whose expert `idle` gets nothing in the second half, all others even shares."""
    run_dir.mkdir()
    lines = []
    for step in range(1, steps + 1):
        share = [[1 / experts] * experts for _ in range(layers)]
        if step > steps // 2:
            row = share[idle[0]]
            row[:] = [1 / (experts - 1)] * experts
            row[idle[1]] = 0.0
        worst = [experts * max(row) for row in share]
        record = {"layers": list(range(layers)), "share": share, "max_over_mean": worst, "dropped": [0.0] * layers}
        lines.append(json.dumps({"step": 10 * step, **record}) + "\n")
    (run_dir / "experts.jsonl").write_text("".join(lines))


@pytest.mark.parametrize(("layers", "experts", "steps"), [(1, 4, 1), (2, 8, 50), (24, 64, 450)])
def test_the_heat_map_shows_an_idle_expert_in_black(tmp_path, layers, experts, steps):
    history(tmp_path / "run", layers, experts, steps, idle=(layers - 1, 2))
    path = draw_experts(RunFolder(tmp_path / "run"))
    picture = matplotlib.image.imread(path)[..., :3]
    height, width = picture.shape[:2]
    assert height <= 12 * 200 and width <= 8.5 * 200
    # The panels' frames are black too: count rows of pixels that are black in the right half only.
    middle = picture[:, int(0.3 * width) : int(0.45 * width)].max(axis=(1, 2))
    right = picture[:, int(0.6 * width) : int(0.75 * width)].max(axis=(1, 2))
    black = (right < 0.1) & (middle > 0.5)
    if steps == 1:  # the whole width is idle
        black = (right < 0.1) & (middle < 0.1)
        assert black.sum() > 0.1 * height
    else:
        assert 1 <= black.sum() < 2 * height / (layers * experts)


def test_without_experts_there_is_no_picture(tmp_path):
    assert draw_experts(RunFolder(tmp_path)) is None
