"""The benchmark at a toy size: it runs, and the errors it reports are those of right kernels."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_table_runs_on_a_cpu(tmp_path):
    """Each table has a row a method: a time and an error of rounding, or why it did not run."""
    command = [sys.executable, ROOT / "bench" / "kernels.py", "--device", "cpu", "--repeats", "2"]
    command += ["--rows", "256", "--vocab", "300", "--width", "16", "--output", tmp_path / "out"]
    command += ["--methods", "nanomath", "torch eager", "trl", "--tables", "logits", "logprobs"]
    done = subprocess.run(
        [*command, "hidden"], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out").read_text())
    for table in ("logits", "logprobs", "hidden"):
        methods = results[table]["methods"]
        assert methods["floor"]["share_of_floor"] == 1.0
        for name in ("nanomath", "torch eager"):
            assert len(methods[name]["times"]) == 2 and methods[name]["error"] < 2e-5
        assert methods["nanomath"]["ratio_10_90"] == [1.0, 1.0]
        assert "error" in methods["trl"] or "reason" in methods["trl"]
