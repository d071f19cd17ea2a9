"""The settings of build_corpus.py: the paper's where it states them, and presets."""

from dataclasses import dataclass

from nanomath.base.config import opt
from nanomath.corpus.pages import PACKAGES
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
    math_share: float = opt(0.1, "math pages are at most this share of the web", low=0, high=1)
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
    dim: int = opt(256, "fastText vector width, Sec. 2.1", low=1)
    lr: float = opt(0.1, "fastText learning rate, Sec. 2.1", low=0.0)
    word_ngrams: int = opt(3, "fastText n-grams, Sec. 2.1", low=1)
    min_count: int = opt(3, "fastText minCount, Sec. 2.1", low=1)
    epochs: int = opt(3, "fastText epochs, Sec. 2.1", low=1)
    buckets: int = opt(2_000_000, "fastText hash buckets (its default)", low=1)
    valid_pages: int = opt(200, "math pages kept for validation, at most", low=0)


# DEVIATION: on a few thousand pages the paper's fastText values leave all scores near 0.5, so small
# runs raise the learning rate and shrink the table (Sec. 2.1: lr 0.1, dim 256).
_SMALL = {
    "dim": 64,
    "lr": 1.0,
    "buckets": 200_000,
    "epochs": 30,
    "num_positives": 2000,
    "num_negatives": 1500,
}


PRESETS = {
    "smoke": _SMALL
    | {
        "packages": ("mpmath", "networkx", "numpy", "setuptools", "fsspec", "werkzeug", "markdown"),
        "num_heldout": 50,
        "budgets": (22_000, 35_000),
        "valid_pages": 20,
    }
    | vars(countdown.RANGES["smoke"]),
    "cpu": _SMALL | {"budgets": (250_000, 400_000)} | vars(countdown.RANGES["cpu"]),
    "gpu": _SMALL
    # All the mathematics that the documentation holds: four times as much.
    | {"budgets": (900_000, 1_400_000), "math_share": 1.0, "num_workers": 8}
    | vars(countdown.RANGES["gpu"]),
}
