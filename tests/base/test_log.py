"""Run logs: what a resumed run drops and keeps, and text that must not drive a terminal."""

import json
import math
import sys

from nanomath.base.log import RunLog, plot_metrics, printable, read_metrics


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


def test_tensorboard_can_be_left_out(tmp_path):
    """tensorboard=False writes no event file; lists of numbers are for metrics.jsonl alone."""
    for flag in (False, True):
        log = RunLog(tmp_path / str(flag), start_step=0, tensorboard=flag)
        log.metrics(0, {"loss": 1.0, "skipped_rows": [3, 4]})
        log.close()
    assert not (tmp_path / "False" / "events").exists()
    assert len([*(tmp_path / "True" / "events").iterdir()]) == 1


def test_a_disk_that_refuses_a_plot_costs_a_warning(tmp_path, capsys):
    """A picture is not worth a run."""
    write_steps(tmp_path, 0, 2)
    (tmp_path / "plots").touch()  # where the folder should be
    assert plot_metrics(tmp_path, [("loss", ["lo*"])]) is None
    assert "no plot" in capsys.readouterr().err


def test_what_is_not_finite_is_null(tmp_path):
    """metrics.jsonl is strict JSON: NaN and infinities are null there, also of a file written
    before, NaN to a reader, and no gap stops a plot."""
    old = '{"step": 0, "loss": NaN, "kl": -Infinity, "lr": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(old)
    log = RunLog(tmp_path, start_step=1, tensorboard=False)
    log.metrics(1, {"loss": math.inf, "kl": 0.5, "lr": 1, "skipped_rows": [3]})
    log.metrics(2, {"loss": math.nan, "kl": -math.inf, "lr": 2.0})
    log.close()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"step": 0, "loss": None, "kl": None, "lr": 1.0},
        {"step": 1, "loss": None, "kl": 0.5, "lr": 1, "skipped_rows": [3]},
        {"step": 2, "loss": None, "kl": None, "lr": 2.0},
    ]
    rows = read_metrics(tmp_path)
    assert all(math.isnan(row["loss"]) for row in rows) and rows[1]["kl"] == 0.5
    assert plot_metrics(tmp_path, [("loss", ["loss"]), ("KL", ["kl"])]).exists()
