"""PNG pictures of topics: their words, how good each number of topics is, their shares over time.

Chinese needs a font that has it. The first one found is used: `--font FILE`, a font of the system (Noto Sans CJK,
WenQuanYi, SimHei, PingFang, Microsoft YaHei ...), the fonts of the package mplfonts. Where there is none, one warning
says so, and every picture is written as .svg too, whose text the browser's own fonts draw.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from minillm.utils.errors import UserError
from minillm.utils.logging import warn

_CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK TC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC",
    "Source Han Sans CN", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei", "PingFang SC",
    "Hiragino Sans GB", "Heiti SC", "Heiti TC", "STHeiti", "Arial Unicode MS", "Droid Sans Fallback",
    "AR PL UMing CN", "AR PL UKai CN", "SimSun",
)  # fmt: skip
_CJK = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_COLOURS = "#3b6ea5 #c8553d #588157 #8d6a9f #c9952b #4f9d9d #a23b72 #6b705c #b5651d #5f6caf".split()


class Pictures:
    """Draws into a folder.

    Args:
        texts: whatever will be written, to know whether Chinese is in it.
        font: a font file to use.

    Raises:
        UserError: `font` is not a font file.
    """

    def __init__(self, folder: Path, texts: Iterable[str], font: Path | None = None) -> None:
        import matplotlib

        matplotlib.use("Agg")
        self._folder = folder
        self._families = ["DejaVu Sans"]
        needs_cjk = any(_CJK.search(text) for text in texts)
        found = _font_family(font, needs_cjk)
        self._as_svg = needs_cjk and found is None
        if found is not None:
            self._families.insert(0, found)
        if self._as_svg:
            warn(
                "no font with Chinese was found: the pictures' .png show boxes for it, the .svg beside them are drawn "
                "with the browser's fonts. Install one (apt install fonts-noto-cjk, or pip install mplfonts), or name "
                "a file with --font"
            )

    def words(self, topics: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> None:
        """topics.png with all topics, topic-03.png each: bars of the words' probabilities.

        Args:
            topics: (title, [(word, probability)]) in order.
        """
        columns = min(5, len(topics))
        rows = -(-len(topics) // columns)
        with self._figure("topics", (4.0 * columns, 2.9 * rows + 0.3), rows, columns) as axes:
            for number, (title, words) in enumerate(topics):
                self._bars(axes[number], title, words[:10], _COLOURS[number % len(_COLOURS)])
            for spare in axes[len(topics) :]:
                spare.set_visible(False)
        for number, (title, words) in enumerate(topics):
            with self._figure(f"topic-{number:02d}", (6.4, 0.28 * len(words) + 1.2)) as axes:
                self._bars(axes[0], title, words, _COLOURS[number % len(_COLOURS)])

    def _bars(self, axes, title: str, words: Sequence[tuple[str, float]], colour: str) -> None:
        places = range(len(words))
        axes.barh(places, [probability for _, probability in words], color=colour, height=0.72)
        axes.set_yticks(places, [word for word, _ in words])
        axes.set_ylim(len(words) - 0.4, -0.6)
        axes.set_title(title, fontsize=10, loc="left")
        axes.tick_params(labelsize=8.5, length=0)
        axes.tick_params(axis="x", labelsize=7.5, colors="0.4")
        axes.locator_params(axis="x", nbins=4)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)

    def numbers_of_topics(self, table: Sequence[dict], measure: str, best: int) -> None:
        """num_topics.png: coherence by the number of topics."""
        from matplotlib.ticker import MaxNLocator

        numbers = [row["num_topics"] for row in table]
        with self._figure("num_topics", (7.0, 4.0)) as (axes,):
            for name, colour in (("c_v", _COLOURS[0]), ("c_npmi", _COLOURS[1])):
                axes.plot(numbers, [row[name] for row in table], "o-", color=colour, label=name, markersize=4)
            axes.axvline(best, color="0.6", linestyle="--", linewidth=1, label=f"{best} topics, chosen")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("number of topics")
            axes.set_ylabel(f"coherence (chosen by {measure})")
            axes.grid(alpha=0.25)
            axes.legend(frameon=False)

    def over_time(self, periods: Sequence[str], shares: Sequence[Sequence[float]], labels: Sequence[str]) -> None:
        """topics_over_time.png: a stack of the topics' shares, a column a period.

        Args:
            shares: for each period the share of every topic.
        """
        with self._figure("topics_over_time", (10.0, 4.6)) as (axes,):
            bottom = [0.0] * len(periods)
            for topic, label in enumerate(labels):
                heights = [row[topic] for row in shares]
                axes.bar(
                    range(len(periods)),
                    heights,
                    bottom=bottom,
                    width=0.9,
                    label=f"{topic} {label}",
                    color=_COLOURS[topic % len(_COLOURS)],
                    alpha=1.0 if topic < len(_COLOURS) else 0.55,
                )
                bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
            step = max(1, len(periods) // 15)
            axes.set_xticks(range(0, len(periods), step), periods[::step], rotation=45, ha="right", fontsize=8)
            axes.set_ylabel("share of the words")
            axes.set_ylim(0, 1)
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, reverse=True)

    def _figure(self, name: str, size: tuple[float, float], rows: int = 1, columns: int = 1) -> _Figure:
        return _Figure(self._folder, name, size, rows, columns, self._families, self._as_svg)


class _Figure:
    """A figure that is written where its block ends; gives the flat list of its axes."""

    def __init__(self, folder, name, size, rows, columns, families, as_svg) -> None:
        self._path, self._size, self._grid = folder / f"{name}.png", size, (rows, columns)
        self._settings = {"font.family": families, "svg.fonttype": "none"}
        self._as_svg = as_svg

    def __enter__(self) -> list:
        from matplotlib import pyplot, rc_context

        self._context = rc_context(self._settings)
        self._context.__enter__()
        self._figure, axes = pyplot.subplots(*self._grid, figsize=self._size, squeeze=False, layout="constrained")
        return list(axes.flat)

    def __exit__(self, kind, *_: object) -> None:
        from matplotlib import pyplot

        try:
            if kind is None:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Glyph .* missing from")  # said once, by Pictures
                    self._figure.savefig(self._path, dpi=110)
                    if self._as_svg:
                        self._figure.savefig(self._path.with_suffix(".svg"))
        finally:
            pyplot.close(self._figure)
            self._context.__exit__(None, None, None)


def _font_family(font: Path | None, needs_cjk: bool) -> str | None:
    """The family to use before DejaVu Sans; None where that is enough or nothing is found."""
    from matplotlib import font_manager

    if font is None and needs_cjk:
        known = {entry.name for entry in font_manager.fontManager.ttflist}
        for name in _CJK_FONTS:
            if name in known:
                return name
        package = importlib.util.find_spec("mplfonts")
        places = (package.submodule_search_locations if package else None) or ()
        files = (Path(place) / "fonts" / "NotoSansCJKsc-Regular.otf" for place in places)
        font = next((file for file in files if file.is_file()), None)
    if font is None:
        return None
    try:
        font_manager.fontManager.addfont(font)
        return font_manager.FontProperties(fname=font).get_name()
    except (OSError, RuntimeError) as error:
        raise UserError(f"--font {font} cannot be used ({error}): name a .ttf, .otf or .ttc file") from error
