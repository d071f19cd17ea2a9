"""The benchmark of a whole GRPO step at a toy size: it runs, and both sides do the same work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = {
    "num_layers": 1, "width": 16, "num_heads": 2, "ffn_width": 24, "vocab_size": 300,
    "num_prompts": 4, "group_size": 4, "new_tokens": 8, "micro_batch_size": 8, "num_steps": 2,
    "threads": 1,
}  # fmt: skip


@pytest.mark.peers
@pytest.mark.parametrize("mean_length", [1.0, 0.4])
def test_grpo_step_beside_trl(tmp_path, mean_length):
    """Each side reports its steps: as many outputs, of the asked length, with times and memory."""
    pytest.importorskip("trl", reason="needs the extra [peers]")
    flags = [f"--{name}={value}" for name, value in {**SMALL, "mean_length": mean_length}.items()]
    command = [sys.executable, "bench/grpo_step.py", *flags, "--prompt_tokens", "3", "7"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    for side in ("nanomath", "trl"):
        row = result[side]
        assert (
            len(row["seconds_of_each_step"]) == 2 and row["peak_mb"] > row["peak_above_import_mb"]
        )
        # 32 outputs of at most 8 tokens: their mean is within 2 of what was asked for.
        assert abs(row["mean_length"] - 8 * mean_length) <= (2.0 if mean_length < 1 else 0.0)
    assert sum(result["nanomath"]["phases"].values()) <= 1.1 * result["nanomath"]["seconds"]
