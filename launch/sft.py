"""Fine-tuning.

deepspeed launch/sft.py --deepspeed ds_configs/zero2.json [--config NAME|PATH] [section.key=value ...]
"""

import sys

from entry import main

if __name__ == "__main__":
    sys.exit(main("sft", "Fine-tune on conversations (default: the newest pretraining run).", "sft-demo"))
