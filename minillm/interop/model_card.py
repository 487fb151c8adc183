"""The README.md of an exported model: what it is, how it was trained as far as its run says, how to load it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from transformers import PreTrainedModel

from minillm.run_folder import Checkpoint, ModelFolder, run_of_checkpoint
from minillm.utils.files import read_json

SHAPE = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings vocab_size tie_word_embeddings num_experts num_local_experts n_routed_experts "
    "num_experts_per_tok moe_intermediate_size sliding_window kv_lora_rank"
).split()
VALIDATION = {"val_loss": "validation loss", "val_ppl": "validation perplexity", "val_bpb": "validation bits per byte"}


def model_card(model: PreTrainedModel, origin: ModelFolder, name: str, needs_code: bool) -> str:
    """The text of README.md.

    Args:
        model: what is in the folder, already of the class it is saved as.
        origin: where it came from; a run's numbers are read from the run's folder where it stands in one.
        name: the folder's name, the title.
        needs_code: whether the folder carries code of its own.
    """
    family = model.config.model_type
    front = yaml.safe_dump(
        {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": list(dict.fromkeys(["minillm", family])),
        },
        sort_keys=False,
    )
    parts = [
        f"---\n{front}---\n\n# {name}\n\n{_what_it_is(model, origin, needs_code)}",
        "## Use\n\n```python\n" + _usage(name, needs_code) + "\n```",
        "## Architecture\n\n" + _table(_architecture(model)),
    ]
    if training := _training(origin):
        parts.append("## Training\n\n" + _table(training))
    return "\n\n".join(parts) + "\n"


def _what_it_is(model: PreTrainedModel, origin: ModelFolder, needs_code: bool) -> str:
    stage = {"pretrain": ", pretrained", "sft": ", fine-tuned on conversations"}.get(origin.stage, "")
    code = "Its modeling code is in this folder: load it with `trust_remote_code=True`." if needs_code else (
        f"A native `{type(model).__name__}`: no remote code is needed."
    )  # fmt: skip
    return f"A language model trained with minillm{stage}. {code}"


def _usage(name: str, needs_code: bool) -> str:
    trust = ", trust_remote_code=True" if needs_code else ""
    chat = '\nprint(model.chat("Hello"))' if needs_code else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})\n'
        'inputs = tokenizer("Once", return_tensors="pt")\n'
        f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0])){chat}"
    )


def _architecture(model: PreTrainedModel) -> dict[str, object]:
    rows = {
        "class": f"`{type(model).__name__}`",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    values = {name: getattr(model.config, name, None) for name in SHAPE}
    return rows | {f"`{name}`": value for name, value in values.items() if value is not None}


def _training(origin: ModelFolder) -> dict[str, object]:
    """What the run's folder says about this checkpoint; empty for a model that is in no run."""
    if origin.run is None:
        return {}
    rows: dict[str, object] = {"run": origin.run, "steps": f"{origin.step:,}"}
    checkpoint, run = Checkpoint(origin.path), run_of_checkpoint(origin.path)
    if run is None or not checkpoint.counters.is_file():
        return rows
    state = read_json(checkpoint.counters).get("state", {})
    if "tokens" in state:
        rows["tokens"] = f"{state['tokens']:,}"
    rows |= _last_numbers(run.metrics, origin.step)
    if run.settings.is_file():
        data = (yaml.safe_load(run.settings.read_text(encoding="utf-8")) or {}).get("data") or {}
        for key in ("train", "validation"):
            if paths := _paths(data.get(key)):
                rows[f"{key} data"] = ", ".join(f"`{path}`" for path in paths)
    return rows


def _last_numbers(path: Path, step: int) -> dict[str, str]:
    """The last losses up to `step` in a run's metrics.jsonl, each with its step where that is an earlier one."""
    if not path.is_file():
        return {}
    last: dict[str, tuple[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.endswith("}"):  # a writer was killed in the middle of it
            continue
        record = json.loads(line)
        if record["step"] <= step:
            last |= {name: (record["step"], record[name]) for name in ("loss", *VALIDATION) if name in record}
    names = {"loss": "training loss", **VALIDATION}
    return {
        names[name]: f"{value:.4f}" + (f" (step {at:,})" if at != step else "") for name, (at, value) in last.items()
    }


def _paths(sources: object) -> list[str]:
    """The paths of data.train or data.validation, URLs without the passwords and tokens they may hold."""
    entries = [sources] if isinstance(sources, str) else [s["path"] for s in sources or []]
    return [
        re.sub(r"^(\w+://)[^/@]*@", r"\1", entry.partition("?")[0] if "://" in entry else entry) for entry in entries
    ]


def _table(rows: dict[str, object]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())
