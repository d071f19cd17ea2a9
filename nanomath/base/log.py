"""What a run leaves behind: metrics.jsonl, event files, samples.txt, progress bars, plots.

Everything is keyed by step, so a resumed run first drops what the interrupted one wrote after its
last checkpoint: the files of a run do not show where it was cut. Lines that a full disk refuses
wait in memory; a checkpoint is only made once they are on the disk.
"""

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanomath.base.files import open_atomically, write_text


def progress(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """Return a tqdm bar on stderr; in a file or pipe it prints at most every ten seconds."""
    interactive = sys.stderr.isatty()
    mininterval = 0.2 if interactive else 10.0
    return tqdm(iterable, dynamic_ncols=interactive, mininterval=mininterval, **options)


def printable(text: str) -> str:
    """Escape control characters: text written by a model must not drive a terminal."""
    return re.sub(
        r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]",
        lambda match: f"\\x{ord(match.group()):02x}",
        text,
    )


class RunLog:
    """Metrics and samples of one run folder, for the first rank alone.

    start_step is the first step that will be logged: what the files hold from there on is dropped.
    tensorboard: write its event files, if it is installed.
    """

    def __init__(self, run_dir: str | os.PathLike, *, start_step: int, tensorboard: bool = True):
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._rewind(start_step)
        self._metrics = _Lines(self.run_dir / "metrics.jsonl")
        self._samples = _Lines(self.run_dir / "samples.txt")
        self._events = None
        if tensorboard:
            # Without it metrics.jsonl still holds the same numbers.
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self._events = SummaryWriter(str(self.run_dir / "events"), purge_step=start_step)

    def _rewind(self, start_step: int) -> None:
        """Drop the lines of steps that will be run again."""
        metrics = self.run_dir / "metrics.jsonl"
        kept = [row for row in read_metrics(self.run_dir) if row["step"] < start_step]
        write_text(metrics, "".join(map(_json_line, kept)))
        samples = self.run_dir / "samples.txt"
        text = samples.read_text(encoding="utf-8", errors="replace") if samples.exists() else ""
        whole = re.finditer(r"(?m)^=== step (\d+)\n(?:  .*\n)*\n", text)  # not one that a kill cut
        write_text(samples, "".join(m.group() for m in whole if int(m.group(1)) < start_step))

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row under this step, null for what is not finite (JSON has no word for it);
        TensorBoard gets those values that are numbers."""
        self._metrics.add(_json_line({"step": step, **values}))
        if self._events is None:
            return
        try:
            for name, value in values.items():
                if not isinstance(value, list):
                    self._events.add_scalar(name, value, step)
        except OSError as error:  # metrics.jsonl holds the same numbers
            _warn(f"no more TensorBoard events: {error}")
            self._events = None

    def samples(self, step: int, lines: Sequence[str]) -> None:
        """Append whole samples as text, control characters escaped."""
        # Indented, so that no text of a model can look like the heading of a step.
        body = "\n".join("  " + printable(line).replace("\n", "\n  ") for line in lines)
        self._samples.add(f"=== step {step}\n{body}\n\n")

    def sync(self) -> None:
        """Wait until all lines are on the disk. Raises OSError, with the lines kept, if not."""
        self._metrics.sync()
        self._samples.sync()

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()
        if self._events is not None:
            self._events.close()


class _Lines:
    """A growing text file; what the disk refuses is written with the next line it takes."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "ab", buffering=0)
        self._waiting = b""

    def add(self, text: str) -> None:
        is_first = not self._waiting
        self._waiting += text.encode()
        try:
            self._write()
        except OSError as error:
            if is_first:
                _warn(f"{error}; its lines wait in memory")

    def sync(self) -> None:
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._write()
        self._file.close()

    def _write(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def _warn(message: str) -> None:
    print(f"nanomath: warning: {message}", file=sys.stderr, flush=True)


def _json_line(row: Mapping[str, Any]) -> str:
    bad = {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps({**row, **bad}, allow_nan=False) + "\n"


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl; a last line cut by a kill is left out.

    What was not finite when it was logged is NaN here, for it stays a number to count with.
    """
    path = Path(run_dir) / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            unknown = {k: math.nan for k, value in row.items() if value is None}
            rows.append({**row, **unknown})
    return rows


def plot_metrics(
    run_dir: str | os.PathLike, panels: Sequence[tuple[str, Sequence[str]]], name: str = "metrics"
) -> Path | None:
    """Draw run_dir/plots/NAME.png: one panel per (title, metric names) that has data.

    A name may hold `*`: all metrics like it. A disk that refuses the picture costs a warning.
    """
    rows = read_metrics(run_dir)
    logged = {k: 0 for row in rows for k, value in row.items() if isinstance(value, int | float)}
    panels = [
        (title, [m for m in logged if any(fnmatch(m, name) for name in names)])
        for title, names in panels
    ]
    panels = [(title, metrics) for title, metrics in panels if metrics]
    if not panels:
        return None
    figure, axes = new_figure(len(panels))
    for axis, (title, metrics) in zip(axes, panels, strict=True):
        for metric in metrics:
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            axis.plot(*zip(*points, strict=True), label=metric, linewidth=1.2)
        axis.set_title(title, y=1.0)  # y given, matplotlib need not look for room
        axis.set_xlabel("step")
        if len(metrics) > 1:
            axis.legend(fontsize=7, loc="upper left")
        axis.grid(alpha=0.3)
    try:
        return save_figure(figure, Path(run_dir) / "plots" / f"{name}.png")
    except OSError as error:
        _warn(f"no plot: {error}")
        return None


def new_figure(num_panels: int):
    """Return (figure, list of axes) in rows of up to three panels, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(num_panels, 3)
    rows = -(-num_panels // columns)
    width, height = 5.0 * columns, 3.4 * rows
    figure = Figure(figsize=(width, height))
    # Margins in inches by hand: a solver for them doubles the time, and runs draw as they go.
    figure.subplots_adjust(
        0.6 / width, 0.5 / height, 1 - 0.2 / width, 1 - 0.4 / height, wspace=0.2, hspace=0.35
    )
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(num_panels)]
    return figure, axes


def save_figure(figure, path: Path) -> Path:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomically(path, "wb") as file:
        figure.savefig(file, dpi=110, format="png", pil_kwargs={"compress_level": 3})
    return path
