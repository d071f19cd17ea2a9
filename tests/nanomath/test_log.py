"""Run logs: what a resumed run drops and keeps, and text that must not drive a terminal."""

import json
import sys

from nanomath.log import RunLog, plot_metrics, printable, read_metrics


def write_steps(run_dir, start, stop):
    log = RunLog(run_dir, start_step=start)
    for step in range(start, stop):
        log.metrics(step, {"loss": 1.0 / (step + 1)})
        log.samples(step, [f"text of {step}", "=== step 99 is only text"])
    log.close()


def test_resumed_log_equals_the_uninterrupted_one(tmp_path):
    """Steps written after the last checkpoint are dropped, so the files end up the same."""
    write_steps(tmp_path / "whole", 0, 6)
    write_steps(tmp_path / "cut", 0, 5)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    write_steps(tmp_path / "cut", 3, 6)
    for name in ("metrics.jsonl", "samples.txt"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert [row["step"] for row in read_metrics(tmp_path / "cut")] == list(range(6))


def test_samples_cut_at_any_byte_are_dropped(tmp_path, monkeypatch):
    """Wherever a kill cut the samples of step 12, in its heading or within a character, a resumed
    run keeps those of step 11 as they were."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    path = tmp_path / "samples.txt"
    log = RunLog(tmp_path, start_step=11)
    log.samples(11, ["3 + 4", "", "one\n\ntwo"])
    whole = path.read_bytes()
    log.samples(12, ["\u7b54 = 7"])
    log.close()
    raw = path.read_bytes()
    for size in range(len(whole), len(raw) + 1):
        path.write_bytes(raw[:size])
        RunLog(tmp_path, start_step=12).close()
        assert path.read_bytes() == whole, raw[:size]


def test_other_ranks_write_nothing(tmp_path):
    """Only the first rank logs."""
    log = RunLog(tmp_path / "rank1", start_step=0, is_main=False)
    log.metrics(0, {"loss": 1.0})
    log.samples(0, ["x"])
    log.close()
    assert not (tmp_path / "rank1").exists()


def test_control_characters_are_escaped():
    """Escape sequences, bells and direction marks of model text are shown, not obeyed."""
    assert printable("a\x1b[2Jb\x07\nc\u202ed") == "a\\x1b[2Jb\\x07\nc\\x202ed"
    assert printable("1 + 2 = 3 \u7b54\u6848") == "1 + 2 = 3 \u7b54\u6848"


def test_plot_has_one_panel_per_metric_with_data(tmp_path):
    """A plot is a PNG; without data there is none."""
    write_steps(tmp_path, 0, 3)
    path = plot_metrics(tmp_path, [("loss", ["loss"]), ("nothing", ["absent"])])
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert plot_metrics(tmp_path, [("nothing", ["absent"])]) is None
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"] == 1.0
