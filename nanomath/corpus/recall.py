"""The iterative loop of Sec. 2.1: train, score, rank to a budget, find domains, grow the seed.

State is files: a round's model and its scores are each written by rename, and made only when the
file is not there, so a killed run goes on where it was and ends with the same bytes. Reading pages
and the last steps (decontamination, writing the corpus) are in build_corpus.py.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanomath.base.files import open_atomically, write_json
from nanomath.base.log import progress
from nanomath.corpus import classifier, domains
from nanomath.corpus.settings import CorpusConfig


@dataclass
class Web:
    """The deduplicated pages: columns in memory, texts on disk."""

    path: Path
    urls: list[str]
    hosts: list[str]
    offsets_N: np.ndarray  # of each page's line in the file, bytes
    tokens_N: np.ndarray
    math_N: np.ndarray  # bool: what the URL rules, the annotator, say; the truth of every metric

    @classmethod
    def load(cls, path: str | Path, rules: domains.UrlRules) -> "Web":
        """Read the columns of a pages file (lines with url, text, tokens)."""
        urls, tokens, offsets = [], [], []
        with open(path, "rb") as lines:
            offset = 0
            for line in lines:
                row = json.loads(line)
                urls.append(row["url"])
                tokens.append(row["tokens"])
                offsets.append(offset)
                offset += len(line)
        return cls(
            Path(path),
            urls,
            [domains.host_of(url) for url in urls],
            np.array(offsets, np.int64),
            np.array(tokens, np.int64),
            np.array([rules.is_math(url) for url in urls], bool),
        )

    def __len__(self) -> int:
        return len(self.urls)

    def pages(self, indices: Iterable[int]) -> Iterator[dict]:
        """Yield the pages of these indices, in the order given."""
        with open(self.path, "rb") as file:
            for index in indices:
                file.seek(self.offsets_N[index])
                yield json.loads(file.readline())

    def texts(self, indices: Iterable[int]) -> Iterator[str]:
        return (page["text"] for page in self.pages(indices))


def unit_hash(text: str, seed: int, purpose: str) -> float:
    """Return a number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def choose_seed(web: Web, cfg: CorpusConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return (seed, never seeded), bool [N]: which math pages the first round knows.

    A share seed_hosts of the math hosts gives a share seed_share of its pages; a share never_hosts
    never joins the seed, so that recall there is a measure of generalisation. A host's own part
    depends on its name alone.
    """
    places = {host: unit_hash(host, cfg.seed, "known") for host in set(web.hosts)}
    place_N = np.array([places[host] for host in web.hosts])
    draw_N = np.array([unit_hash(url, cfg.seed, "page") for url in web.urls])
    never_N = web.math_N & (place_N < cfg.never_hosts)
    in_seed_N = (cfg.never_hosts <= place_N) & (place_N < cfg.never_hosts + cfg.seed_hosts)
    return web.math_N & in_seed_N & (draw_N < cfg.seed_share), never_N


def rank_to_budget(scores_N: np.ndarray, tokens_N: np.ndarray, budget: int) -> np.ndarray:
    """Return the best pages whose tokens together fit the budget: bool [N].

    Ties go to the earlier page; ranking ends at the first page that does not fit.
    """
    order = np.argsort(-scores_N, kind="stable")
    num_kept = np.searchsorted(np.cumsum(tokens_N[order]), budget, side="right")
    collected_N = np.zeros(len(scores_N), bool)
    collected_N[order[:num_kept]] = True
    return collected_N


def training_pages(
    web: Web,
    seed_N: np.ndarray,
    collected_N: np.ndarray,
    extra_seed: Sequence[str],
    round_number: int,
    cfg: CorpusConfig,
) -> list[tuple[int, bool]]:
    """Draw what the classifier trains on: (page, is math), shuffled.

    Pages from len(web) on are those of extra_seed. Negatives come from all pages that are neither
    in the seed nor were collected before: math pages not yet found are among them, as they are in
    the paper's draw from the whole crawl.
    """
    # DEVIATION: Sec. 2.1 draws negatives from all of Common Crawl. 500K of 40B pages hardly ever
    # meet a collected one; 1500 of a few thousand would, and would teach the classifier that what
    # it found is not math. So pages collected by an earlier round are left out of the draw.
    rng = np.random.default_rng([cfg.seed, round_number])
    extra = np.arange(len(web), len(web) + len(extra_seed))
    positives = np.concatenate((np.flatnonzero(seed_N), extra))
    others = np.flatnonzero(~seed_N & ~collected_N)
    if not len(others):  # everything was collected: the lower half of it has to do
        others = np.flatnonzero(~seed_N)
    positives = rng.permutation(positives)[: cfg.num_positives]
    # As many negatives as positives, as in the paper (500K and 500K): with more of them the
    # cheapest way to a low loss is to doubt every page, and few unsure ones are ranked right.
    others = rng.permutation(others)[: min(cfg.num_negatives, len(positives))]
    both = [(int(i), True) for i in positives] + [(int(i), False) for i in others]
    return [both[i] for i in rng.permutation(len(both))]


def round_metrics(
    web: Web, collected_N: np.ndarray, seed_N: np.ndarray, never_N: np.ndarray, before_N: np.ndarray
) -> dict[str, float | int | None]:
    """Return a round's row of the report; None where there is nothing to divide by."""
    right_N, unseen_N = web.math_N & collected_N, web.math_N & ~seed_N
    tokens, tokens_before = (web.tokens_N[x].sum() for x in (collected_N, collected_N & before_N))
    return {
        "seed_pages": int(seed_N.sum()),
        "pages": int(collected_N.sum()),
        "tokens": int(tokens),
        "precision": _ratio(right_N.sum(), collected_N.sum()),
        "recall": _ratio(right_N.sum(), web.math_N.sum()),
        "recall_outside_seed": _ratio((unseen_N & collected_N).sum(), unseen_N.sum()),
        "recall_never_seeded": _ratio((never_N & collected_N).sum(), never_N.sum()),
        "overlap": _ratio(tokens_before, tokens),
    }


def run_round(
    folder: Path,
    web: Web,
    cfg: CorpusConfig,
    round_number: int,
    seed_N: np.ndarray,
    never_N: np.ndarray,
    before_N: np.ndarray,
    extra_seed: Sequence[str],
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Run one round, or the rest of it; return (collected, next seed, row of the report).

    before_N: what any earlier round collected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Training and scoring take the time; all that follows from the scores is computed again.
    if not (folder / "model.bin").exists():
        drawn = training_pages(web, seed_N, before_N, extra_seed, round_number, cfg)
        bar = progress(drawn, desc="writing training pages", unit="page")
        classifier.train(_labelled_texts(web, extra_seed, bar), folder / "model.bin", cfg)
    if not (folder / "scores.npy").exists():
        model = classifier.load(folder / "model.bin")
        found = classifier.math_probabilities(model, web.texts(range(len(web))))
        bar = progress(found, total=len(web), desc=f"scoring, round {round_number}", unit="page")
        with open_atomically(folder / "scores.npy", "wb") as file:
            np.save(file, np.array(list(bar), np.float32))
    scores_N = np.load(folder / "scores.npy")

    budget = cfg.budgets[min(round_number, len(cfg.budgets)) - 1]
    collected_N = rank_to_budget(scores_N, web.tokens_N, budget)
    found = domains.discover(web.hosts, collected_N, scores_N, cfg.min_domain_share)
    # Sec. 2.1, step 4: of a math-related host, the uncollected pages that a person calls math.
    annotated_N = np.isin(web.hosts, [domain.host for domain in found]) & web.math_N & ~collected_N
    joins_N = annotated_N & ~never_N & ~seed_N
    with open_atomically(folder / "domains.tsv") as file:
        domains.write_candidates(file, web.urls, web.hosts, collected_N, joins_N, found)
    row = {"round": round_number, "budget": budget}
    row |= round_metrics(web, collected_N, seed_N, never_N, before_N)
    row |= {"domains": len(found), "joining": int(joins_N.sum())}
    row["stop"] = row["overlap"] is not None and row["overlap"] >= cfg.stop_overlap
    write_json(folder / "round.json", row)
    return collected_N, seed_N | joins_N, row


def _labelled_texts(
    web: Web, extra_seed: Sequence[str], drawn: Iterable[tuple[int, bool]]
) -> Iterator[tuple[str, bool]]:
    for index, is_math in drawn:
        if index >= len(web):
            yield extra_seed[index - len(web)], is_math
        else:
            yield next(web.texts([index])), is_math


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
