"""From the pages that were collected to a corpus: decontamination, validation pages (Sec. 2.1)."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nanomath.base.files import open_atomically
from nanomath.base.log import progress
from nanomath.corpus import decontaminate, recall
from nanomath.corpus.settings import CorpusConfig
from nanomath.tasks import countdown


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
        cfg.num_heldout, countdown.Ranges.of(cfg), split="heldout", seed=cfg.heldout_seed
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
    knows), a tenth of the collected pages.
    """
    place = lambda i: recall.unit_hash(web.urls[i], cfg.seed, "valid")
    held = sorted(np.flatnonzero(never_N), key=place)
    if len(held) >= 2:
        return held[: min(cfg.valid_pages, len(held) // 2)], "never-seeded hosts"
    held = sorted(np.flatnonzero(collected_N), key=place)
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
    with open_atomically(run_dir / "valid.jsonl") as file:
        _write_pages(file, web.pages(held), scores_N[held])

    chosen_N = collected_N.copy()
    chosen_N[held] = False
    order = np.random.default_rng(cfg.seed).permutation(np.flatnonzero(chosen_N))
    index = decontaminate.Decontaminator(benchmark_texts(cfg))
    total, num_dropped = {"pages": 0, "tokens": 0}, 0
    bar = progress(web.pages(order), total=len(order), desc="decontaminating", unit="page")
    with (
        open_atomically(run_dir / "corpus.jsonl") as corpus,
        open_atomically(run_dir / "contaminated.jsonl") as dropped,
    ):
        for page, score in zip(bar, scores_N[order]):
            if matched := index.matches(page["text"]):
                num_dropped += 1
                dropped.write(json.dumps({"url": page["url"], "matches": matched}) + "\n")
                continue
            total["pages"] += 1
            total["tokens"] += page["tokens"]
            _write_pages(corpus, [page], [score])
    return {
        "collected": int(collected_N.sum()),
        "validation": len(held),
        "validation_source": source,
        "contaminated": num_dropped,
        "benchmark_texts": index.summary,
        "benchmark_hits": dict(sorted(index.hits.items(), key=lambda x: (-x[1], x[0]))[:100]),
        "corpus": total,
    }


def _write_pages(file, found: Iterable[dict], scores: Iterable[float]) -> None:
    for page, score in zip(found, scores):
        row = {"url": page["url"], "text": page["text"], "score": round(float(score), 6)}
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
