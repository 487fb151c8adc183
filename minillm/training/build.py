"""From a run configuration to tokenizer, streams and model: what the loop needs before an engine exists."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from minillm.data.loader import BatchLoader
from minillm.data.sequence_stream import build_stream
from minillm.data.sources import TokenSource, open_sources
from minillm.data.text_encoding import fingerprint, vocabulary_size
from minillm.data.tokenizer import load_tokenizer
from minillm.interop.convert import load_as_minillm, load_config_as_minillm
from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.settings.architecture import Architecture
from minillm.settings.resolve import Resolved
from minillm.settings.run import TOKEN_IDS, RunConfig, Sources, model_overrides, raise_problems
from minillm.utils import distributed
from minillm.utils.errors import UserError
from minillm.utils.logging import say

ANY_NUMBER = 2**62  # the loop adds up all ranks' unreadable rows and stops them together


@dataclass
class Data:
    """What is trained on and validated with, and the model folder a run starts from."""

    tokenizer: object
    train: list[TokenSource]
    validation: list[TokenSource]
    base: Path | None  # see minillm.settings.resolve.ModelChoice; its weights are for the first start

    @property
    def fingerprint(self) -> dict[str, object]:
        """What has to be the same for a resumed run to see the same batches and to measure with the same texts."""
        return {
            "tokenizer": fingerprint(self.tokenizer),
            "train": [[s.name, s.weight, s.num_tokens, s.num_documents] for s in self.train],
            "sha256": _digest(self.train),
            "validation": _digest(self.validation),
        }


def _digest(sources: list[TokenSource]) -> str:
    digest = hashlib.sha256(json.dumps([[shard.sha256 for shard in s.shards] for s in sources]).encode())
    return digest.hexdigest()[:16]


def open_data(resolved: Resolved) -> Data:
    """Open (compiling or downloading first, where needed) the token shards of a run. No process group is needed.

    Raises:
        UserError: weights to start from that are not there, missing or damaged shards, a tokenizer that does not match.
    """
    run, base = resolved.run, resolved.model.base
    if resolved.model.missing is not None:
        raise UserError(resolved.model.missing)
    tokenizer_path = Path(run.data.tokenizer or base)
    tokenizer = load_tokenizer(tokenizer_path)
    if base is not None and fingerprint(tokenizer) != fingerprint(load_tokenizer(base)):
        raise UserError(
            f"data.tokenizer = {run.data.tokenizer}: not the tokenizer of the weights in {base}; leave data.tokenizer "
            f"out to use theirs"
        )
    options = {
        "tokenizer_path": tokenizer_path,
        "cache_dir": Path(run.data.cache_dir or "data/cache"),
        "max_bad_samples": run.data.max_bad_samples,
    }
    train = open_sources(_spec(run.data.train), **options)
    validation = open_sources(_spec(run.data.validation), **options) if run.data.validation else []
    return Data(tokenizer, train, validation, base)


def _spec(sources: Sources) -> str | list[dict[str, object]]:
    return sources if isinstance(sources, str) else [s.model_dump(exclude_none=True) for s in sources]


def build_loader(run: RunConfig, sources: list[TokenSource], *, num_epochs: float | None) -> BatchLoader:
    """The training loader: endless, or masked after `num_epochs`."""
    stream = build_stream(
        sources, seq_len=run.data.seq_len, packing=run.packing, stride=run.data.stride, seed=run.seed
    )
    last = None if num_epochs is None else max(1, round(num_epochs * stream.num_sequences))
    if stream.num_truncated:
        say(f"{stream.num_truncated:,} documents are longer than data.seq_len = {run.data.seq_len} and are cut to it")
    return BatchLoader(
        stream,
        train_batch_size=run.train.train_batch_size,
        micro_batch_size=run.train.train_micro_batch_size_per_gpu,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        max_sequences=last,
        max_bad_rows=ANY_NUMBER,
    )


def build_validation_loaders(run: RunConfig, sources: list[TokenSource]) -> dict[str, BatchLoader]:
    """One loader a source, over its first validation.max_sequences in order.

    Windows never overlap here, whatever data.stride: each target counts once in the validation loss.
    """
    loaders = {}
    micro = run.train.train_micro_batch_size_per_gpu
    for source in sources:
        stream = build_stream([source], seq_len=run.data.seq_len, packing=run.packing, seed=run.seed, shuffle=False)
        loaders[source.name] = BatchLoader(
            stream,
            train_batch_size=micro * distributed.world_size(),
            micro_batch_size=micro,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            max_sequences=min(stream.num_sequences, run.validation.max_sequences or stream.num_sequences),
            max_bad_rows=ANY_NUMBER,
        )
    return loaders


def load_initial_weights(model: MiniLLMForCausalLM, folder: Path) -> dict[str, torch.Tensor]:
    """Put the weights of a checkpoint, an exported folder, or a Hugging Face folder of a known family into `model`.

    Returns:
        The exact fp32 weights by parameter name. They are the model's own storage until an engine takes it over (it
        rounds a low-precision copy), so that the model is never held twice.
    """
    loaded = load_as_minillm(folder).state_dict()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in loaded:
                buffer.copy_(loaded[name])
        for name, parameter in model.named_parameters():
            parameter.data = loaded.pop(name)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def build_model_config(resolved: Resolved, data: Data) -> MiniLLMConfig:
    """The architecture as a model's config, fitted to the tokenizer and checked.

    Weights of another library say only now which architecture they are of, which is written into `resolved`.

    Raises:
        UserError: shapes that cannot work, or a vocabulary smaller than the tokenizer's.
    """
    run, tokenizer = resolved.run, data.tokenizer
    special = {}
    if data.base is None:
        special = {name: getattr(tokenizer, name) for name in TOKEN_IDS}
    elif resolved.model.architecture is None:
        fields = load_config_as_minillm(data.base).architecture
        resolved.model.architecture = Architecture(**{**fields, **model_overrides(run)})
        raise_problems(resolved.settle_experts(), f"on {resolved.world_size} rank(s)")
    try:
        config = MiniLLMConfig(**{**resolved.model.architecture, **special})
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    if vocabulary_size(tokenizer) > config.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.vocab_size}: the tokenizer {run.data.tokenizer} has "
            f"{vocabulary_size(tokenizer)} tokens; set model.vocab_size to at least that, or train a smaller tokenizer"
        )
    if run.data.seq_len > config.max_position_embeddings:
        raise UserError(
            f"data.seq_len = {run.data.seq_len}: the model has {config.max_position_embeddings} positions; "
            f"lower data.seq_len or raise model.max_position_embeddings"
        )
    return config


def build_model(run: RunConfig, config: MiniLLMConfig) -> MiniLLMForCausalLM:
    """A freshly initialised fp32 model, the same on every rank; its weights come later where there are any."""
    torch.manual_seed(run.seed)
    model = MiniLLMForCausalLM(config)
    total = sum(p.numel() for p in model.parameters())
    name = run.model.preset if run.model.init_from is None else f"that of {run.model.init_from}"
    say(f"model: {name}, {total:,} parameters, sequence length {run.data.seq_len}")
    if "sparse" in config.mlp_layer_types:
        own = config.num_experts // run.model.expert_parallel_size
        say(f"experts: {run.model.moe_backend}, {own} of {config.num_experts} of each layer on a rank")
    return model
