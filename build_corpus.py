"""Build a math corpus from web pages: the iterative loop of Sec. 2.1.

    python build_corpus.py --preset cpu --run_dir runs/corpus
    python build_corpus.py --pages crawl.jsonl --seed_pages openwebmath.jsonl --url_rules my.tsv

Pages are the embedded web (installed documentation and generated arithmetic) or a crawl in JSONL
lines {"url", "text"}; without --preset the values are then the paper's. The run folder gets
corpus.jsonl, valid.jsonl (math pages of hosts the seed never saw, or else a share of the collected
ones), funnel.json, plots/, and what each round did under round-N/. Every step writes its file by
rename and is skipped when the file is there: the same command continues a killed run.
"""

import json
import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nanomath.base.config import lock_config, one_line_errors, opt, parse, write_json
from nanomath.base.log import progress
from nanomath.corpus import decontaminate, dedup, generated, recall, report
from nanomath.corpus.classifier import ClassifierSettings
from nanomath.corpus.domains import RULES_FILE, UrlRules
from nanomath.corpus.pages import (
    MAX_CRAWL_CHARACTERS,
    PACKAGES,
    Page,
    PageCounts,
    find_package,
    parse_file,
    read_jsonl,
    source_files,
    write_atomically,
)
from nanomath.corpus.text import canonical, num_tokens
from nanomath.tasks import countdown


@dataclass(frozen=True)
class CorpusConfig:
    """The paper's values where it states them; --preset cpu fits the embedded web."""

    run_dir: str = opt("runs/corpus", "folder of this run", may_change=True)
    pages: str | None = opt(None, "JSONL crawl (url, text) instead of the embedded web")
    seed_pages: str | None = opt(None, "JSONL math pages (url, text) that join the first seed")
    url_rules: str | None = opt(
        None, "which URLs are math: host, path prefix, + or -; none: nanomath/corpus/url_rules.tsv"
    )
    benchmarks: tuple[str, ...] = opt((), "JSONL files whose text must not be in the corpus")
    num_heldout: int = opt(1000, "held-out Countdown problems kept out of the corpus", low=0)
    heldout_seed: int = opt(0, "seed of those problems", low=0)
    num_numbers: tuple[int, ...] = opt((3, 4), "numbers of those problems", low=2, high=5)
    max_number: int = opt(99, "their largest given number", low=1)
    max_target: int = opt(100, "their largest target", low=1)
    seed: int = opt(0, "seed of every draw", low=0)
    num_workers: int = opt(2, "processes that parse files", low=1, may_change=True)
    packages: tuple[str, ...] = opt(PACKAGES, "packages whose documentation is the web")
    num_generated: int = opt(400, "pages of generated hosts", low=0)
    math_share: float = opt(0.1, "math pages are at most this share of real pages", low=0, high=1)
    min_similarity: float = opt(0.8, "MinHash similarity of a near-duplicate", low=0.0, high=1.0)
    never_hosts: float = opt(0.2, "share of math hosts never in the seed", low=0.0, high=1.0)
    seed_hosts: float = opt(0.5, "share of math hosts the first seed comes from", low=0, high=1)
    seed_share: float = opt(0.5, "share of their math pages in the first seed", low=0, high=1)
    num_positives: int = opt(500_000, "math pages trained on per round, Sec. 2.1", low=1)
    num_negatives: int = opt(500_000, "other pages trained on per round, Sec. 2.1", low=1)
    budgets: tuple[int, ...] = opt(
        (40_000_000_000, 80_000_000_000, 120_000_000_000, 120_000_000_000),
        "tokens kept in round 1, 2, ... (words, CJK characters one by one), Sec. 2.1",
        low=1,
    )
    min_domain_share: float = opt(0.1, "a host above this is math-related, Sec. 2.1", low=0, high=1)
    stop_overlap: float = opt(
        0.98, "stop when this share of a round was collected before, Sec. 2.1", low=0.0, high=1.0
    )
    dim: int = opt(ClassifierSettings.dim, "fastText vector width, Sec. 2.1", low=1)
    lr: float = opt(ClassifierSettings.lr, "fastText learning rate, Sec. 2.1", low=0.0)
    word_ngrams: int = opt(ClassifierSettings.word_ngrams, "fastText n-grams, Sec. 2.1", low=1)
    min_count: int = opt(ClassifierSettings.min_count, "fastText minCount, Sec. 2.1", low=1)
    epochs: int = opt(ClassifierSettings.epochs, "fastText epochs, Sec. 2.1", low=1)
    buckets: int = opt(ClassifierSettings.buckets, "fastText hash buckets (its default)", low=1)
    valid_pages: int = opt(200, "math pages kept for validation, at most", low=0)


# DEVIATION: on a few thousand pages the paper's fastText values leave all scores near 0.5, so small
# runs raise the learning rate and shrink the table (Sec. 2.1: lr 0.1, dim 256).
_SMALL = {
    "dim": 64,
    "lr": 1.0,
    "buckets": 200_000,
    "num_positives": 2000,
    "num_negatives": 1500,
}
PRESETS = {
    "smoke": _SMALL
    | {
        "packages": ("mpmath", "networkx", "numpy", "setuptools", "fsspec", "werkzeug", "markdown"),
        # A generated page is thirty times as long as a real one: more of them fill the budget.
        "num_generated": 27,
        "num_heldout": 50,
        "budgets": (185_000, 225_000),
        "valid_pages": 20,
    }
    | countdown.RANGES["smoke"],
    "cpu": _SMALL | {"budgets": (1_600_000, 2_400_000)} | countdown.RANGES["cpu"],
    "gpu": _SMALL
    | {"num_generated": 4000, "budgets": (16_000_000, 24_000_000), "num_workers": 8}
    | countdown.RANGES["gpu"],
}


def main(cfg: CorpusConfig) -> None:
    run_dir = Path(cfg.run_dir)
    if (run_dir / "funnel.json").exists():
        lock_config(cfg, run_dir)
        print(f"{run_dir}: the corpus is finished; remove the folder to build it again")
        report.print_rounds(json.loads((run_dir / "funnel.json").read_text(encoding="utf-8")))
        return
    check_inputs(cfg)
    rules = UrlRules.load(cfg.url_rules or RULES_FILE)
    if not (run_dir / "raw.json").exists():  # nothing was built: a failed start binds nobody
        (run_dir / "config.json").unlink(missing_ok=True)
    lock_config(cfg, run_dir)

    # Pages: parsed or read, math capped, URL and near deduplication (Sec. 2.1, step 3).
    counts = collect_pages(cfg, rules, run_dir)
    web = recall.Web.load(run_dir / "pages.jsonl", rules)
    print(f"{len(web)} pages, {web.tokens_N.sum()} tokens, {int(web.math_N.sum())} of them math")

    # The seed (step 1), and the math hosts it never sees.
    seed_N, never_N = recall.choose_seed(
        web, cfg.seed, cfg.seed_hosts, cfg.seed_share, cfg.never_hosts
    )
    extra_seed = []
    if cfg.seed_pages:
        seed_counts = PageCounts()
        extra_seed = [page.text for page in read_jsonl(cfg.seed_pages, seed_counts)]
        print(
            f"{len(extra_seed)} seed pages; {seed_counts.bad_lines} bad lines skipped, "
            f"{seed_counts.cut_pages} long pages cut"
        )
    if not seed_N.any() and not extra_seed:
        raise ValueError(
            f"no page of {web.path} is in the seed: give --seed_pages, or --url_rules with "
            "hosts of these pages"
        )

    # Rounds of train, score, rank, find domains, grow the seed (steps 2 to 5).
    settings = loop_settings(cfg)
    collected_N = before_N = np.zeros(len(web), bool)
    rounds = []
    for number in range(1, len(cfg.budgets) + 1):
        collected_N, seed_N, row = recall.run_round(
            *(run_dir / f"round-{number}", web, seed_N, never_N, before_N),
            *(extra_seed, rules, number, settings, progress),
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
    report.plot_all(run_dir, web, funnel)
    write_json(run_dir / "funnel.json", funnel)
    report.print_corpus(run_dir, funnel)


def loop_settings(cfg: CorpusConfig) -> recall.LoopSettings:
    return recall.LoopSettings(
        cfg.seed,
        cfg.num_positives,
        cfg.num_negatives,
        cfg.budgets,
        cfg.min_domain_share,
        cfg.stop_overlap,
        ClassifierSettings(
            cfg.dim, cfg.lr, cfg.word_ngrams, cfg.min_count, cfg.epochs, cfg.buckets, cfg.seed
        ),
    )


def check_inputs(cfg: CorpusConfig) -> None:
    """Raise FileNotFoundError or ValueError for a file that is missing or empty, by its flag."""
    files = [("pages", cfg.pages), ("seed_pages", cfg.seed_pages), ("url_rules", cfg.url_rules)]
    for flag, name in files + [("benchmarks", name) for name in cfg.benchmarks]:
        if name is None:
            continue
        if not Path(name).is_file():
            raise FileNotFoundError(f"--{flag} {name}: no such file")
        if not Path(name).stat().st_size:
            raise ValueError(f"--{flag} {name}: the file is empty")


def collect_pages(cfg: CorpusConfig, rules: UrlRules, run_dir: Path) -> dict:
    """Write pages.jsonl, the deduplicated web, and return what was counted on the way."""
    done = run_dir / "pages.json"
    raw = run_dir / "raw.jsonl"
    if done.exists():
        raw.unlink(missing_ok=True)  # a kill may have come before the line that removes it
        return json.loads(done.read_text(encoding="utf-8"))
    counts = PageCounts()
    if not raw.exists() or not (run_dir / "raw.json").exists():
        source = read_jsonl(cfg.pages, counts) if cfg.pages else embedded_web(cfg, counts)
        with write_atomically(raw) as file:
            for page in source:
                file.write(page.to_json() + "\n")
        write_json(run_dir / "raw.json", asdict(counts))
    steps = json.loads((run_dir / "raw.json").read_text(encoding="utf-8"))
    for example in steps["bad_line_examples"]:
        print(f"skipped: {example}")
    if steps["cut_pages"]:
        print(f"{steps['cut_pages']} pages cut to {MAX_CRAWL_CHARACTERS} characters")
    steps |= {"capped": 0, "same_url": 0, "near_duplicates": 0, "kept": 0, "tokens": 0}
    limit = None if cfg.pages else math_limit(raw, rules, cfg)
    with write_atomically(run_dir / "pages.jsonl") as file:
        for page in unique_pages(raw, rules, limit, cfg, steps):
            page["tokens"] = num_tokens(page["text"])
            steps["kept"] += 1
            steps["tokens"] += page["tokens"]
            file.write(json.dumps(page, ensure_ascii=False) + "\n")
    write_json(done, steps)
    raw.unlink()
    return steps


def embedded_web(cfg: CorpusConfig, counts: PageCounts) -> Iterator[Page]:
    """Yield the pages of the packages found, parsed by a pool, then the generated ones."""
    tasks = []
    for name in cfg.packages:
        root = find_package(name)
        if root is None:
            counts.missing_packages.append(name)
            continue
        tasks += [(name, root, path) for path in source_files(root)]
    if counts.missing_packages:
        print(f"not installed, left out: {', '.join(counts.missing_packages)}")
    with multiprocessing.get_context("spawn").Pool(cfg.num_workers) as pool:
        found = pool.imap(parse_file, tasks, chunksize=16)
        for got, too_short, readable in progress(
            found, total=len(tasks), desc="parsing documentation", unit="file"
        ):
            counts.files += 1
            counts.unreadable_files += not readable
            counts.too_short += too_short
            counts.pages += len(got)
            yield from got
    for page in generated.generated_pages(cfg.num_generated, cfg.seed):
        counts.pages += 1
        yield page


def _rows(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def math_limit(raw: Path, rules: UrlRules, cfg: CorpusConfig) -> float:
    """Return the hash below which a real math page is kept, so that math is as rare as asked."""
    places, num_other = [], 0
    for page in _rows(raw):
        if page["kind"] == "real":
            if rules.is_math(page["url"]):
                places.append(recall.unit_hash(page["url"], cfg.seed, "cap"))
            else:
                num_other += 1
    if cfg.math_share >= 1:
        return 1.0
    num_kept = int(num_other * cfg.math_share / (1 - cfg.math_share))
    return sorted(places)[num_kept] if num_kept < len(places) else 1.0


def unique_pages(
    raw: Path, rules: UrlRules, limit: float | None, cfg: CorpusConfig, steps: dict
) -> Iterator[dict]:
    """Yield the pages under the math cap that repeat no earlier one; count the others in steps."""
    urls: set[str] = set()
    near = dedup.NearDuplicates(cfg.min_similarity)
    for number, page in enumerate(
        progress(_rows(raw), total=steps["pages"], desc="deduplicating", unit="page")
    ):
        capped = limit is not None and page["kind"] == "real" and rules.is_math(page["url"])
        if capped and recall.unit_hash(page["url"], cfg.seed, "cap") >= limit:
            steps["capped"] += 1
            continue
        key = dedup.url_key(page["url"])
        if key in urls:
            steps["same_url"] += 1
            continue
        urls.add(key)
        if near.add(number, dedup.minhash(canonical(page["text"]))) is not None:
            steps["near_duplicates"] += 1
            continue
        yield page


def benchmark_texts(cfg: CorpusConfig) -> list[decontaminate.BenchmarkText]:
    """Return the texts of --benchmarks and of held-out Countdown problems.

    A problem is looked for as data sets write it: its numbers and its target, each after its word.
    Its short prompt and its equations are not: they are at most 6 numbers once the arrow and
    operators are dropped, and 1 2 3 4 is `1 * 2 + 3 = 4`, a list that counts, a shape. One such
    equation took half of all pages dropped in the cpu preset. Nor is the long prompt: the 10-grams
    of its instructions are those of every other problem, the ones to train on among them.
    """
    texts = [text for name in cfg.benchmarks for text in decontaminate.read_benchmark(name)]
    if not cfg.num_heldout:
        return texts
    problems = countdown.generate(
        cfg.num_heldout,
        split="heldout",
        seed=cfg.heldout_seed,
        num_numbers=cfg.num_numbers,
        max_number=cfg.max_number,
        max_target=cfg.max_target,
    )
    for problem in problems:
        row = json.dumps(problem.payload)
        texts.append(decontaminate.BenchmarkText(f"countdown:{problem.id}:row", row))
    return texts


def choose_validation(
    web: recall.Web, collected_N: np.ndarray, never_N: np.ndarray, cfg: CorpusConfig
) -> tuple[list[int], str]:
    """Return the pages kept out of the corpus for validation, and where they are from.

    Math pages of never-seeded hosts, at most half of them: the others still say how much of new
    hosts is recalled. Where there are none (--never_hosts 0, or a crawl whose hosts no rule
    knows), a tenth of the collected pages, real ones first.
    """
    place = lambda i: recall.unit_hash(web.urls[i], cfg.seed, "valid")
    held = sorted(np.flatnonzero(never_N & ~web.generated_N), key=place)
    if len(held) >= 2:
        return held[: min(cfg.valid_pages, len(held) // 2)], "never-seeded hosts"
    held = sorted(np.flatnonzero(collected_N), key=lambda i: (web.generated_N[i], place(i)))
    return held[: min(cfg.valid_pages, -(-len(held) // 10))], "collected pages"


def write_corpus(
    cfg: CorpusConfig,
    web: recall.Web,
    collected_N: np.ndarray,
    never_N: np.ndarray,
    run_dir: Path,
    last_round: int,
) -> dict:
    """Write corpus.jsonl, valid.jsonl and contaminated.jsonl; return their counts."""
    scores_N = np.load(run_dir / f"round-{last_round}" / "scores.npy")
    held, source = choose_validation(web, collected_N, never_N, cfg)
    with write_atomically(run_dir / "valid.jsonl") as file:
        _write_pages(file, web.pages(held), scores_N[held])

    chosen_N = collected_N.copy()
    chosen_N[held] = False
    order = np.random.default_rng(cfg.seed).permutation(np.flatnonzero(chosen_N))
    index = decontaminate.Decontaminator(benchmark_texts(cfg))
    totals = {kind: {"pages": 0, "tokens": 0} for kind in ("real", "generated")}
    bar = progress(web.pages(order), total=len(order), desc="decontaminating", unit="page")
    num_dropped = {"real": 0, "generated": 0}
    with (
        write_atomically(run_dir / "corpus.jsonl") as corpus,
        write_atomically(run_dir / "contaminated.jsonl") as dropped,
    ):
        for page, score in zip(bar, scores_N[order]):
            if matched := index.matches(page["text"]):
                num_dropped[page["kind"]] += 1
                dropped.write(json.dumps({"url": page["url"], "matches": matched}) + "\n")
                continue
            totals[page["kind"]]["pages"] += 1
            totals[page["kind"]]["tokens"] += page["tokens"]
            _write_pages(corpus, [page], [score])
    return {
        "collected": int(collected_N.sum()),
        "validation": len(held),
        "validation_source": source,
        "contaminated": num_dropped,
        "benchmark_texts": index.summary(),
        "benchmark_hits": dict(sorted(index.hits.items(), key=lambda x: (-x[1], x[0]))[:100]),
        "corpus": totals,
    }


def _write_pages(file, found: Iterable[dict], scores: Iterable[float]) -> None:
    for page, score in zip(found, scores):
        row = {key: page[key] for key in ("url", "text", "kind")} | {
            "score": round(float(score), 6)
        }
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextmanager
def _locked(run_dir: str) -> Iterator[None]:
    from nanomath.run.lock import run_lock  # here, so that parsing processes do not load torch

    with run_lock(run_dir):
        yield


def run(argv: list[str]) -> None:
    """Read the command line, hold the run folder, and turn errors into one line each."""
    if not any(word.split("=")[0] in ("--preset", "--pages", "--help", "-h") for word in argv):
        # The defaults are the paper's, for a crawl: they would keep the whole embedded web.
        argv = ["--preset", "cpu", *argv]
    cfg = parse(CorpusConfig, PRESETS, argv, description=__doc__)
    with one_line_errors():
        Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
        with _locked(cfg.run_dir):
            main(cfg)


if __name__ == "__main__":
    run(sys.argv[1:])
