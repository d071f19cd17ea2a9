#!/usr/bin/env bash
# The well-known Countdown run from Qwen2.5-3B-Instruct: 4 GPUs of 80 GB. Its problems are made here.
# 24 questions x 8 outputs of up to 1024 tokens a step, 450 steps.
#
# Plan: 58.4 GB of 80, 5 s a step (python -m nanomath.measure.plan --preset countdown_qwen_3b).
# Disk: 49 GB a checkpoint, three at a time.
PRESET=countdown_qwen_3b
HUB=Qwen/Qwen2.5-3B-Instruct
DATA=""
NPROC="${NPROC:-4}"
source "$(dirname "$0")/stages.sh"
