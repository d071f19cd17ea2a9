#!/usr/bin/env bash
# GRPO with the paper's settings on one machine's eight GPUs: bash runs/eight_gpus.sh runs/sft
# A process that dies is started again with the others, and the run resumes by itself.
set -euo pipefail
cd "$(dirname "$0")/.."
torchrun --standalone --nproc_per_node 8 --max-restarts 3 train_grpo.py \
    --init "$1" --run_dir runs/grpo --activation_checkpointing selective
