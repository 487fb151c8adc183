"""Offline tools for corpora, tokenizers and shards; each is `python -m data_tools.X --help`."""

import minillm  # noqa: F401  (an old Python is refused there, in one line)
