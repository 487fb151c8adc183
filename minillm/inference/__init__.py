"""Talking to a model: prompts, sampling, streaming. Is handed model objects; knows no files and no terminal."""
