"""The page of data_tools.inspect: one HTML file without anything outside it, the charts drawn as SVG."""

from __future__ import annotations

from pathlib import Path

from data_tools.inspection.measures import BINS_PER_OCTAVE

_LEFT, _RIGHT, _BOTTOM, _HEIGHT = 30, 510, 160, 150
_ROWS = 20


def write_page(summary: dict, path: Path) -> None:
    """Write the page of a summary."""
    import jinja2

    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    path.write_text(template.render(**content(summary)), encoding="utf-8")


def content(summary: dict) -> dict[str, object]:
    """What the template shows."""
    lengths = summary["characters_a_record"]
    numbers = [
        ("records", f"{summary['records']:,}"),
        ("characters", f"{summary['characters']:,}"),
        ("megabytes", f"{summary['bytes'] / 1e6:,.1f}"),
        ("median characters", f"{lengths['p50']:,}"),
        ("5 % to 95 %", f"{lengths['p5']:,} to {lengths['p95']:,}"),
        ("texts that repeat another", f"{summary['equal_texts']:.1%}"),
    ]
    if summary["tokens"]:
        numbers += [("tokens", f"{summary['tokens']:,}"), ("bytes a token", f"{summary['bytes_a_token']:.2f}")]
    total = max(1, summary["records"])
    return {
        "title": f"{summary['records']:,} records inspected",
        "inputs": ", ".join(summary["inputs"]),
        "numbers": numbers,
        "lengths": _lengths(summary["lengths"]),
        "compression": _compression(summary["compression"]),
        "languages": [(name, found["records"], f"{found['records'] / total:.1%}")
                      for name, found in list(summary["languages"].items())[:_ROWS]],
        "classes": [(name, share, f"{share:.2%}") for name, share in summary["character_classes"].items()],
        "rare": _rows(summary["rare_characters"]),
        "ngrams": [(name, _rows(found)) for name, found in summary["ngrams"].items()],
        "lines": _rows(summary["lines"]),
        "fields": [(f"{name} ({', '.join(sorted(kinds))})", sum(kinds.values()), f"{sum(kinds.values()) / total:.1%}")
                   for name, kinds in summary["fields"].items()],
        "rejected": _rows(summary["rejected"]),
        "rejected_details": [entries[0]["detail"] for entries in summary["examples"].values()],
        "texts": [(name, summary[key]) for name, key in
                  (("Drawn at random", "samples"), ("The longest", "longest"), ("The shortest", "shortest"))],
    }  # fmt: skip


def _rows(counts: dict[str, int]) -> list[tuple[str, int, str]]:
    return [(key, count, f"{count:,}") for key, count in list(counts.items())[:_ROWS]]


def _lengths(bins: dict[str, int]) -> dict[str, object]:
    """Half an octave a bar."""
    step = BINS_PER_OCTAVE // 2
    bars: dict[int, int] = {}
    for number, count in bins.items():
        bars[int(number) // step] = bars.get(int(number) // step, 0) + count
    first, last = min(bars, default=0), max(bars, default=0)
    said = {bar: f"{_short(2 ** (bar / 2))} to {_short(2 ** ((bar + 1) / 2))} characters" for bar in bars}
    every = max(1, (last - first + 1) // 8)
    marks = {bar: _short(2 ** (bar / 2)) for bar in range(first, last + 1, every)}
    return _histogram(bars, first, last, said, marks, "characters of a text")


def _compression(shares: dict[str, int]) -> dict[str, object]:
    """A fortieth a bar."""
    bars: dict[int, int] = {}
    for share, count in shares.items():
        bar = min(47, round(float(share) * 100) * 2 // 5)
        bars[bar] = bars.get(bar, 0) + count
    said = {bar: f"{bar / 40:.3f} to {(bar + 1) / 40:.3f}" for bar in bars}
    marks = {bar: f"{bar / 40:g}" for bar in range(0, 48, 8)}
    return _histogram(bars, 0, 47, said, marks, "bytes after zlib, as a part of those before")


def _histogram(
    bars: dict[int, int], first: int, last: int, said: dict[int, str], marks: dict[int, str], label: str
) -> dict[str, object]:
    width = (_RIGHT - _LEFT) / (last - first + 1)
    most = max(bars.values(), default=1)
    drawn = []
    for bar, count in sorted(bars.items()):
        height = _HEIGHT * count / most
        drawn.append({
            "x": round(_LEFT + (bar - first) * width, 1), "y": round(_BOTTOM - height, 1),
            "width": round(max(0.5, width - 1), 1), "height": round(height, 1), "said": f"{said[bar]}: {count:,}",
        })  # fmt: skip
    return {"bars": drawn, "label": label,
            "ticks": [(round(_LEFT + (bar - first) * width, 1), mark) for bar, mark in marks.items()]}  # fmt: skip


def _short(number: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
