"""What a speedrun achieved: its tables, three pictures and a page of samples, from its run folders.

    python -m nanomath.measure.report --run_dir runs/speedrun-cpu
    python -m nanomath.measure.report --run_dir runs/speedrun-cpu runs/speedrun-cpu-seed1

Reads what the stages left (funnel.json, metrics.jsonl, eval-*.json, figure7-*.json) and writes
report.md, samples.md and plots/; of several runs, which differ in their seeds, seeds.md and
plots/seeds.png in the first one's folder. Every figure comes from those files; none is kept here.

The control is the SFT model trained on, on the same solutions, for at least GRPO's minutes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanomath.base.config import one_line_errors, opt, parse
from nanomath.base.log import new_figure, printable, read_metrics, save_figure
from nanomath.measure.evaluation import check_same_problems, compare, draw_at_k, paired_difference

MODELS = ("base", "sft", "control", "grpo")
PHASES = ("sampling", "rewards", "logprobs", "update", "evaluation")  # of a step of GRPO
# What the stages, and the phases of the GRPO stage, spend their time on; others on none of these.
TIME_FOR = {
    "data": ("corpus", "tokenizer", "solutions"),
    "training": ("pretrain", "sft", "GRPO's logprobs", "GRPO's update"),
    "training the control": ("control",),
    "sampling": ("GRPO's sampling",),
    "evaluation": (
        *(f"evaluate {model}" for model in MODELS),
        *("figure 7 sft", "figure 7 grpo", "GRPO's evaluation"),
    ),
}
FIGURE7_KS = (1, 4, 8, 16, 32, 64)
NUM_SAMPLE_PROBLEMS = 6


@dataclass(frozen=True)
class ReportConfig:
    run_dir: tuple[str, ...] = opt(
        ("runs/speedrun-cpu",), "folder of a speedrun; several: runs of other seeds, compared"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a stage's result. Raises FileNotFoundError or ValueError with the fix."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: run the stages first (speedrun.sh)") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): remove it, run its stage again") from None


def stage_minutes(run: Path) -> dict[str, float]:
    """Return minutes of wall time by stage, all calls of speedrun.sh added up; not of table 1."""
    minutes: dict[str, float] = {}
    path = run / "seconds.tsv"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        name, _, seconds = line.partition("\t")
        if name.startswith("table 1"):
            continue
        minutes[name] = minutes.get(name, 0.0) + float(seconds) / 60
    return minutes


def interval(metric: dict[str, float]) -> str:
    """Write a share and its 95% interval in percent."""
    return f"{metric['value']:.1%} [{metric['low']:.1%}, {metric['high']:.1%}]"


def stage_rows(run: Path) -> list[list[str]]:
    """Return (stage, minutes, what it achieved) in the order of the run."""
    funnel = read_json(run / "corpus" / "funnel.json")
    last = funnel["rounds"][-1]
    minutes = stage_minutes(run)
    training = read_json(run / "tokenizer" / "training.json")
    base, sft, control, grpo = (read_metrics(run / name) for name in MODELS)
    achieved = {
        "corpus": (
            f"{last['pages']} of {funnel['pages']['kept']} pages recalled, precision "
            f"{last['precision']:.0%}, recall {last['recall']:.0%} "
            f"({last['recall_never_seeded']:.0%} on hosts never in the seed)"
        ),
        "tokenizer": f"{training['bytes_per_token']:.2f} bytes per token on held-out pages",
        "pretrain": (
            f"{base[-1]['valid_bits_per_byte']:.3f} bits per byte on held-out math pages, from "
            f"{first_value(base, 'valid_bits_per_byte'):.3f}"
        ),
        "sft": f"loss {sft[-1]['loss']:.3f} nats per solution token, from {sft[0]['loss']:.3f}",
        "control": f"SFT continued: loss {control[-1]['loss']:.3f}",
        "grpo": f"reward {mean_reward(grpo[-10:]):.2f}, from {mean_reward(grpo[:10]):.2f}",
    }
    return [
        [stage, f"{minutes[stage]:.1f}" if stage in minutes else "-", text]
        for stage, text in achieved.items()
    ]


def first_value(rows: list[dict], name: str) -> float:
    return next(row[name] for row in rows if name in row)


def mean_reward(rows: list[dict]) -> float:
    return sum(row["reward"] for row in rows) / len(rows)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Lay rows out as a Markdown table, columns aligned so that a terminal shows it too."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )


def accuracy_table(evals: dict[str, dict]) -> str:
    """Compare the models on the same held-out problems, with 95% intervals; "-": not sampled."""
    num_samples = evals["sft"]["num_samples"]
    labels = {"greedy": "pass@1 greedy", "pass@1": "pass@1 sampled"}
    rows = []
    for name in ("greedy", "pass@1", f"pass@{num_samples}", f"maj@{num_samples}"):
        metrics = [evals[model]["metrics"].get(name) for model in MODELS]
        shown = [interval(metric) if metric else "-" for metric in metrics]
        rows.append([labels.get(name, name), *shown])
    for label, key in (("format right", "format_failures"), ("truncated", "truncated")):
        shares = [evals[model]["greedy_outputs"][key] for model in MODELS]
        rows.append([label, *(f"{1 - s if 'format' in key else s:.1%}" for s in shares)])
    return markdown_table([f"{evals['sft']['num_problems']} held-out problems", *MODELS], rows)


def draw(run: Path) -> None:
    """Draw losses and the run of GRPO."""
    base, sft, _, grpo = (read_metrics(run / name) for name in MODELS)
    figure, axes = new_figure(3)
    line(axes[0], base, "loss", "pretraining loss (nats per token)")
    line(axes[1], base, "valid_bits_per_byte", "held-out math pages (bits per byte)")
    line(axes[2], sft, "loss", "SFT loss (nats per solution token)")
    save_figure(figure, run / "plots" / "losses.png")

    figure, axes = new_figure(3)
    line(axes[0], grpo, "reward", "GRPO: mean reward of a batch")
    line(axes[1], grpo, "heldout_pass@1", "GRPO: held-out accuracy, greedy")
    if read_json(run / "grpo" / "config.json")["kl_coef"]:
        line(axes[2], grpo, "kl", "GRPO: KL to the reference (nats per token)")
    else:  # without a reference its metric is 0, whatever the policy has become
        line(axes[2], grpo, "entropy", "GRPO: entropy (nats per token)")
    save_figure(figure, run / "plots" / "grpo.png")


def draw_seeds(runs: list[Path], path: Path) -> None:
    """Draw the GRPO stage of each run: held-out accuracy and reward against steps."""
    figure, axes = new_figure(2)
    for run in runs:
        rows = read_metrics(run / "grpo")
        line(axes[0], rows, "heldout_pass@1", "GRPO: held-out accuracy, greedy", run.name)
        line(axes[1], rows, "reward", "GRPO: mean reward of a batch", run.name)
    axes[0].legend()
    save_figure(figure, path)


def line(axis, rows: list[dict], name: str, title: str, label: str | None = None) -> None:
    points = [(row["step"] + 1, row[name]) for row in rows if name in row]
    axis.plot(*zip(*points, strict=True), linewidth=1.2, label=label)
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)


def sample_page(evals: dict[str, dict]) -> str:
    """Return the same held-out problems answered by each model, whole outputs with rewards."""
    parts = [
        "# Sample rollouts\n\nHeld-out problems: each model's greedy output and its rewards.\n"
    ]
    examples = [evals[model]["examples"][:NUM_SAMPLE_PROBLEMS] for model in MODELS]
    for answers in zip(*examples, strict=True):
        prompt = printable(answers[0]["prompt"]).strip()
        parts.append(f"## {', '.join(prompt.splitlines())}\n")
        for model, answer in zip(MODELS, answers, strict=True):
            rewards = f"format {answer['format']:d}, equation {answer['correct']:d}"
            text = printable(answer["text"]).replace("\n", "\n    ")
            parts.append(f"{model} (rewards: {rewards})\n\n    {text}\n")
    return "\n".join(parts)


def figure7_table(sft: dict, grpo: dict) -> str:
    """Compare Pass@K and Maj@K before and after RL, and their paired differences (Figure 7)."""
    gains = compare(sft, grpo)
    rows = []
    for k in FIGURE7_KS:
        row = [str(k)]
        for name in (f"pass@{k}", f"maj@{k}"):
            values = [f"{model['metrics'][name]['value']:.1%}" for model in (sft, grpo)]
            row += [*values, signed(gains[name])]
        rows.append(row)
    header = [f"K, {sft['num_problems']} held-out problems"]
    for kind in ("pass@K", "maj@K"):
        header += [f"{kind} sft", f"{kind} grpo", "GRPO - SFT"]
    return markdown_table(header, rows)


def grpo_seconds(run: Path) -> dict[str, float]:
    """Share out the seconds of the GRPO stage; what no step's clock covers comes last."""
    rows = read_metrics(run / "grpo")
    seconds = {phase: sum(row[f"seconds_{phase}"] for row in rows) for phase in PHASES}
    whole = 60 * stage_minutes(run).get("grpo", 0.0)
    return seconds | {"start and checkpoints": max(whole - sum(seconds.values()), 0.0)}


def time_tables(run: Path) -> str:
    """Show where the run's time went, by kind of work, and how the GRPO stage shared its own."""
    grpo = grpo_seconds(run)
    minutes = stage_minutes(run)
    minutes.pop("grpo", None)
    minutes |= {f"GRPO's {phase}": seconds / 60 for phase, seconds in grpo.items()}
    known = {name for names in TIME_FOR.values() for name in names}
    parts = {kind: [name for name in names if name in minutes] for kind, names in TIME_FOR.items()}
    parts["the rest"] = [name for name in minutes if name not in known]
    spent = {kind: sum(minutes[name] for name in names) for kind, names in parts.items()}
    notes = {kind: ", ".join(names) for kind, names in parts.items()}
    of_grpo = {phase: seconds / 60 for phase, seconds in grpo.items()}
    return (
        share_table("where the time goes", spent, notes)
        + "\n\n"
        + share_table("GRPO's time", of_grpo)
    )


def share_table(title: str, minutes: dict[str, float], notes: dict[str, str] | None = None) -> str:
    """Lay out minutes with their shares of the whole, which is the last row, and notes by name."""
    whole = sum(minutes.values())
    rows = [[name, f"{m:.1f}", f"{m / whole:.0%}"] for name, m in {**minutes, "all": whole}.items()]
    header = [title, "minutes", "share"]
    if notes:
        header, rows = [*header, "spent in"], [[*row, notes.get(row[0], "")] for row in rows]
    return markdown_table(header, rows)


def seeds_table(evals_of_runs: dict[str, dict[str, dict]]) -> str:
    """Compare the runs' greedy accuracies, GRPO with SFT and the control, paired by problem, and
    what SFT and GRPO reach at K samples.

    In the last row a problem counts by the share of runs that solve it: its intervals speak of
    other problems, the rows above it of other seeds. Raises ValueError for different problems.
    """
    right = {}  # run: {model: [problem]}
    at_k = []  # of each run, then their mean: accuracy of SFT, of GRPO
    name_at_k = f"pass@{next(iter(evals_of_runs.values()))['sft']['num_samples']}"
    for name, evals in evals_of_runs.items():
        first = next(iter(evals_of_runs.values()))["sft"]["problems"]
        check_same_problems(first, evals["sft"]["problems"])
        right[name] = {
            model: [float(problem["greedy_correct"]) for problem in evals[model]["problems"]]
            for model in MODELS
        }
        at_k.append([evals[model]["metrics"][name_at_k]["value"] for model in ("sft", "grpo")])
    means = {}
    for model in MODELS:
        columns = zip(*(values[model] for values in right.values()), strict=True)
        means[model] = [sum(column) / len(right) for column in columns]
    at_k.append([sum(column) / len(right) for column in zip(*at_k, strict=True)])
    rows = []
    all_rows = {**right, f"mean of {len(right)}": means}
    for (name, values), reached in zip(all_rows.items(), at_k, strict=True):
        greedy = [f"{sum(values[m]) / len(values[m]):.1%}" for m in MODELS[1:]]
        pairs = [paired_difference(values[other], values["grpo"]) for other in ("sft", "control")]
        rows.append([name, *greedy, *map(signed, pairs), *(f"{share:.1%}" for share in reached)])
    header = ["greedy", *MODELS[1:], "GRPO - SFT", "GRPO - control"]
    return markdown_table([*header, f"{name_at_k} sft", f"{name_at_k} grpo"], rows)


def signed(gain: dict[str, float]) -> str:
    """Write a difference and its 95% interval in points of percent."""
    return f"{gain['value']:+.1%} [{gain['low']:+.1%}, {gain['high']:+.1%}]"


def write_report(run: Path) -> tuple[str, dict[str, dict]]:
    """Write a run's page, samples and plots; return the page and its evaluations."""
    evals = {model: read_json(run / f"eval-{model}.json") for model in MODELS}
    gains = {other: compare(evals[other], evals["grpo"])["greedy"] for other in ("sft", "control")}
    lines = [f"GRPO over {name}, greedy, paired: {signed(gain)}" for name, gain in gains.items()]
    tables = [
        markdown_table(["stage", "minutes", "achieved"], stage_rows(run)),
        accuracy_table(evals),
    ]
    figure7 = {model: read_json(run / f"figure7-{model}.json") for model in ("sft", "grpo")}
    parts = [*tables, "\n".join(lines), figure7_table(**figure7), time_tables(run)]
    report = "\n\n".join(parts)
    (run / "report.md").write_text(report + "\n", encoding="utf-8")
    (run / "samples.md").write_text(sample_page(evals), encoding="utf-8")
    draw(run)
    draw_at_k(figure7, run / "plots" / "pass_and_maj_at_k.png")  # Figure 7
    return report, evals


def main() -> None:
    cfg = parse(ReportConfig, description=__doc__)
    runs = [Path(folder) for folder in cfg.run_dir]
    with one_line_errors():
        written = {str(run): write_report(run) for run in runs}
        if len(written) > 1:
            table = seeds_table({name: evals for name, (_, evals) in written.items()})
    if len(written) == 1:
        print(written[str(runs[0])][0])
        samples = runs[0] / "samples.md"
        print(f"\nPlots: {runs[0] / 'plots'}, {runs[0] / 'corpus' / 'plots'}; rollouts: {samples}")
        return
    draw_seeds(runs, runs[0] / "plots" / "seeds.png")
    (runs[0] / "seeds.md").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
