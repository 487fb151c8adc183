"""A plan on a measured card: which step it takes, what follows from it by hand, and one error for every broken file."""

from __future__ import annotations

import copy
import json

import pytest

from minillm import plan
from minillm.settings.accounting import flops_per_token
from minillm.settings.presets import PRESETS
from tests.support.launching import ROOT


def step(name: str, mfu: float, preset: str | None = None, **changes) -> dict:
    return {"name": name, "preset": preset or name, "ds_config": "zero1", "micro": 16, "micro_steps": 2, "length": 512,
            "compile": True, "checkpointing": False, "tokens_per_s": 410_000, "step_seconds": 1e6, "mfu": mfu,
            "peak_bytes": 0.9e10, "planned_bytes": 1.0e10, "error": None, **changes}  # fmt: skip


RESULT = {
    "format": 1, "date": "2026-11-27", "card": "NVIDIA H200", "memory_bytes": 150_754_820_096,
    "versions": {"torch": "2.11.0", "deepspeed": "0.19.8", "transformers": "5.17.0", "cuda": "13.0"},
    "bus_bytes_per_s": None, "product_flops": {"bf16": 7.8e14}, "copy_bytes_per_s": 4.3e12,
    "steps": [
        step("dense-26m", 0.21),
        step("dense-171m", 0.41),
        step("dense-171m-eager", 0.33, "dense-171m", compile=False),
        step("dense-171m-checkpointed", 0.30, "dense-171m", checkpointing=True),
        step("moe-876m", 0.36, micro=8, peak_bytes=2.2e10, planned_bytes=2.0e10),
        step("dense-of-moe-876m", 0.55, "moe-876m"),  # another architecture than the preset's
        step("qwen3-next-mini", 0.9, error="out of memory", peak_bytes=None),
    ],
}  # fmt: skip


@pytest.fixture
def result(tmp_path):
    """Writes RESULT with changes; returns the path. Its steps are so long that their updates take no part of them."""

    def write(**changes) -> str:
        path = tmp_path / "gpu-result.json"
        path.write_text(json.dumps({**copy.deepcopy(RESULT), **changes}))
        return str(path)

    return write


def planned(capsys, path: str | None, *words: str) -> dict:
    calibrate = ["--calibrate", path] if path else []
    assert plan.main([*words, *calibrate, "--deepspeed", "zero1", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_measured_step_gives_speed_and_memory(result, capsys):
    found = planned(capsys, result(), "--config", "dense-171m")
    row = found["rows"][0]
    work = flops_per_token(PRESETS["dense-171m"], 512) * 256 * 512 / 8
    assert row["compute_seconds"] == pytest.approx(work / (0.41 * 989e12))  # the datasheet's peak, as the trainer's MFU
    assert found["device"] == "NVIDIA H200" and found["gpu_memory_bytes"] == 150_754_820_096
    assumed = planned(capsys, None, "--config", "dense-171m", "--device", "h200")["rows"][0]
    measured = row["memory_bytes"]["allocated"]
    assert measured == pytest.approx(0.9 * assumed["memory_bytes"]["allocated"])
    sentence = found["assumptions"][0]
    assert sentence.startswith("measured on NVIDIA H200, torch 2.11.0, 2026-11-27: dense-171m (dense, compiled)")
    assert "41%" in sentence and "0.90 of what was planned" in sentence and "here" not in sentence


@pytest.mark.parametrize(
    "words, mfu, differs",
    [
        (["--config", "moe-876m", "train.compile=true"], 0.36, ""),  # experts apart from dense models
        (["--config", "moe-876m", "train.compile=false"], 0.36, "train.compile on (here off)"),
        (["--config", "dense-171m", "train.compile=false"], 0.33, ""),
        (["--config", "dense-171m", "train.gradient_checkpointing=true"], 0.30, ""),
        (["--config", "dense-26m", "train.compile=true"], 0.21, ""),
        (["--config", "llama2-7b", "train.gradient_checkpointing=false", "--gpu-memory", "500"], 0.41, ""),
        (["--config", "dense-171m", "--mfu", "0.5"], 0.5, ""),
    ],
)
def test_the_step_most_like_the_run_is_taken(words, mfu, differs, result, capsys):
    """A checkpointed step's MFU leaves the recomputed third out, and a plan adds it: the two must cancel."""
    found = planned(capsys, result(), *words)
    config = words[words.index("--config") + 1]
    length, batch = {"llama2-7b": (4096, 1024), "dense-26m": (512, 64)}.get(config, (512, 256))
    row = found["rows"][0]
    tokens = row["seconds_per_step"] * row["tokens_per_s"]
    assert tokens == pytest.approx(batch * length)
    if config != "llama2-7b":
        work = flops_per_token(PRESETS[config], length) * tokens / 8
        assert row["compute_seconds"] == pytest.approx(work / (mfu * 989e12))
    else:
        assert "dense-171m (dense, compiled)" in found["assumptions"][0]
    assert differs in found["assumptions"][0]


def test_growth_is_planned_on_the_measured_card_too(result, capsys):
    words = ["--config", "dense-171m", "--gpus", "8,16", "--calibrate", result(bus_bytes_per_s=1e11), "--json"]
    assert plan.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "NVIDIA H200" and "100 GB/s of bus bandwidth (measured" in " ".join(found["assumptions"])


def test_a_card_that_is_not_listed_has_its_measured_products_for_a_peak(result, capsys):
    path = result(card="NVIDIA X1", product_flops={"bf16": 2e14}, memory_bytes=2**35)
    row = planned(capsys, path, "--config", "dense-171m")["rows"][0]
    work = flops_per_token(PRESETS["dense-171m"], 512) * 256 * 512 / 8
    assert row["compute_seconds"] == pytest.approx(work / (0.41 * 2e14))
    assert plan.main(["--config", "dense-171m", "--calibrate", path]) == 0
    text = capsys.readouterr().out
    assert "8 x NVIDIA X1 with 32 GiB" in text and "no rate of fp32 products is known of NVIDIA X1" in text


def test_a_listed_datasheet_is_the_peak_of_a_card_that_has_no_plan_of_its_own(result, capsys):
    path = result(card="NVIDIA L4", memory_bytes=24e9, copy_bytes_per_s=2.5e11)
    row = planned(capsys, path, "--config", "dense-171m")["rows"][0]
    work = flops_per_token(PRESETS["dense-171m"], 512) * 256 * 512 / 8
    assert row["compute_seconds"] == pytest.approx(work / (0.41 * 121e12))


@pytest.mark.parametrize(
    "preset, micro, batch, tokens_per_s, peak_gib",
    [("dense-26m", 32, 64, 634_561, 3.2), ("dense-171m", 64, 64, 270_280, 18.4), ("moe-876m", 32, 32, 114_905, 30.1)],
)
def test_what_one_h200_measured_comes_back(preset, micro, batch, tokens_per_s, peak_gib, capsys):
    """The table of that card in tests/gpu/README.md, from the file it was made of."""
    words = ["--config", preset, "--gpus", "1", f"train.train_batch_size={batch}", "train.compile=true"]
    words += [f"train.train_micro_batch_size_per_gpu={micro}", "model.moe_backend=torch"]
    row = planned(capsys, str(ROOT / "tests" / "gpu" / "h200.json"), *words)["rows"][0]
    assert row["tokens_per_s"] == pytest.approx(tokens_per_s, rel=0.005)
    assert row["memory_bytes"]["allocated"] / 2**30 == pytest.approx(peak_gib, rel=0.05)


STEPS = RESULT["steps"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 2}, '"format" is 2 where 1 is read'),
        ({"steps": None}, "steps = null: it must be a list"),
        ({"steps": []}, "none of its 0 steps was measured"),
        ({"steps": [STEPS[-1]]}, "none of its 1 steps was measured"),
        ({"steps": ["x"]}, 'steps[0] = "x": it must be an object'),
        ({"steps": [{**STEPS[0], "mfu": None}]}, "steps[0].mfu = null: it must be a number above 0"),
        ({"steps": [{**STEPS[0], "mfu": 41}]}, "steps[0].mfu = 41.0: it must be at most 1"),
        ({"steps": [{**STEPS[0], "preset": "dense-99m"}]}, 'steps[0].preset = "dense-99m": it must be one of'),
        ({"steps": [{**STEPS[0], "compile": 1}]}, "steps[0].compile = 1: it must be true or false"),
        ({"steps": [{**STEPS[0], "micro": 1.5}]}, "steps[0].micro = 1.5: it must be a whole number above 0"),
        ({"card": None}, "card = null: it must be a name"),
        ({"memory_bytes": "24"}, 'memory_bytes = "24": it must be a number above 0'),
        ({"bus_bytes_per_s": -1}, "bus_bytes_per_s = -1: it must be a number above 0"),
        ({"card": "NVIDIA X1", "product_flops": {}}, "NVIDIA X1 is not listed"),
        ({"card": "NVIDIA X1", "product_flops": {}, "copy_bytes_per_s": None}, "no product_flops and no copy_bytes"),
        ({"product_flops": {"bf16": 0}}, "product_flops.bf16 = 0: it must be a number above 0"),
    ],
)
def test_a_broken_file_is_one_error(changes, message, result, capsys):
    with pytest.raises(SystemExit) as end:
        plan.main(["--config", "dense-171m", "--calibrate", result(**changes)])
    printed = capsys.readouterr()
    assert end.value.code == 2 and message in printed.err and "gpu-result.json" in printed.err and not printed.out


@pytest.mark.parametrize("content, message", [(None, "no such file"), ("{", "not a JSON file"), ("[]", '"format" is')])
def test_no_file_of_that_kind_is_one_error(content, message, tmp_path, capsys):
    path = tmp_path / "gpu-result.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as end:
        plan.main(["--config", "dense-171m", "--calibrate", str(path)])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_card_is_named_once(result, capsys):
    with pytest.raises(SystemExit) as end:
        plan.main(["--config", "dense-171m", "--calibrate", result(), "--device", "a100"])
    assert end.value.code == 2 and "the file of --calibrate names the card" in capsys.readouterr().err
