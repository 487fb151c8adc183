"""What moves under the project: everything of transformers and DeepSpeed that is not public, documented API, or that
changed between the oldest and the newest allowed version, in one small module each; and the versions themselves.

Contract: nothing else in the project names these things (tests/test_architecture.py reads the syntax trees). A release
that renames one of them is mended here. Importing this package imports nothing.
"""
