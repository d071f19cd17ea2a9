"""How figures are shown: tables that read in a terminal and in Markdown, intervals, curves."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nanomath.base.files import read_json
from nanomath.base.log import new_figure, read_metrics, save_figure


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Lay rows out as a Markdown table, columns aligned so that a terminal shows it too."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )


def interval(figure: dict[str, float], form: str = ".1%") -> str:
    """Write a figure and its 95% interval; a difference has the form "+.1%"."""
    value, low, high = (format(figure[key], form) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def draw_at_k(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw Pass@K and Maj@K of summaries, by label, against K with their intervals (Figure 7)."""
    figure, axes = new_figure(2)
    for axis, kind in zip(axes, ("pass", "maj"), strict=True):
        for label, result in results.items():
            metrics = result["metrics"]
            names = [name for name in metrics if name.startswith(f"{kind}@")]
            ks = [int(name.split("@")[1]) for name in names]
            axis.plot(ks, [metrics[n]["value"] for n in names], marker="o", label=label)
            low, high = ([metrics[n][end] for n in names] for end in ("low", "high"))
            axis.fill_between(ks, low, high, alpha=0.15)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, labels=map(str, ks))
        axis.set_xlabel("K")
        axis.set_title(f"{kind.capitalize()}@K, 95% intervals")
        axis.legend()
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def draw_curves(runs: Sequence[Path], panels: Sequence[tuple[str, str, str]], path: Path) -> None:
    """Draw a metric of a stage against its steps in each panel (stage, metric, title), a line for
    each run."""
    figure, axes = new_figure(len(panels))
    for axis, (stage, name, title) in zip(axes, panels, strict=True):
        for run in runs:
            rows = [row for row in read_metrics(run / stage) if name in row]
            steps = [row["step"] + 1 for row in rows]
            seed = read_json(run / stage / "config.json", "run the stage again")["seed"]
            axis.plot(
                steps, [row[name] for row in rows], linewidth=1.2, label=f"{run.name}, seed {seed}"
            )
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        axes[0].legend()
    save_figure(figure, path)
