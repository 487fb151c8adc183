#!/usr/bin/env bash
# From nothing to a chat: install, corpus, tokenizer, shards, pretraining, fine-tuning, a short conversation.
# Run it again after an interruption: finished stages are skipped, a broken one resumes. Uses the GPUs where there are any.
#
#   bash launch/quickstart.sh [--num_gpus N]       (arguments go to the deepspeed launcher)
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

data=data/python-docs
# Cards older than Ampere (compute capability 8.0) have no bf16: T4, V100.
json=ds_configs/zero2.json
oldest=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -n | head -n 1 || true)
[[ ! $oldest =~ ^[1-7]\. ]] || json=ds_configs/zero2_fp16.json
stage() { echo; echo "== $1  ($(date +%T))"; }

stage "1/5 corpus, tokenizer and shards from this machine's Python documentation"
python -m data_tools.builtin --out "$data"

stage "2/5 what the tokenizer does"
python -m data_tools.tokenizer inspect "$data/tokenizer" README.md

stage "3/5 pretraining (runs/demo)"
deepspeed "$@" launch/pretrain.py --deepspeed "$json" --config demo

stage "4/5 fine-tuning on questions and answers (runs/sft-demo)"
deepspeed "$@" launch/sft.py --deepspeed "$json" --config sft-demo

stage "5/5 a short chat"
for question in "What does the function len do?" "What is the class pathlib.Path for?" "What does json.loads do?"; do
    echo "you> $question"
    echo "minillm> $(python -m minillm.chat sft-demo --prompt "$question" --temperature 0 --max-new-tokens 80 2>/dev/null)"
done
echo
echo "Talk to it yourself: $(command -v python) -m minillm.chat"
