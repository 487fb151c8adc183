"""Vectors of items from the sequences they stand in, and what they recommend (data_tools.item2vec)."""
