#!/usr/bin/env bash
# GRPO on GSM8K's 7,473 training questions, from Qwen2.5-0.5B-Instruct: one GPU of 24 GB or more.
# 16 questions x 64 outputs of up to 512 tokens a step, 417 steps.
#
# Plan: 16.6 GB of 24, 5 s a step (python -m nanomath.measure.plan --preset gsm8k_qwen_0b5).
# Disk: 8 GB a checkpoint, three at a time.
PRESET=gsm8k_qwen_0b5
HUB=Qwen/Qwen2.5-0.5B-Instruct
DATA=gsm8k
NPROC="${NPROC:-1}"
source "$(dirname "$0")/stages.sh"
