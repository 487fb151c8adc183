"""train.compile: regions in place of a whole graph; the same losses, few graphs, and what only CUDA calls in them."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch._dynamo.utils import counters

from minillm.models import MiniLLMForCausalLM
from tests.support.in_process import train
from tests.support.launching import losses
from tests.support.toy_presets import toy_model


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def wait_like_cuda(self, device_index=None):
    """What CUDA_Accelerator.synchronize is made of, seen by the compiler alone."""
    return torch.cuda.synchronize(device_index) if torch.compiler.is_compiling() else None


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_has_the_losses_of_an_eager_one(group, settings, tmp_path, monkeypatch, backend):
    """Over DeepSpeed's third global step as well, from which on its throughput timer calls synchronize in a forward
    hook: torch 2.12 and 2.13 cannot compile that call."""
    monkeypatch.setattr(CPU_Accelerator, "synchronize", wait_like_cuda)
    whole = MiniLLMForCausalLM.compile_regions
    monkeypatch.setattr(MiniLLMForCausalLM, "compile_regions", partialmethod(whole, backend=backend))
    for name in ("eager", "compiled"):
        run = {**settings, "run_name": name, "validation.every": 2, "train.compile": name == "compiled"}
        assert train(run) == 0
    assert counters["stats"]["unique_graphs"] > 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)


@pytest.mark.parametrize("preset", ["llama3-mini", "deepseek-v3-mini", "qwen3-next-mini"])
def test_layers_of_a_kind_share_a_graph(preset):
    """Whatever the documents and the number of targets; the graphs beside them are the last norm's and the loss's."""
    model = toy_model(preset).train()
    kinds = len({(layer.layer_type, layer.is_sparse) for layer in model.model.layers})
    model.compile_regions(backend="aot_eager")
    for step in range(3):
        ids = torch.randint(0, 101, (2, 24), generator=torch.Generator().manual_seed(step))
        documents = (torch.rand(ids.shape) < 0.1 * (step + 1)).long().cumsum(1)
        model(ids, labels=ids, document_ids=documents, num_items_in_batch=torch.tensor(7 + step)).loss.backward()
    assert counters["stats"]["unique_graphs"] <= kinds + 2
    assert not counters["graph_break"]
    before = counters["stats"]["unique_graphs"]
    model(ids, labels=ids, document_ids=documents, num_items_in_batch=torch.tensor(99)).loss.backward()
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("preset", ["llama3-mini", pytest.param("qwen3-next-mini", marks=pytest.mark.slow)])
def test_rows_of_many_lengths_need_few_graphs(preset):
    """As fine-tuning has them: a graph of the first length, one of any, and for validation one of any."""
    model = toy_model(preset, max_position_embeddings=512).train()
    kinds = len({(layer.layer_type, layer.is_sparse) for layer in model.model.layers})
    model.compile_regions(backend="aot_eager")

    def call(length: int) -> torch.Tensor:
        ids = torch.randint(0, 101, (2, length))
        return model(ids, labels=ids, num_items_in_batch=torch.tensor(7)).loss

    for length in (192, 64, 256, 128, 320, 448):
        call(length).backward()
    assert counters["stats"]["unique_graphs"] <= 2 * (kinds + 2) + kinds  # a second of the linear layers' remainders
    model.eval()
    with torch.no_grad():
        for length in (64, 128, 320):
            call(length)
    assert counters["stats"]["unique_graphs"] <= 3 * (kinds + 2) + kinds and not counters["graph_break"]
