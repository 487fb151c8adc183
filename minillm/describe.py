"""What a preset is made of: `python -m minillm.describe [PRESET ...] [FIELD=value ...] [--draw FILE.png]`;
who may run its experts: `--backends RANKS`.

Contract: a table of layers with the parameters of each part, on stdout, without importing torch; the numbers are
minillm.settings.accounting's, which tests hold against built models. `--draw` makes one picture of all that were named.
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import groupby
from pathlib import Path

from minillm.settings.accounting import cache_bytes, describe_layers, flops_per_token, num_parameters
from minillm.settings.architecture import DEFAULTS, Architecture, problems_of
from minillm.settings.derived import coerce
from minillm.settings.moe_backends import describe_legal
from minillm.settings.presets import PRESETS, preset
from minillm.utils.commands import command_name
from minillm.utils.errors import UserError, exit_on_user_error, nearest
from minillm.utils.logging import say
from minillm.utils.yaml_values import as_number, load_yaml

MIXER_NAMES = {"full_attention": "full attention", "sliding_attention": "sliding window",
               "linear_attention": "gated DeltaNet"}  # fmt: skip
MIXER_COLOURS = {"full attention": "#4c78a8", "latent attention": "#72559d", "sliding window": "#54a24b",
                 "gated DeltaNet": "#e4a13a"}  # fmt: skip
MLP_COLOURS = {"dense": "#bab0ac", "sparse": "#e45756"}


def build_parser() -> argparse.ArgumentParser:
    """The command line; stdlib only."""
    parser = argparse.ArgumentParser(
        prog=command_name("minillm.describe"), description="Show what presets are made of: layers, parts, parameters.",
        epilog=f"Presets: {', '.join(PRESETS)}. Overrides: FIELD=value, for example num_experts=16.",
    )  # fmt: skip
    parser.add_argument("words", nargs="*", metavar="PRESET | FIELD=value", help="presets (default: all), overrides")
    parser.add_argument("--seq-len", type=int, default=512, metavar="T", help="for operations and cache (default 512)")
    parser.add_argument(
        "--backends", type=int, metavar="RANKS", help="print which ZeRO stages and sizes each moe_backend may have"
    )
    parser.add_argument("--draw", type=Path, metavar="FILE.png", help="draw the layers of the named presets")
    return parser


def resolve(words: list[str]) -> dict[str, Architecture]:
    """Presets by name, with the overrides in them.

    Raises:
        UserError: an unknown preset or field, or shapes that cannot work.
    """
    import yaml

    given = {}
    for field, text in (word.removeprefix("model.").split("=", 1) for word in words if "=" in word):
        if field not in DEFAULTS:
            near = nearest(field, list(DEFAULTS)) or "; minillm/settings/architecture.py lists them"
            raise UserError(f"{field}={text}: it is not an architecture field{near}")
        try:
            given[field] = coerce(field, as_number(load_yaml(text)))
        except yaml.YAMLError as error:
            raise UserError(f"{field} = {text}: {error}") from error
    names = [word for word in words if "=" not in word] or list(PRESETS)
    described = {}
    for name in names:
        if name not in PRESETS:
            raise UserError(f"{name}: unknown preset{nearest(name, list(PRESETS))}")
        arch = preset(name, **given)
        if problems := problems_of(arch):
            raise UserError(f"{name}: {'; '.join(problems)}")
        described[name] = arch
    return described


def mixer_name(arch: Architecture, layer_type: str) -> str:
    """How the mixer of a layer is called in tables and pictures."""
    if layer_type == "full_attention" and arch.attention_type == "mla":
        return "latent attention"
    return MIXER_NAMES[layer_type]


def layer_table(name: str, arch: Architecture, seq_len: int) -> list[str]:
    """The lines for one preset; equal layers in a row share one."""
    counts = num_parameters(arch)
    lines = [
        f"{name}: {counts['total']:,} parameters, {counts['active']:,} active, {counts['non_embedding']:,} without "
        f"embeddings",
        f"  {flops_per_token(arch, seq_len):,} FLOPs a trained token at {seq_len}; cache of {seq_len} tokens in bf16 "
        f"{cache_bytes(arch, seq_len):,} bytes",
        f"  {'layers':8} {'parameters':>13} {'active':>13}  parts",
    ]
    table = arch.vocab_size * arch.hidden_size
    lines.append(f"  {'embed':8} {table:13,} {table:13,}  {arch.vocab_size:,} x {arch.hidden_size}")
    layers = describe_layers(arch)
    start, first_of = 0, {}
    for layer, same in groupby(layers):
        number = len(list(same))
        label = f"{start}" if number == 1 else f"{start}-{start + number - 1}"
        kind = f"{mixer_name(arch, layer['mixer'])} + {layer['mlp']}"
        each = " each" if number > 1 else ""
        seen = first_of.setdefault(kind, start)
        like = f", as layer {seen}" if seen != start else ""
        lines.append(f"  {label:8} {layer['total']:13,} {layer['active']:13,}  {kind}{each}{like}")
        if not like:
            lines += [f"  {'':36}  {size:>12,}  {part}" for part, size in layer["parts"].items()]
        start += number
    rest = counts["total"] - table - sum(layer["total"] for layer in layers) - counts["multi_token"]
    if counts["multi_token"]:
        lines.append(f"  {'ahead':8} {counts['multi_token']:13,} {0:13,}  multi-token prediction, in training only")
    what = "last norm" + ("" if arch.tie_word_embeddings else ", output matrix")
    what += ", learned positions" if arch.position_embedding_type == "learned" else ""
    lines.append(f"  {'other':8} {rest:13,} {rest:13,}  {what}")
    return lines


def draw(described: dict[str, Architecture], path: Path) -> None:
    """One stack of layers a preset: mixer left, feed-forward right, the first layer at the bottom.

    Widths are shares of the layer's active parameters; an experts' box shows in outline what a token leaves unused.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    columns = min(5, len(described))
    rows = -(-len(described) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 3.5 * rows + 0.5), squeeze=False)
    for axis in axes.flat[len(described) :]:
        axis.axis("off")
    largest = {name: max(layer["total"] for layer in describe_layers(f)) for name, f in described.items()}
    for axis, (name, arch) in zip(axes.flat, described.items(), strict=False):
        _draw_stack(axis, arch, largest[name])
        counts = num_parameters(arch)
        active = f", {counts['active'] / 1e6:,.0f}M active" if counts["active"] < 0.95 * counts["total"] else ""
        axis.set_title(f"{name}\n{_millions(counts['total'])}{active}", fontsize=10)
    used = {mixer_name(f, layer["mixer"]) for f in described.values() for layer in describe_layers(f)}
    mlps = {layer["mlp"] for f in described.values() for layer in describe_layers(f)}
    patches = [Patch(color=c, label=n) for n, c in MIXER_COLOURS.items() if n in used]
    patches += [Patch(color=MLP_COLOURS[n], label=f"{n} feed-forward") for n in ("dense", "sparse") if n in mlps]
    if "sparse" in mlps:
        patches.append(Patch(facecolor="none", edgecolor=MLP_COLOURS["sparse"], label="experts a token does not use"))
    figure.legend(handles=patches, loc="lower center", ncols=min(6, len(patches)), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.6 / (3.5 * rows + 0.5), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_stack(axis, arch: Architecture, largest: int) -> None:
    for number, layer in enumerate(describe_layers(arch)):
        block = {"mlp", "gate", "experts", "shared_expert", "shared_expert_gate", "coefficient", "norms"}
        mixer = sum(size for part, size in layer["parts"].items() if part not in block) / largest
        whole, active = layer["total"] / largest, layer["active"] / largest
        colour = MLP_COLOURS[layer["mlp"]]
        axis.barh(number, mixer, color=MIXER_COLOURS[mixer_name(arch, layer["mixer"])], height=0.8)
        axis.barh(number, active - mixer, left=mixer, color=colour, height=0.8)
        if whole > active:
            axis.barh(number, whole - active, left=active, facecolor="none", edgecolor=colour, height=0.8)
    axis.set_yticks([0, arch.num_hidden_layers - 1], ["0", str(arch.num_hidden_layers - 1)], fontsize=8)
    axis.set_xticks([])
    axis.set_xlim(0, 1.02)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M" if count < 1e8 else f"{count / 1e6:,.0f}M"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    with exit_on_user_error():
        if args.seq_len < 1:
            raise UserError(f"--seq-len {args.seq_len}: it must be 1 or more")
        if args.backends is not None and args.backends < 1:
            raise UserError(f"--backends {args.backends}: it must be 1 or more")
        described = resolve(args.words)
        if args.backends is not None:
            print("\n".join(describe_legal(described, args.backends)))
            return 0
        tables = ["\n".join(layer_table(name, arch, args.seq_len)) for name, arch in described.items()]
        try:
            print("\n\n".join(tables), flush=True)
        except BrokenPipeError:  # the reader of our output left (`| head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if args.draw is not None:
            draw(described, args.draw)
            say(f"drew {args.draw}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
