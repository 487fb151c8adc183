"""Offline tools for corpora, tokenizers and shards; each is `python -m data_tools.X --help`."""

import minillm.utils.errors  # noqa: F401  (minillm refuses an old Python in one line)
