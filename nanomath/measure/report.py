"""What a speedrun achieved: its tables, three pictures and a page of samples, from its run folders.

    python -m nanomath.measure.report --run_dir runs/speedrun-cpu
    python -m nanomath.measure.report --run_dir runs/speedrun-cpu runs/speedrun-cpu-seed1

Reads what the stages left (funnel.json, metrics.jsonl, eval-*.json, figure7-*.json) and writes
report.md, samples.md and plots/; of several runs, which differ in their seeds, seeds.md and
plots/seeds.png in the first one's folder. Every figure comes from those files; none is kept here.

The control is the SFT model trained on, on the same solutions, for at least GRPO's minutes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanomath.base import files
from nanomath.base.config import one_line_errors, opt, parse
from nanomath.base.files import write_text
from nanomath.base.log import printable, read_metrics
from nanomath.measure.evaluation import check_same_problems, compare, paired_difference
from nanomath.measure.figures import draw_at_k, draw_curves, interval, markdown_table

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
# Curves: of which stage, which metric, and its title. KL is in the trainer's own plots: without a
# reference it would read as a policy that has not moved.
LOSSES = (
    ("base", "loss", "pretraining loss (nats per token)"),
    ("base", "valid_bits_per_byte", "held-out math pages (bits per byte)"),
    ("sft", "loss", "SFT loss (nats per solution token)"),
)
GRPO = (
    ("grpo", "heldout_pass@1", "GRPO: held-out accuracy, greedy"),
    ("grpo", "reward", "GRPO: mean reward of a batch"),
    ("grpo", "entropy", "GRPO: entropy (nats per token)"),
)
FIGURE7_KS = (1, 4, 8, 16, 32, 64)
NUM_SAMPLE_PROBLEMS = 6


@dataclass(frozen=True)
class ReportConfig:
    run_dir: tuple[str, ...] = opt(
        ("runs/speedrun-cpu",), "folder of a speedrun; several: runs of other seeds, compared"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a stage's result. Raises FileNotFoundError or ValueError with the fix."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run the stages first (speedrun.sh)")
    return files.read_json(path, "remove it, run its stage again")


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
            row += [*values, interval(gains[name], "+.1%")]
        rows.append(row)
    header = [f"K, {sft['num_problems']} held-out problems"]
    for kind in ("pass@K", "maj@K"):
        header += [f"{kind} sft", f"{kind} grpo", "GRPO - SFT"]
    return markdown_table(header, rows)


def time_table(run: Path) -> str:
    """Show where the run's time went, by kind of work; the GRPO stage by its phases."""
    minutes = stage_minutes(run)
    steps = read_metrics(run / "grpo")
    phases = {f"GRPO's {p}": sum(row[f"seconds_{p}"] for row in steps) / 60 for p in PHASES}
    # What no step's clock covers.
    beyond = max(minutes.pop("grpo", 0.0) - sum(phases.values()), 0.0)
    minutes |= {**phases, "GRPO's start and checkpoints": beyond}
    kinds = {name: kind for kind, names in TIME_FOR.items() for name in names}
    whole = sum(minutes.values())
    rows = []
    for kind in (*TIME_FOR, "the rest"):
        parts = {name: m for name, m in minutes.items() if kinds.get(name, "the rest") == kind}
        spent = ", ".join(f"{name} {m:.1f}" for name, m in parts.items())
        rows.append([kind, sum(parts.values()), spent])
    rows.append(["all", whole, ""])
    return markdown_table(
        ["where the time goes", "minutes", "share", "spent in"],
        [[kind, f"{m:.1f}", f"{m / whole:.0%}", spent] for kind, m, spent in rows],
    )


def seeds_table(evals_of_runs: dict[str, dict[str, dict]]) -> str:
    """Compare the runs' greedy accuracies, GRPO with SFT and the control, paired by problem, and
    what SFT and GRPO reach at K samples.

    In the last row a problem counts by the share of runs that solve it: its intervals speak of
    other problems, the rows above it of other seeds. Raises ValueError for different problems.
    """
    runs = list(evals_of_runs.values())
    name_at_k = f"pass@{runs[0]['sft']['num_samples']}"
    right, at_k = [], []  # of each run: by model and problem; of SFT and of GRPO
    for evals in runs:
        check_same_problems(runs[0]["sft"]["problems"], evals["sft"]["problems"])
        problems = [evals[model]["problems"] for model in MODELS[1:]]
        right.append([[float(problem["greedy_correct"]) for problem in rows] for rows in problems])
        at_k.append([evals[model]["metrics"][name_at_k]["value"] for model in ("sft", "grpo")])
    rows = []
    names = [*evals_of_runs, f"mean of {len(runs)}"]
    right, at_k = (np.append(of, np.mean(of, 0, keepdims=True), axis=0) for of in (right, at_k))
    for name, (sft, control, grpo), reached in zip(names, right, at_k, strict=True):
        greedy = [f"{model.mean():.1%}" for model in (sft, control, grpo)]
        gains = [interval(paired_difference(other, grpo), "+.1%") for other in (sft, control)]
        rows.append([name, *greedy, *gains, *(f"{share:.1%}" for share in reached)])
    header = ["greedy", *MODELS[1:], "GRPO - SFT", "GRPO - control"]
    return markdown_table([*header, f"{name_at_k} sft", f"{name_at_k} grpo"], rows)


def write_report(run: Path) -> tuple[str, dict[str, dict]]:
    """Write a run's page, samples and plots; return the page and its evaluations."""
    evals = {model: read_json(run / f"eval-{model}.json") for model in MODELS}
    figure7 = {model: read_json(run / f"figure7-{model}.json") for model in ("sft", "grpo")}
    gains = {other: compare(evals[other], evals["grpo"])["greedy"] for other in ("sft", "control")}
    lines = [
        f"GRPO over {name}, greedy, paired: {interval(gain, '+.1%')}"
        for name, gain in gains.items()
    ]
    stages = markdown_table(["stage", "minutes", "achieved"], stage_rows(run))
    parts = [stages, accuracy_table(evals), "\n".join(lines), figure7_table(**figure7)]
    report = "\n\n".join([*parts, time_table(run)])
    write_text(run / "report.md", report + "\n")
    write_text(run / "samples.md", sample_page(evals))
    draw_curves([run], LOSSES, run / "plots" / "losses.png")
    draw_curves([run], GRPO, run / "plots" / "grpo.png")
    draw_at_k(figure7, run / "plots" / "pass_and_maj_at_k.png")  # Figure 7
    return report, evals


def main() -> None:
    cfg = parse(ReportConfig, description=__doc__)
    runs = [Path(folder) for folder in cfg.run_dir]
    first = runs[0]
    with one_line_errors():
        reports = {str(run): write_report(run) for run in runs}
        if len(reports) == 1:
            print(reports[str(first)][0])
            print(f"\nPlots: {first}/plots, {first}/corpus/plots; rollouts: {first}/samples.md")
            return
        table = seeds_table({name: evals for name, (_, evals) in reports.items()})
        draw_curves(runs, GRPO, first / "plots" / "seeds.png")
        write_text(first / "seeds.md", table + "\n")
        print(table)


if __name__ == "__main__":
    main()
