"""Command lines built from dataclasses: precedence, errors that name the flag, run-folder locks."""

import json
import re
from dataclasses import dataclass

import pytest

from nanomath.base.config import lock_config, opt, parse
from nanomath.settings import GRPOConfig
from train_pretrain import PretrainConfig
from train_sft import SFTConfig


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
    for text in ("{", "[1]", "3"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json: not .*; remove it or give another"):
            lock_config(Config(), tmp_path)


def test_a_run_older_than_a_setting_had_its_default(tmp_path):
    """Each setting in turn is missing from config.json: its default continues the run, another
    value is refused, with the default named as what it was."""
    others = {"lr": 0.5, "names": ("z",), "limit": 7, "fast": False, "kind": "y"}
    for name, other in others.items():
        lock_config(Config(), tmp_path / name)
        path = tmp_path / name / "config.json"
        stored = json.loads(path.read_text())
        default = stored.pop(name)
        path.write_text(json.dumps(stored))
        lock_config(Config(), tmp_path / name)
        assert json.loads(path.read_text())[name] == default
        path.write_text(json.dumps(stored))
        with pytest.raises(SystemExit, match=re.escape(f"--{name} was {default!r}, is ")):
            lock_config(Config(**{name: other}), tmp_path / name)


@pytest.mark.parametrize(
    ("cls", "name", "refused", "kept"),
    [
        *((cls, "max_grad_norm", ["0", "-1", "nan", "inf", ""], ["none", "1e-9"])
          for cls in (GRPOConfig, SFTConfig, PretrainConfig)),
        *((cls, name, ["1", "1.5", "-0.1"], ["0", "0.999"])
          for cls in (GRPOConfig, SFTConfig, PretrainConfig) for name in ("beta1", "beta2")),
        (GRPOConfig, "clip_eps", ["1", "2", "-0.1"], ["0", "0.9"]),
        (GRPOConfig, "clip_eps_high", ["-0.1", "inf"], ["none", "0", "5"]),
        (GRPOConfig, "temperature", ["0", "1e7"], ["0.001", "1"]),
        (GRPOConfig, "eval_temperature", ["0", "1e7"], ["0.001", "1"]),
        (GRPOConfig, "group_size", ["1", "0"], ["2"]),
        (GRPOConfig, "problems", [""], ["none", "a.jsonl"]),
        (GRPOConfig, "reward", [""], ["answer"]),
        (GRPOConfig, "run_dir", [""], ["x"]),
        (SFTConfig, "data", [""], ["x"]),
        (SFTConfig, "threads", ["-1", "100000000"], ["0", "1"]),
        (PretrainConfig, "seed", ["-1", str(2**63)], [str(2**63 - 1)]),
    ],
)  # fmt: skip
def test_bounds_of_the_trainers_flags(cls, name, refused, kept, capsys):
    """What would train nothing, or fail in the middle of a step, is refused with one line that
    names the flag; what lies just inside the bound is not."""
    for value in refused:
        with pytest.raises(SystemExit) as error:
            parse(cls, {}, [f"--{name}={value}"])
        assert error.value.code == 2
        text = capsys.readouterr().err
        assert f"--{name}" in text and text.count("\n") == 1
    for value in kept:
        parse(cls, {}, [f"--{name}={value}"])


def test_refused_clipping_says_how_to_turn_it_off(capsys):
    """--max_grad_norm 0 would scale every gradient to 0: the line names `none`, which is None."""
    with pytest.raises(SystemExit):
        parse(GRPOConfig, {}, ["--max_grad_norm", "0"])
    assert "--max_grad_norm is 0.0, but must be above 0.0, or none" in capsys.readouterr().err
    assert parse(GRPOConfig, {}, ["--max_grad_norm", "none"]).max_grad_norm is None
