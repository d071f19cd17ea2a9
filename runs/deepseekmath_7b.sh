#!/usr/bin/env bash
# The paper's GRPO (Sec. 4.2) from DeepSeekMath-Instruct 7B on GSM8K: 8 GPUs of 80 GB.
# 16 questions x 64 outputs of up to 1024 tokens a step, 144 steps.
#
# Plan: 67.3 GB of 80, 28 s a step (python -m nanomath.measure.plan --preset deepseekmath_7b). A GPU samples
# 78 of its 128 outputs at a time: all at once would save 4 s a step, and take 92.6 GB.
# Disk: 111 GB a checkpoint, three at a time.
#
# Two machines of 8 GPUs that share this folder (59.6 GB, 15 s a step). After the download, on the
# first and on the second:
#   NODES=2 HOST=first-machine NODE=0 bash runs/deepseekmath_7b.sh
#   NODES=2 HOST=first-machine NODE=1 bash runs/deepseekmath_7b.sh
# Under Slurm: sbatch runs/slurm.sh train_grpo.py --preset deepseekmath_7b
PRESET=deepseekmath_7b
HUB=deepseek-ai/deepseek-math-7b-instruct
REVISION="${REVISION:-refs/pr/2}" # its main branch has no safetensors, only pickles
DATA="gsm8k math"
NPROC="${NPROC:-8}"
source "$(dirname "$0")/stages.sh"
