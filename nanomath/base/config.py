"""Command lines built from dataclasses: every hyper-parameter exists once, with unit and source.

A script opens with one flat frozen dataclass whose fields are made by `opt`, and calls `parse`:

    @dataclass(frozen=True)
    class Config:
        lr: float = opt(1e-6, "peak learning rate, Sec. 4.2", low=0.0)
        group_size: int = opt(64, "outputs per question G, Sec. 4.2", low=2)

    cfg = parse(Config, PRESETS)        # --lr 5e-7 --group_size 8 --preset countdown_qwen_3b

Field types: int, float, str, bool (`--x` / `--no_x`), `T | None` (the word none), tuple[T, ...].
`lock_config` saves the resolved values in the run folder and refuses to continue a run under
other ones.
"""

import argparse
import dataclasses
import difflib
import json
import math
import operator
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from nanomath.base.files import read_json, write_json

T = TypeVar("T")


def opt(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    may_change: bool = False,
    short: str | None = None,
) -> Any:
    """Declare one hyper-parameter: its default, and a help text with unit and source.

    low and high are inclusive bounds, above and below exclusive ones. may_change marks what a
    resumed run may have different (paths, threads, how often to print): everything else is fixed
    for the life of a run folder. short is a one-letter flag beside the field's name.
    """
    meta = {"help": help, "choices": choices, "may_change": may_change, "short": short}
    bounds = {"low": low, "high": high, "above": above, "below": below}
    return dataclasses.field(default=default, metadata=meta | bounds)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every trainer has; a script's own dataclass adds its fields to these."""

    run_dir: str = opt(
        "runs/run", "folder of this run: config, metrics, checkpoints, plots", may_change=True
    )
    seed: int = opt(0, "seed of weights, data order and samples", low=0, high=2**63 - 1)
    device: str = opt("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"), may_change=True)
    threads: int = opt(
        0, "torch threads per process; 0: one per core", low=0, high=1024, may_change=True
    )
    micro_batch_size: int = opt(
        8,
        "rows of one forward and backward pass; lower it when memory runs out",
        low=1,
        may_change=True,  # the update is the same up to rounding
    )
    activation_checkpointing: str = opt(
        "none",
        "what blocks recompute in the backward pass to save memory: see activations.py",
        choices=("none", "selective", "full"),
        may_change=True,
    )
    compile: str = opt(
        "auto",
        "torch.compile of the blocks; auto: on a GPU",
        choices=("auto", "on", "off"),
        may_change=True,
    )
    tensorboard: bool = opt(True, "write TensorBoard's event files too", may_change=True)
    checkpoint_interval: int = opt(50, "steps between checkpoints", low=1, may_change=True)
    keep_checkpoints: int = opt(2, "how many checkpoints to keep", low=1, may_change=True)
    max_grad_norm: float | None = opt(
        1.0,
        "largest gradient norm, a larger one is scaled down; none: any (paper silent)",
        above=0.0,
    )


def parse(
    cls: type[T],
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
) -> T:
    """Read the command line into `cls`: defaults, then --preset's values, then the flags given.

    Raises SystemExit(2) with one line that names the flag and the fix.
    """
    presets = presets or {}
    first = _Parser(add_help=False, allow_abbrev=False)  # --preset says what the defaults are
    if presets:
        help_text = "a set of values; add --help to see them"
        first.add_argument("--preset", choices=sorted(presets), help=help_text)
    preset = vars(first.parse_known_args(argv)[0]).get("preset")
    start = cls(**presets.get(preset, {}))

    layout = argparse.RawDescriptionHelpFormatter
    about = {"description": description, "formatter_class": layout, "parents": [first]}
    parser = _Parser(**about, allow_abbrev=False)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        _add_argument(parser, field, hints[field.name], getattr(start, field.name))
    args = vars(parser.parse_args(argv))
    args.pop("preset", None)
    cfg = cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in args.items()})
    for field in dataclasses.fields(cls):
        if problem := _out_of_bounds(field, getattr(cfg, field.name), hints[field.name]):
            parser.error(problem)
    return cfg


class _Parser(argparse.ArgumentParser):
    """argparse whose error for an unknown flag is one line that names the nearest one."""

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.0)
            self.error(f"unknown argument {flag}; the nearest flag is {near[0]} (see --help)")
        return parsed

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _add_argument(parser: _Parser, field: dataclasses.Field, hint: Any, default: Any) -> None:
    inner = typing.get_args(hint)  # of T | None: (T, NoneType); of tuple[T, ...]: (T, ...)
    kind, many = inner[0] if inner else hint, ... in inner
    meta, flag = field.metadata, f"--{field.name}"
    shown = " ".join(map(str, default)) if many else default
    if kind is bool:
        shown = f"on; --no_{field.name} turns it off" if default else "off"
    help_text = f"{meta['help']} [{shown}]".replace("%", "%%")
    common = {"dest": field.name, "default": default, "help": help_text}
    if kind is bool:
        parser.add_argument(flag, action="store_true", **common)
        parser.add_argument(
            f"--no_{field.name}", action="store_false", **common | {"help": argparse.SUPPRESS}
        )
        return
    parser.add_argument(
        *([f"-{meta['short']}"] if meta["short"] else []),
        flag,
        type=_reader(kind, type(None) in inner),
        nargs="+" if many else None,
        choices=meta["choices"],
        metavar=None if meta["choices"] else kind.__name__.upper(),
        **common,
    )


def _reader(kind: type, optional: bool):
    def read(text: str):
        if optional and text.lower() == "none":
            return None
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError(text)
        return value

    read.__name__ = kind.__name__  # argparse prints it: "invalid int value: 'x'"
    return read


def _out_of_bounds(field: dataclasses.Field, value: Any, hint: Any) -> str | None:
    kinds = {
        "low": ("at least", operator.ge),
        "high": ("at most", operator.le),
        "above": ("above", operator.gt),
        "below": ("below", operator.lt),
    }
    or_none = ", or none" if type(None) in typing.get_args(hint) else ""
    for number in value if isinstance(value, tuple) else (value,):
        if number == "" != field.default:
            return f"--{field.name} is empty: leave it out, or give a value"
        if number is None or isinstance(number, str):
            continue
        for kind, (words, holds) in kinds.items():
            bound = field.metadata[kind]
            if bound is not None and not holds(number, bound):
                return f"--{field.name} is {number}, but must be {words} {bound}{or_none}"
    return None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors of reading what the user gave (files, flags, folders) into one line, status 1.

    Put it around set-up and short commands: an error inside a step of training is a bug, and keeps
    its traceback.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command continues") from None


def to_json(cfg: Any) -> dict[str, Any]:
    """Return the dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def lock_config(cfg: Any, run_dir: str | os.PathLike) -> None:
    """Save cfg as run_dir/config.json, or check that the run there was started with the same.

    A setting that the file does not name, because the run is older than it, had its default.
    Raises SystemExit with a line that names the fields that differ, ValueError for a file that
    holds no settings.
    """
    path = Path(run_dir) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    now = to_json(cfg)
    stored = read_json(path, "remove it or give another --run_dir") if path.exists() else now
    before = to_json(type(cfg)()) | stored
    changed = [
        f"--{field.name} was {before[field.name]!r}, is {now[field.name]!r}"
        for field in dataclasses.fields(cfg)
        if not field.metadata.get("may_change") and before[field.name] != now[field.name]
    ]
    if changed:
        raise SystemExit(
            f"{run_dir} holds a run with other settings ({'; '.join(changed)}): "
            "give another --run_dir, or the old values to continue it"
        )
    write_json(path, now)
