"""What `data_tools.dedup` and `data_tools.contamination` are made of: shingles, signatures, runs on disk, clusters."""
