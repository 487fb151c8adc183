"""Weights and configs between minillm, its run folders and transformers' own classes. Imports nothing by itself."""
