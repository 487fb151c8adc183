"""Damaged checkpoints: each file of one, each way; what resume says, and that nothing is lost.

Contract: damage that the manifest shows makes resume warn with the name of the file and take the previous checkpoint,
from which the run ends with the bits of an unbroken one. Damage that the manifest agrees with (another tool's work) is
one error that names the file, and changes nothing. No whole checkpoint left is one error, never a fresh start. Nothing
is unpickled.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.run_folder import RunFolder
from minillm.utils.errors import UserError
from minillm.utils.files import MANIFEST, manifest_problems, write_json
from tests.faults.damage_files import as_nobody, contents, cut, flip, group_of_one, relist
from tests.support.in_process import train
from tests.support.launching import ROOT, checkpoint, command, losses, run, same_bits

pytestmark = pytest.mark.faults
SECTION = "Damaged checkpoints"
STEPS, NEWEST, PREVIOUS = 6, 4, 2
WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


@pytest.fixture(scope="module", autouse=True)
def group():
    with group_of_one():
        yield


@pytest.fixture
def broken(straight, tmp_path) -> dict:
    """A copy of the run that stopped after step 4; a test may damage it."""
    shutil.copytree(Path(straight["run_root"]) / "r", tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints" / f"step-{STEPS:06d}")
    recorded = tmp_path / "r" / "run.yaml"
    recorded.write_text(recorded.read_text().replace(straight["run_root"], str(tmp_path)))
    return {**straight, "run_root": str(tmp_path)}


def folder_of(settings: dict, step: int = NEWEST) -> Path:
    return Path(settings["run_root"]) / "r" / "checkpoints" / f"step-{step:06d}"


def ends_as_the_unbroken_run(settings: dict, straight: dict) -> None:
    run_dir, other = Path(settings["run_root"]) / "r", Path(straight["run_root"]) / "r"
    assert same_bits(checkpoint(run_dir, STEPS), checkpoint(other, STEPS))
    assert losses(run_dir) == losses(other)


def change_json(path: Path, change) -> None:
    values = json.loads(path.read_text())
    write_json(path, change(values) or values)


def change_tensors(path: Path, change) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


class Bomb:
    """What a pickle of it does when it is loaded: make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def plant_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(path.parents[3] / "unpickled")))


def plant_torch_file(path: Path) -> None:
    torch.save(Bomb(path.parents[3] / "unpickled"), path)


def other_steps(name: str):
    return lambda folder: shutil.copy(folder.with_name(f"step-{PREVIOUS:06d}") / name, folder / name)


def loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def set_manifest(**changes):
    return lambda folder: change_json(folder / MANIFEST, lambda values: values.update(changes))


def list_more(folder: Path) -> None:
    change_json(folder / MANIFEST, lambda v: v["files"].update({"extra.bin": {"size": 1, "sha256": "0" * 64}}))


def unlist(name: str):
    return lambda folder: change_json(folder / MANIFEST, lambda values: values["files"].pop(name) and None)


# what is done to the newest checkpoint's folder, and what the warning says of which file
PASSED_OVER = {
    "weights cut in half": (lambda f: cut(f / WEIGHTS, 0.5), "model.safetensors has .* bytes, the manifest says"),
    "weights without their last byte": (lambda f: cut(f / WEIGHTS, 0.999999), "model.safetensors has .* bytes"),
    "weights empty": (lambda f: cut(f / WEIGHTS, 0), "model.safetensors has 0 bytes"),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), "model.safetensors is missing"),
    "a bit of the weights' header length": (lambda f: flip(f / WEIGHTS, 2), "model.safetensors does not match"),
    "a bit of the weights' header": (lambda f: flip(f / WEIGHTS, 100), "model.safetensors does not match"),
    "a bit of the weights": (lambda f: flip(f / WEIGHTS, 0.9), "model.safetensors does not match its checksum"),
    "the weights of another step": (other_steps(WEIGHTS), "model.safetensors does not match its checksum"),
    "a pickle for the weights": (lambda f: plant_pickle(f / WEIGHTS), "model.safetensors has .* bytes"),
    "moments cut": (lambda f: cut(f / OPTIMIZER, 0.7), "optimizer.safetensors has .* bytes"),
    "moments missing": (lambda f: (f / OPTIMIZER).unlink(), "optimizer.safetensors is missing"),
    "a bit of the moments' header": (lambda f: flip(f / OPTIMIZER, 60), "optimizer.safetensors does not match"),
    "a bit of the moments": (lambda f: flip(f / OPTIMIZER, 0.6), "optimizer.safetensors does not match"),
    "the moments of another step": (other_steps(OPTIMIZER), "optimizer.safetensors does not match"),
    "counters cut": (lambda f: cut(f / "trainer_state.json", 0.5), "trainer_state.json has .* bytes"),
    "counters of another step": (other_steps("trainer_state.json"), "trainer_state.json (has .* bytes|does not match)"),
    "generators missing": (lambda f: (f / "rng.json").unlink(), "rng.json is missing"),
    "a bit of the generators": (lambda f: flip(f / "rng.json", 0.5), "rng.json does not match"),
    "model config empty": (lambda f: cut(f / "config.json", 0), "config.json has 0 bytes"),
    "tokenizer missing": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "manifest missing": (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing"),
    "manifest empty": (lambda f: cut(f / MANIFEST, 0), "manifest.json is damaged .*not valid JSON"),
    "manifest cut": (lambda f: cut(f / MANIFEST, 0.6), "manifest.json is damaged .*not valid JSON"),
    "manifest not UTF-8": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe{}"), "manifest.json is damaged"),
    "manifest a list": (lambda f: (f / MANIFEST).write_text("[1, 2]"), "manifest.json is damaged"),
    "manifest without files": (set_manifest(files={}), "manifest.json does not list model.safetensors"),
    "manifest without the moments": (unlist(OPTIMIZER), "manifest.json does not list optimizer.safetensors"),
    "manifest with a file too many": (list_more, "extra.bin is missing"),
    "manifest with a wrong checksum": (
        lambda f: change_json(f / MANIFEST, lambda v: v["files"][WEIGHTS].update(sha256="0" * 64)),
        "model.safetensors does not match its checksum",
    ),
    "manifest with sizes that are text": (
        lambda f: change_json(f / MANIFEST, lambda v: [e.update(size=str(e["size"])) for e in v["files"].values()][:0]),
        "config.json has .* bytes, the manifest says",
    ),
    "manifest of another step": (other_steps(MANIFEST), "model.safetensors does not match its checksum"),
    "manifest of another step, relisted": (lambda f: relist(f, step=9), "manifest.json is of step 9"),
    "a link that leads to itself": (lambda f: loop(f / WEIGHTS), "model.safetensors is missing"),
    "a link to nowhere": (
        lambda f: ((f / "rng.json").unlink(), (f / "rng.json").symlink_to("/nowhere/rng.json")), "rng.json is missing",
    ),
    "a folder for a file": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), "model.safetensors is missing",
    ),
    "a pipe for a file": (
        lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)), "model.safetensors is missing",
    ),
    "an empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), "manifest.json is missing"),
}  # fmt: skip


@pytest.mark.parametrize("what", PASSED_OVER)
def test_the_previous_checkpoint_is_used(broken, straight, capfd, fault_table, what):
    damage, said = PASSED_OVER[what]
    damage(folder_of(broken))
    assert train(broken) == 0
    out, err = capfd.readouterr()
    (warning,) = [line for line in err.splitlines() if "skipping the checkpoint" in line]
    assert f"step-{NEWEST:06d}" in warning
    assert re.search(said, warning), warning
    assert f"resumed from step {PREVIOUS} of" in out
    ends_as_the_unbroken_run(broken, straight)
    assert manifest_problems(folder_of(broken)) == []  # written anew on the way
    assert not (Path(broken["run_root"]) / "unpickled").exists()
    assert not list(folder_of(broken).parent.glob("*.tmp")) and not list(folder_of(broken).parent.glob(".*"))
    fault_table.row(SECTION, what, "a warning names the file, resumed from the previous one, same bits at the end")


def rewritten(name: str, change):
    """Change a file, and the manifest with it."""

    def damage(folder: Path) -> None:
        change(folder / name)
        relist(folder)

    return damage


def tensors(name: str, change):
    return rewritten(name, lambda path: change_tensors(path, change))


def values(name: str, change):
    return rewritten(name, lambda path: change_json(path, change))


EMBEDDING = "model.embed_tokens.weight"
MOMENT = "exp_avg.model.embed_tokens.weight"
REFUSED = {
    "a pickle for the weights": (rewritten(WEIGHTS, plant_pickle), "model.safetensors is damaged, though"),
    "a torch file for the moments": (rewritten(OPTIMIZER, plant_torch_file), "optimizer.safetensors is damaged"),
    "weights cut": (rewritten(WEIGHTS, lambda p: cut(p, 0.5)), "model.safetensors is damaged, though"),
    "weights empty": (rewritten(WEIGHTS, lambda p: cut(p, 0)), "model.safetensors is damaged, though"),
    "a header longer than the file": (
        rewritten(WEIGHTS, lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:])), "model.safetensors is damaged",
    ),
    "a weight too few": (tensors(WEIGHTS, lambda t: t.pop(EMBEDDING)), f"1 tensors differ .*{EMBEDDING}"),
    "a weight too many": (tensors(WEIGHTS, lambda t: t.update(more=torch.ones(2))), "1 tensors differ .*more"),
    "a weight of another shape": (
        tensors(WEIGHTS, lambda t: t.update({EMBEDDING: t[EMBEDDING][:-1].clone()})), f"1 tensors differ .*{EMBEDDING}",
    ),
    "a weight in bf16": (
        tensors(WEIGHTS, lambda t: t.update({EMBEDDING: t[EMBEDDING].bfloat16()})), f"{EMBEDDING} is BF16, not F32",
    ),
    "a weight that is no number": (
        tensors(WEIGHTS, lambda t: t[EMBEDDING][-1].fill_(float("nan"))), f"are ruined: {EMBEDDING}",
    ),
    "a weight under another name": (
        tensors(WEIGHTS, lambda t: t.update({"NaN": t.pop(EMBEDDING)})), "2 tensors differ in name or shape",
    ),
    "a moment too few": (tensors(OPTIMIZER, lambda t: t.pop(MOMENT)), f"optimizer.*1 tensors differ .*{MOMENT}"),
    "a moment of another shape": (
        tensors(OPTIMIZER, lambda t: t.update({MOMENT: t[MOMENT].T.contiguous()})), f"1 tensors differ .*{MOMENT}",
    ),
    "a moment in whole numbers": (
        tensors(OPTIMIZER, lambda t: t.update({MOMENT: t[MOMENT].long()})), f"{MOMENT} is I64, not F32",
    ),
    "a moment that is no number": (
        tensors(OPTIMIZER, lambda t: t[MOMENT][0].fill_(float("nan"))), f"{MOMENT} holds nan",
    ),
    "counters of another version": (
        values("trainer_state.json", lambda v: v.update(format="minillm-checkpoint-9")),
        "format 'minillm-checkpoint-9', this version reads 'minillm-checkpoint-1'",
    ),
    "a counter nobody knows": (
        values("trainer_state.json", lambda v: v["state"].update(epochs=3)), r"unknown counters \['epochs'\]",
    ),
    "a step that is text": (values("trainer_state.json", lambda v: v["state"].update(step="4")), "step is '4'"),
    "a negative step": (values("trainer_state.json", lambda v: v["state"].update(step=-4)), "step is -4"),
    "counters of another step": (
        lambda f: (other_steps("trainer_state.json")(f), relist(f)), "trainer_state.json is .*it holds step 2",
    ),
    "no counters": (values("trainer_state.json", lambda v: v.pop("state") and None), "trainer_state.json .*'state'"),
    "counters that are a list": (values("trainer_state.json", lambda v: [v]), "trainer_state.json is damaged, though"),
    "counters cut": (
        rewritten("trainer_state.json", lambda p: cut(p, 0.5)), "trainer_state.json is not valid JSON",
    ),
    "trained on other data": (
        values("trainer_state.json", lambda v: v["data"].update(sha256="0" * 16)), "was trained on other data",
    ),
    "no generators": (values("rng.json", lambda v: {"ranks": []}), "rng.json is damaged, though .*no list of ranks"),
    "generators that are noise": (
        values("rng.json", lambda v: v["ranks"][0].update(torch="zz")), "rng.json is damaged, though",
    ),
    "generators of another length": (
        values("rng.json", lambda v: v["ranks"][0].update(torch="00")), "rng.json is damaged, though",
    ),
}  # fmt: skip


def run_state(settings: dict) -> dict[str, str]:
    """What must not change while a run is refused."""
    run_dir = Path(settings["run_root"]) / "r"
    found = contents(run_dir)
    return {name: what for name, what in found.items() if name.startswith(("checkpoints", "metrics", "run.yaml"))}


@pytest.mark.parametrize("what", REFUSED)
def test_one_error_names_the_file_and_moving_it_away_mends_it(broken, straight, fault_table, what):
    damage, said = REFUSED[what]
    damage(folder_of(broken))
    assert manifest_problems(folder_of(broken)) == []
    before = run_state(broken)
    with pytest.raises(UserError) as error:
        train(broken)
    assert re.search(said, str(error.value)), error.value
    assert str(folder_of(broken)) in str(error.value) and "\n" not in str(error.value)
    assert run_state(broken) == before
    assert not (Path(broken["run_root"]) / "unpickled").exists()
    shutil.move(folder_of(broken), Path(broken["run_root"]) / "away")
    assert train(broken) == 0
    ends_as_the_unbroken_run(broken, straight)
    fault_table.row(SECTION, f"{what}, the manifest agreeing", "one error names the file, nothing changed")


@pytest.mark.parametrize(
    "of, shape",
    [("layers", {"model.num_hidden_layers": 3}), ("vocabulary", {"model.vocab_size": 400})],
)
def test_the_checkpoint_of_another_model(broken, straight, tmp_path, fault_table, of, shape):
    """Its folder in the place of the run's own: the data is the same, the shapes are not."""
    train({**straight, **shape, "run_root": str(tmp_path / "other"), "train.max_steps": NEWEST})
    shutil.rmtree(folder_of(broken))
    shutil.copytree(folder_of({"run_root": tmp_path / "other"}), folder_of(broken))
    before = run_state(broken)
    with pytest.raises(UserError, match=r"step-000004/model.safetensors holds another architecture: \d+ tensors"):
        train(broken)
    assert run_state(broken) == before
    with pytest.raises(UserError, match="was started with other settings.*\n.*" + next(iter(shape))):
        train({**broken, **shape})
    assert run_state(broken) == before
    fault_table.row(SECTION, f"a checkpoint of other {of}", "one error, nothing changed")


def test_an_unreadable_file(broken, fault_table, capfd):
    """Root reads everything, so the choice of the checkpoint alone runs as nobody."""
    for path in Path(broken["run_root"]), Path(broken["run_root"]) / "r":
        path.chmod(0o755)
    (folder_of(broken) / OPTIMIZER).chmod(0)
    outside = [path for path in Path(broken["run_root"]).parents if not path.stat().st_mode & 1]
    if outside and os.geteuid() == 0:
        os.chdir(broken["run_root"])
    try:
        with as_nobody():
            folder = RunFolder(Path("r") if outside else Path(broken["run_root"]) / "r")
            assert folder.newest_to_resume("content").step == 2
    finally:
        os.chdir(ROOT)
    assert "optimizer.safetensors cannot be read (Permission denied)" in capfd.readouterr().err
    fault_table.row(SECTION, "a file without permission to read it", "a warning names the file, the previous one used")


LEFTOVERS = {
    "a half-written folder of a killed save": lambda f: shutil.copytree(f, f.with_name("step-000005.tmp")),
    "a half-deleted folder": lambda f: shutil.copytree(f, f.with_name(".step-000003.deleted")),
    "a folder of a higher step without manifest": lambda f: (
        shutil.copytree(f, f.with_name("step-000099")), (f.with_name("step-000099") / MANIFEST).unlink()
    ),
    "a file named as a higher step": lambda f: f.with_name("step-000099").write_text("x"),
    "a link to itself named as a higher step": lambda f: f.with_name("step-000099").symlink_to("step-000099"),
    "a file where the next step goes": lambda f: f.with_name(f"step-{STEPS:06d}").write_text("x"),
    "a link to itself where the next step goes": lambda f: loop(f.with_name(f"step-{STEPS:06d}")),
    "a renamed copy of an older step": lambda f: shutil.copytree(
        f.with_name("step-000002"), f.with_name("step-000099")
    ),
    "two folders of the newest step": lambda f: shutil.copytree(f, f.with_name("step-4")),
    "two of the newest step, one damaged": lambda f: (
        shutil.copytree(f, f.with_name("step-4")), cut(f.with_name("step-4") / WEIGHTS, 0.5)
    ),
    "two of the newest step, the other damaged": lambda f: (
        shutil.copytree(f, f.with_name("step-4")), cut(f / WEIGHTS, 0.5)
    ),
    "other names": lambda f: [f.with_name(name).mkdir() for name in ("step-", "step-x", "latest", "step-9 (copy)")],
    "a stranger's file called latest": lambda f: f.with_name("latest").write_text("step-000099"),
}  # fmt: skip


@pytest.mark.parametrize("what", LEFTOVERS)
def test_only_whole_folders_of_steps_count(broken, straight, fault_table, capfd, what):
    LEFTOVERS[what](folder_of(broken))
    assert train(broken) == 0
    assert f"resumed from step {NEWEST} of" in capfd.readouterr().out
    ends_as_the_unbroken_run(broken, straight)
    left = [p.name for p in folder_of(broken).parent.iterdir() if re.fullmatch(r"step-\d+\.tmp|\..*", p.name)]
    assert left == []
    fault_table.row(SECTION, what, "resumed from the newest whole folder, same bits at the end")


def test_two_damaged_ones(broken, straight, capfd, fault_table):
    """Step 3 and step 4 damaged, each another way: both are named, step 2 is used."""
    folder = folder_of(broken)
    shutil.copytree(folder, folder.with_name("step-000003"))
    (folder.with_name("step-000003") / MANIFEST).write_text("{")
    cut(folder / OPTIMIZER, 0.9)
    assert train(broken) == 0
    out, err = capfd.readouterr()
    assert err.count("skipping the checkpoint") == 2 and "resumed from step 2 of" in out
    ends_as_the_unbroken_run(broken, straight)
    fault_table.row(SECTION, "the two newest, each another way", "both are named, the third is used, same bits")


@pytest.mark.parametrize("how", ["cut", "no manifest", "empty folders"])
def test_every_one_damaged_is_no_fresh_start(broken, fault_table, capfd, how):
    for step in (PREVIOUS, NEWEST):
        folder = folder_of(broken, step)
        if how == "cut":
            cut(folder / WEIGHTS, 0.5)
        elif how == "no manifest":
            (folder / MANIFEST).unlink()
        else:
            shutil.rmtree(folder)
            folder.mkdir()
    before = run_state(broken)
    with pytest.raises(UserError, match="every checkpoint of .* is damaged .*nothing was changed.*away to start anew"):
        train(broken)
    err = capfd.readouterr().err
    assert all(f"step-{step:06d}" in err for step in (PREVIOUS, NEWEST))
    assert run_state(broken) == before
    fault_table.row(SECTION, f"every one ({how})", "warnings name the files, one error, nothing deleted")


def test_every_one_damaged_through_the_real_command(broken, tmp_path, fault_table):
    for step in (PREVIOUS, NEWEST):
        cut(folder_of(broken, step) / WEIGHTS, 0.5)
    before = run_state(broken)
    json_file = tmp_path / "fp32.json"
    json_file.write_text('{"zero_optimization": {"stage": 2}}')
    done = run(command("pretrain.py", json_file, broken), check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "every checkpoint of" in errors[0]
    assert run_state(broken) == before
    fault_table.row(SECTION, "every one, through launch/pretrain.py", "exit code 2, one error, nothing deleted")


@pytest.mark.parametrize("what", ["every one cut", "a moment that is no number"])
def test_two_ranks_stop_together(broken, tmp_path, fault_table, what):
    """Nobody is left waiting for a rank that has said why it stops."""
    said = "every checkpoint of"
    if what == "every one cut":
        for step in (PREVIOUS, NEWEST):
            cut(folder_of(broken, step) / WEIGHTS, 0.5)
    else:
        damage, said = REFUSED[what]
        damage(folder_of(broken))
    before = run_state(broken)
    json_file = tmp_path / "fp32.json"
    json_file.write_text('{"zero_optimization": {"stage": 2}}')
    done = run(command("pretrain.py", json_file, broken, ranks=2), check=False)
    output = done.stdout + done.stderr
    assert done.returncode not in (0, 75) and re.search(f"error: .*{said}", output), output
    assert run_state(broken) == before
    fault_table.row(SECTION, f"{what}, two ranks", "one error, both ranks leave, nothing changed")


RUN_FILES = {
    "run.yaml cut within a line": (
        lambda r: (r / "run.yaml").write_text("model: {preset: de"), "run.yaml is damaged (?s:.*)write it back",
    ),
    "run.yaml empty": (lambda r: (r / "run.yaml").write_text(""), "run.yaml is damaged .there are no settings"),
    "run.yaml of zero bytes": (lambda r: (r / "run.yaml").write_bytes(bytes(300)), "run.yaml is damaged"),
    "run.yaml a folder": (
        lambda r: ((r / "run.yaml").unlink(), (r / "run.yaml").mkdir()), "run.yaml is damaged",
    ),
    "skipped.json no list": (lambda r: (r / "skipped.json").write_text('{"a": 1}'), "skipped.json is damaged"),
    "skipped.json cut": (lambda r: (r / "skipped.json").write_text("[[1, 2"), "skipped.json is not valid JSON"),
    "skipped.json with negative batches": (
        lambda r: (r / "skipped.json").write_text("[[5, -2]]"), r"skipped.json is damaged \(\[5, -2\]\)",
    ),
    "metrics.jsonl a folder": (
        lambda r: ((r / "metrics.jsonl").unlink(), (r / "metrics.jsonl").mkdir()), "metrics.jsonl",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", RUN_FILES)
def test_the_other_files_of_a_run(broken, fault_table, what):
    damage, said = RUN_FILES[what]
    damage(Path(broken["run_root"]) / "r")
    before = run_state(broken)
    with pytest.raises(UserError) as error:
        train(broken)
    assert re.search(said, str(error.value)), error.value
    assert run_state(broken) == before
    fault_table.row(SECTION, what, "one error names the file, nothing changed")


def test_damaged_logs_are_cut_back(broken, straight, fault_table):
    """A torn last line, bytes that are no text, a line that is no record."""
    path = Path(broken["run_root"]) / "r" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'\xff\xfe\x00\n[1, 2]\n"text"\n{"step": "x"}\n{"step": 5, "lo')
    assert train(broken) == 0
    ends_as_the_unbroken_run(broken, straight)
    fault_table.row(SECTION, "noise at the end of metrics.jsonl", "dropped, every step is there once")


def test_without_run_yaml_resume_says_what_it_could_not_compare(broken, straight, capfd, fault_table):
    (Path(broken["run_root"]) / "r" / "run.yaml").unlink()
    assert train(broken) == 0
    assert "run.yaml is missing" in capfd.readouterr().err
    ends_as_the_unbroken_run(broken, straight)
    fault_table.row(SECTION, "run.yaml missing", "a warning that the settings could not be compared, resumed")
