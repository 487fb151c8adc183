"""Pretraining.

deepspeed launch/pretrain.py --deepspeed ds_configs/zero2.json [--config NAME|PATH] [section.key=value ...]
"""

import sys

from entry import main

if __name__ == "__main__":
    sys.exit(main("pretrain", "Pretrain a model (default: the demo on the built-in corpus).", "demo"))
