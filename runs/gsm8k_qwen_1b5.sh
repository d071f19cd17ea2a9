#!/usr/bin/env bash
# GRPO on GSM8K's 7,473 training questions, from Qwen2.5-1.5B-Instruct: one GPU of 80 GB. It does
# not fit 24 GB: weights, moments, reference and the copy that samples are 28 GB by themselves.
# 16 questions x 64 outputs of up to 512 tokens a step, 417 steps.
#
# Plan: 54.7 GB of 80, 15 s a step (python -m nanomath.measure.plan --preset gsm8k_qwen_1b5).
# Disk: 25 GB a checkpoint, three at a time.
PRESET=gsm8k_qwen_1b5
HUB=Qwen/Qwen2.5-1.5B-Instruct
DATA=gsm8k
NPROC="${NPROC:-1}"
source "$(dirname "$0")/stages.sh"
