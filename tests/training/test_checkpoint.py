"""Checkpoints: a Hugging Face folder, whole or not there, refused when they are of another model, pruned with care."""

from __future__ import annotations

import json
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm.run_folder import RunFolder
from minillm.training import checkpoint as checkpoints
from minillm.training.safetensors_stream import SafetensorsWriter
from minillm.utils.errors import UserError
from minillm.utils.files import manifest_problems, sha256_file
from tests.support.in_process import FP32_ZERO2, built_trainer, train
from tests.support.launching import checkpoint, same_bits


def test_streamed_safetensors_reads_back(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b.weight": torch.arange(7.0), "scalar": torch.tensor(2.5)}
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, {name: tuple(t.shape) for name, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert same_bits(load_file(path), tensors)
    assert writer.sha256 == sha256_file(path)


def test_streamed_safetensors_refuses_disorder(tmp_path):
    with pytest.raises(ValueError, match="expected a"):
        with SafetensorsWriter(tmp_path / "x", {"a": (2,), "b": (2,)}) as writer:
            writer.write("b", torch.zeros(2))
    with pytest.raises(ValueError, match="b was not written"):
        with SafetensorsWriter(tmp_path / "y", {"a": (2,), "b": (2,)}) as writer:
            writer.write("a", torch.zeros(2))


def save(trainer) -> None:
    """A checkpoint that is on disk when this returns, however the run writes them."""
    trainer.save()
    trainer.writer.wait()


@pytest.mark.usefixtures("group")
class TestSaved:
    def test_it_is_a_hugging_face_folder(self, settings, tmp_path):
        trainer = built_trainer(settings)
        save(trainer)
        folder = tmp_path / "r" / "checkpoints" / "step-000000"
        assert manifest_problems(folder) == []
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("The list 你好")["input_ids"]])
        with torch.no_grad():
            expected = trainer.engine.module.eval()(input_ids=ids).logits
            assert torch.equal(model(input_ids=ids).logits, expected)
        assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))
        trainer.close(0)

    @pytest.mark.parametrize("asynchronous", [False, True])
    @pytest.mark.parametrize("limit", [1_000, 100_000])  # stops at the tokenizer's files, at the weights
    def test_a_full_disk_keeps_the_previous_one(self, settings, tmp_path, limit, asynchronous):
        trainer = built_trainer({**settings, "checkpoint.asynchronous": asynchronous})
        save(trainer)
        before = checkpoint(tmp_path / "r", 0)
        trainer.state.step = 1
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))  # the kernel refuses to write further
        try:
            with pytest.raises(UserError, match="could not be written .*the last one, step 0, is untouched"):
                save(trainer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)
        folder = tmp_path / "r" / "checkpoints"
        assert [p.name for p in folder.iterdir()] == ["step-000000"]
        assert same_bits(checkpoint(tmp_path / "r", 0), before)
        save(trainer)  # and goes on when there is room again
        assert RunFolder(tmp_path / "r").newest("content").step == 1
        trainer.close(0)

    def test_a_damaged_newest_one_is_passed_over(self, settings, tmp_path, capsys):
        train(settings)
        weights = tmp_path / "r" / "checkpoints" / "step-000004" / "model.safetensors"
        straight = checkpoint(tmp_path / "r", 4)
        content = bytearray(weights.read_bytes())
        content[-100] ^= 1
        weights.write_bytes(content)
        train({**settings, "train.max_steps": 4})
        out, err = capsys.readouterr()
        assert "resumed from step 2" in out and "model.safetensors does not match its checksum" in err
        assert manifest_problems(weights.parent) == []
        assert same_bits(checkpoint(tmp_path / "r", 4), straight)  # the two steps were done again, to the same bits

    def test_another_architecture_is_refused(self, settings, tmp_path):
        train(settings)
        run_dir = tmp_path / "r"
        recorded = (run_dir / "run.yaml").read_text().replace("num_hidden_layers: 2", "num_hidden_layers: 3")
        (run_dir / "run.yaml").write_text(recorded)
        with pytest.raises(UserError, match="holds another architecture"):
            train({**settings, "model.num_hidden_layers": 3, "train.max_steps": 6})

    def test_leftovers_of_a_killed_writer_are_not_checkpoints(self, settings, tmp_path):
        train({**settings, "train.max_steps": 2})
        folder = tmp_path / "r" / "checkpoints"
        shutil.copytree(folder / "step-000002", folder / "step-000003.tmp")
        assert RunFolder(tmp_path / "r").newest("content").step == 2
        train({**settings, "train.max_steps": 4})
        assert not list(folder.glob("*.tmp"))

    def test_the_newest_and_the_best_are_kept(self, settings, tmp_path):
        settings = {**settings, "train.max_steps": 8, "checkpoint.every": 1, "checkpoint.keep": 2}
        trainer = built_trainer(settings)
        for step, loss in enumerate([5.0, 3.0, 4.0, 6.0, 7.0], 1):
            trainer.state.step = step
            trainer.state.record_validation(loss)
            save(trainer)
        trainer.state.step = 6  # validated better, never saved: not the best of the checkpoints
        trainer.state.record_validation(1.0)
        trainer.state.step = 7
        save(trainer)
        assert [one.step for one in RunFolder(tmp_path / "r").checkpoints()] == [7, 5, 2]
        trainer.close(0)

    def test_pruning_never_counts_a_damaged_newer_one(self, settings, tmp_path):
        """Resumed below a damaged step 9: that one goes, and `keep` good ones stay."""
        trainer = built_trainer({**settings, "checkpoint.keep": 1})
        save(trainer)
        folder = tmp_path / "r" / "checkpoints"
        shutil.copytree(folder / "step-000000", folder / "step-000009")
        (folder / "step-000009" / "model.safetensors").write_bytes(b"")
        trainer.state.step = 1
        save(trainer)
        assert [one.step for one in RunFolder(folder.parent).checkpoints()] == [1]
        trainer.close(0)

    def test_state_survives_exactly(self, settings, tmp_path):
        train({**settings, "train.max_steps": 2}, FP32_ZERO2)
        state, values = checkpoints.read_state(RunFolder(tmp_path / "r").checkpoint(2))
        assert state.step == 2
        assert state.tokens == [json.loads(s) for s in open(tmp_path / "r" / "metrics.jsonl")][-1]["tokens"]
        assert values["data"]["tokenizer"]
