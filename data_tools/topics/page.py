"""topics.html: pyLDAvis' interactive map of a topic model in one file that needs no network.

pyLDAvis' own pages load d3 and LDAvis from two web sites; both scripts come with the package and are put into the page.
Below the map stands a plain table of the topics, which is there without scripts too. The map counts from 1, because its
script takes 0 for no topic; the table has both numbers.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.extras import require
from data_tools.topics.engines import Fitted
from data_tools.topics.model import readable
from minillm.utils.files import write_atomic

_MAX_WORDS = 20_000  # the most frequent words the map may know: it is one file for a browser
_STEP = 0.05  # of the slider

_PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>{title}</title>
<style>{css}
body {{ font-family: sans-serif; margin: 1em 2em; }} table {{ border-collapse: collapse; margin-top: 1em; }}
td, th {{ padding: 0.2em 0.8em; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }}</style>
<script>{d3}</script>
<script>{ldavis}</script>
</head><body>
<h1>{title}</h1>
<div id="topics"></div>
<script>new LDAvis("#topics", {data});</script>
{table}
</body></html>
"""


def write_page(
    path: Path,
    title: str,
    fitted: Fitted,
    words: Sequence[str],
    word_counts: np.ndarray,
    topic_shares: np.ndarray,
    topics: Sequence[dict],
) -> None:
    """Write the page.

    Args:
        topic_shares: [topics] share of all words.
        topics: the entries of topics.json, for the table.
    """  # fmt: skip
    pyldavis = require("pyLDAvis", "pyldavis")
    urls = require("pyLDAvis.urls", "pyldavis")
    keep = np.arange(len(words)) if len(words) <= _MAX_WORDS else np.sort(np.argsort(-word_counts)[:_MAX_WORDS])
    distribution = fitted.topics[:, keep].astype(np.float64)
    distribution = np.maximum(distribution, 1e-12)
    distribution /= distribution.sum(axis=1, keepdims=True)
    # pyLDAvis takes from the documents only how many words each topic has: one document with all of them says the same
    prepared = pyldavis.prepare(
        distribution, topic_shares[None], [int(word_counts.sum())], [readable(words[n]) for n in keep],
        np.maximum(word_counts[keep], 1), sort_topics=False, start_index=1, n_jobs=1, lambda_step=_STEP,
        mds="pcoa",
    )  # fmt: skip
    parts = {
        "title": html.escape(title),
        "css": Path(urls.LDAVIS_CSS_LOCAL).read_text(encoding="utf-8"),
        "d3": _script(Path(urls.D3_LOCAL).read_text(encoding="utf-8")),
        "ldavis": _script(Path(urls.LDAVIS_LOCAL).read_text(encoding="utf-8")),
        "data": _script(json.dumps(json.loads(prepared.to_json()), ensure_ascii=False)),
        "table": _table(topics),
    }
    write_atomic(path, _PAGE.format(**parts))


def _script(text: str) -> str:
    """Text that may stand inside a <script>: no end tag in it, and the line separators that JSON allows escaped."""
    return text.replace("</", "<\\/").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _table(topics: Sequence[dict]) -> str:
    lines = []
    for topic in topics:
        words = html.escape(", ".join(readable(entry["word"]) for entry in topic["words"][:15]))
        found = f"{topic['share']:.1%}", f"{topic['coherence']['c_npmi']:.3f}", words
        cells = (str(topic["topic"] + 1), str(topic["topic"]), *found)
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    names = ("in the map", "topic", "share", "c_npmi", "words")
    rows = ["".join(f"<th>{name}</th>" for name in names), *lines]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
