#!/usr/bin/env bash
# GRPO with the paper's settings on two machines of eight GPUs that share this folder. On both:
# bash runs/two_nodes.sh FIRST_HOST runs/sft
set -euo pipefail
cd "$(dirname "$0")/.."
torchrun --nnodes 2 --nproc_per_node 8 --max-restarts 3 \
    --rdzv_backend c10d --rdzv_id nanomath --rdzv_endpoint "$1:29500" train_grpo.py \
    --init "$2" --run_dir runs/grpo --activation_checkpointing selective
