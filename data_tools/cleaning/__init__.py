"""The parts of `python -m data_tools.clean`: repair, masking, line rules, language, document rules; all pure functions.

Contract: every part is deterministic and stable: applied to its own result it changes nothing. They run in this order
(data_tools/cleaning/cleaner.py), so that every measure is taken of the text that is written.
"""
