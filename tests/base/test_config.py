"""Command lines built from dataclasses: precedence, errors that name the flag, run-folder locks."""

import json
from dataclasses import dataclass

import pytest

from nanomath.base.config import lock_config, opt, parse


@dataclass(frozen=True)
class Config:
    lr: float = opt(1e-6, "peak learning rate, 100% of it", low=0.0)
    names: tuple[str, ...] = opt(("a", "b"), "names")
    limit: int | None = opt(None, "at most")
    fast: bool = opt(True, "fast")
    kind: str = opt("x", "kind", choices=("x", "y"))
    run_dir: str = opt("runs/a", "folder", may_change=True)


PRESETS = {"small": {"lr": 2.0, "fast": False}}


def test_flag_beats_preset_beats_default():
    """A value comes from the flag, else from the preset, else from the dataclass."""
    assert parse(Config, PRESETS, []) == Config()
    assert parse(Config, PRESETS, ["--preset", "small"]) == Config(lr=2.0, fast=False)
    argv = ["--lr", "3", "--preset", "small", "--fast", "--names", "q", "--limit", "7"]
    assert parse(Config, PRESETS, argv) == Config(lr=3.0, names=("q",), limit=7)
    assert parse(Config, PRESETS, ["--no_fast", "--limit", "none"]) == Config(fast=False)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lrr", "3"], ["--lrr", "--lr"]),
        (["--lr", "x"], ["--lr", "'x'"]),
        (["--lr", "nan"], ["--lr", "'nan'"]),
        (["--lr", "-1"], ["--lr", "at least 0"]),
        (["--kind", "z"], ["--kind", "'z'"]),
        (["--preset", "huge"], ["--preset", "huge", "small"]),
        (["--names"], ["--names"]),
        (["--l", "1"], ["--l", "--lr"]),
    ],
)
def test_bad_flags_end_with_one_line_that_names_them(argv, words, capsys):
    """A bad flag is one line on stderr with status 2, naming it and the nearest flag."""
    with pytest.raises(SystemExit) as error:
        parse(Config, PRESETS, argv)
    text = capsys.readouterr().err
    assert error.value.code == 2
    assert text.count("\n") == 1
    assert all(word in text for word in words), text


def test_help_shows_value_and_source(capsys):
    """--help shows each flag's value and text, percent signs included."""
    with pytest.raises(SystemExit) as error:
        parse(Config, PRESETS, ["--help"])
    text = capsys.readouterr().out
    assert error.value.code == 0
    assert "peak learning rate, 100% of it [1e-06]" in text and "[a b]" in text


def test_run_folder_refuses_other_settings_but_not_another_place(tmp_path):
    """A run keeps its settings for life; fields marked may_change are free."""
    lock_config(Config(), tmp_path)
    lock_config(Config(run_dir="runs/b"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["run_dir"] == "runs/b"
    with pytest.raises(SystemExit, match="--lr was 1e-06, is 0.5"):
        lock_config(Config(lr=0.5), tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="not JSON"):
        lock_config(Config(), tmp_path)
