"""Build a math corpus from web pages: the iterative loop of Sec. 2.1.

    python build_corpus.py --preset cpu --run_dir runs/corpus
    python build_corpus.py --pages crawl.jsonl --seed_pages openwebmath.jsonl --url_rules my.tsv

Pages are the embedded web (installed documentation) or a crawl in JSONL
lines {"url", "text"}; without --preset the values are then the paper's. The run folder gets
corpus.jsonl, valid.jsonl (math pages of hosts the seed never saw, or else a share of the collected
ones), funnel.json, plots/, and what each round did under round-N/. Every step writes its file by
rename and is skipped when the file is there: the same command continues a killed run.
"""

import sys
from pathlib import Path

import numpy as np

from nanomath.base.config import lock_config, one_line_errors, parse
from nanomath.base.files import read_json, write_json
from nanomath.corpus import recall, report
from nanomath.corpus.collect import collect_pages
from nanomath.corpus.decontaminate import read_benchmark
from nanomath.corpus.domains import RULES_FILE, UrlRules
from nanomath.corpus.pages import PageCounts, read_crawl
from nanomath.corpus.settings import PRESETS, CorpusConfig
from nanomath.corpus.write import write_corpus


def main(cfg: CorpusConfig) -> None:
    run_dir = Path(cfg.run_dir)
    if (run_dir / "funnel.json").exists():
        lock_config(cfg, run_dir)
        print(f"{run_dir}: the corpus is finished; remove the folder to build it again")
        for row in read_json(run_dir / "funnel.json")["rounds"]:
            report.print_round(row)
        return
    # All that the flags name is read first: a wrong file must not show after hours of work.
    rules = UrlRules.load(cfg.url_rules or RULES_FILE)
    for name in cfg.benchmarks:
        read_benchmark(name)
    seed_pages = read_crawl(cfg.seed_pages, PageCounts()) if cfg.seed_pages else []
    extra_seed = [page.text for page in seed_pages]
    if not (run_dir / "pages.json").exists():  # nothing was built: a failed start binds nobody
        (run_dir / "config.json").unlink(missing_ok=True)
    lock_config(cfg, run_dir)

    # Pages: parsed or read, math capped, URL and near deduplication (Sec. 2.1, step 3).
    counts = collect_pages(cfg, rules, run_dir)
    web = recall.Web.load(run_dir / "pages.jsonl", rules)
    print(f"{len(web)} pages, {web.tokens_N.sum()} tokens, {int(web.math_N.sum())} of them math")

    # The seed (step 1), and the math hosts it never sees.
    seed_N, never_N = recall.choose_seed(web, cfg)
    if not seed_N.any() and not extra_seed:
        raise ValueError(
            f"no page of {web.path} is in the seed: give --seed_pages, or --url_rules with "
            "hosts of these pages"
        )

    # Rounds of train, score, rank, find domains, grow the seed (steps 2 to 5).
    collected_N = before_N = np.zeros(len(web), bool)
    rounds = []
    for number in range(1, len(cfg.budgets) + 1):
        folder = run_dir / f"round-{number}"
        collected_N, seed_N, row = recall.run_round(
            folder, web, cfg, number, seed_N, never_N, before_N, extra_seed
        )
        before_N = before_N | collected_N
        rounds.append(row)
        report.print_round(row)
        if row["stop"]:
            print(f"stop: {row['overlap']:.1%} of this round was collected before (Sec. 2.1)")
            break

    # Decontamination (step 6), then the corpus and its validation pages.
    funnel = {"pages": counts, "rounds": rounds}
    funnel |= write_corpus(cfg, web, collected_N, never_N, run_dir, number)
    report.plot_funnel(run_dir / "plots" / "funnel.png", funnel)
    write_json(run_dir / "funnel.json", funnel)
    report.print_corpus(run_dir, funnel)


def run(argv: list[str]) -> None:
    """Read the command line, hold the run folder, and turn errors into one line each."""
    from nanomath.run.guard import run_lock  # here, so that parsing processes do not load torch

    if not any(word.split("=")[0] in ("--preset", "--pages", "--help", "-h") for word in argv):
        # The defaults are the paper's, for a crawl: they would keep the whole embedded web.
        argv = ["--preset", "cpu", *argv]
    cfg = parse(CorpusConfig, PRESETS, argv, description=__doc__)
    with one_line_errors():
        Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
        with run_lock(cfg.run_dir):
            main(cfg)


if __name__ == "__main__":
    run(sys.argv[1:])
