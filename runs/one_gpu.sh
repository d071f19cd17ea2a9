#!/usr/bin/env bash
# SFT and GRPO on one GPU, from a base model: bash runs/one_gpu.sh runs/base runs/solutions.jsonl
set -euo pipefail
cd "$(dirname "$0")/.."
python train_sft.py --preset gpu --init "$1" --data "$2" --run_dir runs/sft
python train_grpo.py --preset gpu --init runs/sft --run_dir runs/grpo
