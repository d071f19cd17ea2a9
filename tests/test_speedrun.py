"""The whole chain, run as a user runs it: `bash speedrun.sh --preset smoke`, cut once per stage."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# (stage's heading, its first bar, signal, seconds after both are seen): a cut in each stage that
# takes a while, in the midst of its work on a fast machine and on a slow one.
CUTS = [
    ("== corpus", "scoring, round 1:", signal.SIGKILL, 0.2),
    ("== solutions", "", signal.SIGKILL, 0.3),
    ("== tokenizer", "", signal.SIGINT, 0.3),
    ("== pretrain", "pretrain:", signal.SIGKILL, 0.3),
    ("== sft", "sft:", signal.SIGINT, 2.0),
    ("== grpo", "grpo:", signal.SIGKILL, 1.0),
    ("== evaluate sft", "countdown, greedy:", signal.SIGKILL, 0.1),
    ("== report", "", signal.SIGKILL, 0.5),
]


def speedrun(run_dir: Path, cut=None, *flags: str) -> tuple[int, str]:
    """Run the smoke preset in its own process group; return its status and output."""
    command = ["bash", "speedrun.sh", "--preset", "smoke", "--run_dir", str(run_dir), *flags]
    # The environment the tests run in serves here too: no second one is set up.
    env = {**os.environ, "VENV": sys.prefix}
    log = run_dir.with_suffix(".log")
    with open(log, "wb") as file:
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            if cut is not None:
                heading, bar, number, delay = cut
                while process.poll() is None:
                    _, seen, after = log.read_text(errors="replace").partition(heading)
                    if seen and bar in after:
                        break
                    time.sleep(0.02)
                time.sleep(delay)
                if process.poll() is None:
                    os.killpg(process.pid, number)
            code = process.wait(timeout=900)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return code, log.read_text(errors="replace")


def results(run_dir: Path) -> dict:
    """Return everything a run is judged by, without times and paths."""
    evals = {}
    for path in [*run_dir.glob("eval-*.json"), *run_dir.glob("figure7-*.json")]:
        evals[path.stem] = json.loads(path.read_text())
        for name in ("checkpoint", "settings", "config_hash"):
            evals[path.stem].pop(name)
    report = (run_dir / "report.md").read_text().partition("| where the time goes")[0].splitlines()
    columns = [line.split("|")[1:2] + line.split("|")[3:] for line in report]  # without minutes
    return {
        "evals": evals,
        "report": [[" ".join(cell.split()).replace("-", "") for cell in row] for row in columns],
        "samples": (run_dir / "samples.md").read_text(),
        "corpus": (run_dir / "corpus" / "corpus.jsonl").read_bytes(),
        "tokenizer": (run_dir / "tokenizer" / "tokenizer.json").read_bytes(),
    }


@pytest.mark.slow
def test_run_cut_once_in_each_stage_ends_with_the_same_results(tmp_path):
    """The same seed gives the same evaluations and tables in another folder, timings apart: also
    after Ctrl-C or kill -9 in any stage and the same command again."""
    code, output = speedrun(tmp_path / "whole")
    assert code == 0, output[-3000:]
    for cut in CUTS:
        code, output = speedrun(tmp_path / "cut", cut)
        assert code != 0 or "== report" in cut[0], (cut, output[-3000:])
        if cut[2] == signal.SIGINT:  # what the stage took until then is noted, too
            noted = (tmp_path / "cut" / "seconds.tsv").read_text().splitlines()[-1]
            assert noted.split("\t")[0] == re.findall("\x1b\\[1m== (.+?)\x1b", output)[-1]
    code, output = speedrun(tmp_path / "cut")
    assert code == 0, output[-3000:]
    whole, cut = results(tmp_path / "whole"), results(tmp_path / "cut")
    assert len(whole["evals"]) == 6
    for name in whole:
        assert whole[name] == cut[name], name
    for picture in ("losses", "grpo", "pass_and_maj_at_k"):
        assert (tmp_path / "cut" / "plots" / f"{picture}.png").stat().st_size > 10_000

    started = time.monotonic()
    seconds = (tmp_path / "cut" / "seconds.tsv").read_text()
    code, output = speedrun(tmp_path / "cut")  # everything is done: quick, and nothing changes
    assert code == 0 and results(tmp_path / "cut")["evals"] == cut["evals"]
    assert (tmp_path / "cut" / "seconds.tsv").read_text() == seconds
    assert output.count("%|") == 0 or time.monotonic() - started < 120

    # Table 1 takes up a finished run, is cut, goes on, and then stands.
    code, output = speedrun(
        tmp_path / "cut", ("== table 1 seed: sft", "sft:", signal.SIGKILL, 1.0), "--table1"
    )
    assert code != 0
    code, output = speedrun(tmp_path / "cut", None, "--table1")
    assert code == 0, output[-3000:]
    table = json.loads((tmp_path / "cut" / "table1.json").read_text())
    assert list(table["rows"]) == ["random", "seed", "recalled"]
    assert len({row["train_tokens"] for row in table["rows"].values()}) == 1
    assert results(tmp_path / "cut")["evals"] == cut["evals"]
    noted = (tmp_path / "cut" / "seconds.tsv").read_text().removeprefix(seconds).splitlines()
    assert all(line.startswith("table 1") for line in noted)
    assert noted[-1].startswith("table 1\t")
