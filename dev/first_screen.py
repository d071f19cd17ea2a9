"""Write docs/results.md and README's table from finished runs, one per seed.

    for seed in 0 1 2; do bash speedrun.sh --preset cpu --seed $seed; done
    bash speedrun.sh --preset cpu --table1
    python dev/first_screen.py --machine "two cores of an AMD EPYC" --run_dir runs/speedrun-cpu \\
        runs/speedrun-cpu-seed1 runs/speedrun-cpu-seed2

Replaces the lines of both pages between the two marks, and copies what they link to into
dev/speedrun-cpu/. Every figure is read from the runs' files; a second call changes nothing.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from nanomath.base.config import one_line_errors, opt, parse
from nanomath.base.files import write_text
from nanomath.base.log import printable
from nanomath.measure import report
from nanomath.measure.figures import draw_curves, markdown_table

ROOT = Path(__file__).resolve().parent.parent
SHOWN = "dev/speedrun-cpu"
MARKS = ("<!-- dev/first_screen.py writes from here -->\n", "<!-- to here -->\n")
COPIED = (
    *("report.md", "samples.md", "table1.md"),
    *(f"plots/{name}.png" for name in ("grpo", "losses", "pass_and_maj_at_k", "seeds")),
)


@dataclass(frozen=True)
class ScreenConfig:
    run_dir: tuple[str, ...] = opt(
        ("runs/speedrun-cpu",), "folders of finished speedruns of one preset, one per seed"
    )
    machine: str = opt("an unnamed machine", "what they ran on, named in the text")


def first_screen(runs: list[Path], machine: str) -> str:
    """Return the section: the seeds' table and curves, the first run's figures, a rollout."""
    configs = [report.read_json(run / "grpo" / "config.json") for run in runs]
    seeds = [cfg["seed"] for cfg in configs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--run_dir: runs of different seeds are compared, these have {seeds}")
    evals = {f"seed {seed}": report.write_report(run)[1] for seed, run in zip(seeds, runs)}
    first, models = runs[0], evals[f"seed {seeds[0]}"]
    draw_curves(runs, report.GRPO, first / "plots" / "seeds.png")
    minutes = [report.stage_minutes(run) for run in runs]
    whole = span([sum(each.values()) for each in minutes])
    grpo, control = (span([each[name] for each in minutes]) for name in ("grpo", "control"))
    parts = [
        f"`speedrun.sh`, runs that differ in their seeds ({len(runs)}), on {machine}: {whole} "
        f"minutes each after set-up, {grpo} of them GRPO and {control} its control, which is SFT "
        "continued.",
        report.seeds_table(evals),
        how_to_read(models["sft"], configs[0]["num_eval_problems"]),
        f"![Held-out accuracy and reward during GRPO](../{SHOWN}/seeds.png)",
        f"Seed {seeds[0]} ([whole report](../{SHOWN}/report.md), "
        f"[rollouts](../{SHOWN}/samples.md), [losses](../{SHOWN}/losses.png), "
        f"[GRPO's curves](../{SHOWN}/grpo.png)):",
        report.accuracy_table(models),
        f"![Pass@K and Maj@K before and after GRPO](../{SHOWN}/pass_and_maj_at_k.png)",
        rollout(models),
        report.time_table(first),
    ]
    if (first / "table1.md").exists():
        table, notes = (first / "table1.md").read_text(encoding="utf-8").split("\n\n")
        parts += [
            f"Table 1 at small scale (`speedrun.sh --table1`, seed {seeds[0]}):\n\n{table}",
            notes,
        ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def four_rows(section: str) -> str:
    """Return README's table: a row for each model, the figures those of a section's own tables."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines()]
    header = next(row for row in rows if row[:1] == ["greedy"])
    mean = next(row for row in rows if row and row[0].startswith("mean of "))
    base = next(row[1] for row in rows if row[:1] == ["pass@1 greedy"]).split(" ")[0]
    seed = next(row[0] for row in rows if row and row[0].startswith("seed "))
    _, sft, control, grpo, over_sft, over_control, sft_at_k, grpo_at_k = mean
    at_k = header[-1].removesuffix(" grpo")
    return markdown_table(
        [f"greedy, {mean[0]} seeds", "solved", "GRPO's gain over it", at_k],
        [
            [f"base ({seed})", base, "", ""],
            ["SFT", sft, over_sft, sft_at_k],
            ["control: SFT continued", control, over_control, ""],
            ["GRPO", grpo, "", grpo_at_k],
        ],
    )


def how_to_read(evaluation: dict, num_eval_problems: int) -> str:
    """Explain the names and brackets of the tables, and which problems the curves are of."""
    k, temperature = evaluation["num_samples"], evaluation["settings"]["temperature"]
    return (
        "In brackets: 95% intervals over problems. Greedy: the likeliest output; sampled: at "
        f"temperature {temperature}; pass@{k}: any of {k} samples is right; maj@{k}: their most "
        f"frequent answer is. The curves' accuracy is greedy, on the first {num_eval_problems} "
        "problems."
    )


def span(minutes: list[float]) -> str:
    return " to ".join(dict.fromkeys(f"{m:.1f}" for m in (min(minutes), max(minutes))))


def rollout(evals: dict[str, dict]) -> str:
    """Return the first problem shown that the SFT model gets wrong and GRPO's right, with both
    greedy outputs, or nothing where there is none."""
    for before, after in zip(evals["sft"]["examples"], evals["grpo"]["examples"], strict=True):
        if after["correct"] and not before["correct"]:
            answers = (("", before["prompt"]), ("SFT:", before["text"]), ("GRPO:", after["text"]))
            text = "\n".join(f"{title}\n{printable(text).strip()}\n" for title, text in answers)
            block = "\n".join(f"    {line}".rstrip() for line in text.strip().splitlines())
            return f"The first held-out problem that SFT gets wrong and GRPO right:\n\n{block}"
    return ""


def replaced(page: str, section: str) -> str:
    """Return page with section between the marks. Raises ValueError where a mark is not once."""
    begin, end = MARKS
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"a page needs each of the lines {begin.strip()} and {end.strip()} once")
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}{section}{end}{after}"


def main() -> None:
    cfg = parse(ScreenConfig, description=__doc__)
    with one_line_errors():
        runs = [Path(folder) for folder in cfg.run_dir]
        section = first_screen(runs, cfg.machine)
        sections = {"docs/results.md": section, "README.md": four_rows(section).strip() + "\n"}
        pages = {
            ROOT / name: replaced((ROOT / name).read_text(encoding="utf-8"), text)
            for name, text in sections.items()
        }
        for name in COPIED:
            if (runs[0] / name).exists():
                shutil.copyfile(runs[0] / name, ROOT / SHOWN / Path(name).name)
        for path, text in pages.items():
            write_text(path, text)
    print(f"{', '.join(sections)} and {SHOWN}: see git diff")


if __name__ == "__main__":
    main()
