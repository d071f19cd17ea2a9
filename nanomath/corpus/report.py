"""What the corpus stage shows: a line per round, the pages of the corpus, and the funnel plot."""

from pathlib import Path

from nanomath.base.log import new_figure, save_figure


def print_round(row: dict) -> None:
    """Print one round: pages, precision, recall of all, outside the seed, on hosts never in it."""
    print(
        f"round {row['round']}: seed {row['seed_pages']} pages, collected {row['pages']} pages, "
        f"{row['tokens'] / 1e6:.2f}M tokens, precision {_percent(row['precision'])}, "
        f"recall {_percent(row['recall'])}, {_percent(row['overlap'])} collected before"
    )
    print(
        f"    recall outside the seed {_percent(row['recall_outside_seed'])}, "
        f"on hosts never in it {_percent(row['recall_never_seeded'])}"
    )
    print(
        f"    {row['domains']} hosts over the domain threshold; "
        f"{row['joining']} uncollected pages join the seed",
        flush=True,
    )


def print_corpus(run_dir: Path, funnel: dict) -> None:
    """Print what decontamination dropped and what the corpus holds."""
    texts, total = funnel["benchmark_texts"], funnel["corpus"]
    print(
        f"decontamination: {funnel['contaminated']} pages dropped; benchmark texts matched by "
        f"10-grams {texts['long']}, whole {texts['short']}, "
        f"too short or bare numbers, not used {texts['unused']}"
    )
    print(
        f"{run_dir / 'corpus.jsonl'}: {total['pages']} pages, {total['tokens'] / 1e6:.2f}M tokens; "
        f"{funnel['validation']} validation pages of {funnel['validation_source']} beside it"
    )


def plot_funnel(path: Path, funnel: dict) -> None:
    """Draw how many pages are left after each step."""
    steps = funnel["pages"]
    left = steps["pages"]
    bars = [("read", left)]
    for name, label in [
        ("capped", "math capped"),
        ("same_url", "URLs deduplicated"),
        ("near_duplicates", "near-duplicates out"),
    ]:
        left -= steps[name]
        bars.append((label, left))
    bars += [(f"collected, round {row['round']}", row["pages"]) for row in funnel["rounds"]]
    bars.append(("corpus", funnel["corpus"]["pages"]))
    figure, (axis,) = new_figure(1)
    labels, values = zip(*reversed(bars))
    drawn = axis.barh(labels, values, color="tab:blue")
    axis.bar_label(drawn, fontsize=7)
    axis.set_xlabel("pages")
    axis.margins(x=0.15)
    axis.set_title("From pages to corpus")
    save_figure(figure, path)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
