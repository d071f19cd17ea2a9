"""The loop: ranking to a budget, the seed, training pages, metrics, and resuming after kills."""

import dataclasses
import json

import numpy as np
import pytest

from nanomath.corpus import recall
from nanomath.corpus.domains import RULES_FILE, UrlRules
from nanomath.corpus.settings import CorpusConfig
from nanomath.corpus.text import num_tokens

RULES = UrlRules.load(RULES_FILE)
CFG = CorpusConfig(
    never_hosts=0.3,
    num_positives=100,
    num_negatives=100,
    budgets=(20_000, 40_000),
    dim=8,
    lr=1.0,
    min_count=1,
    epochs=3,
    buckets=2000,
)


@pytest.fixture(scope="module")
def web(tmp_path_factory, made_up_pages):
    path = tmp_path_factory.mktemp("web") / "pages.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for page in made_up_pages(48, seed=0):
            row = json.loads(page.to_json()) | {"tokens": num_tokens(page.text)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return recall.Web.load(path, RULES)


def test_ranking_keeps_the_best_pages_within_the_budget():
    """By score, ties by place, up to and including a page that exactly fills the budget."""
    scores_N, tokens_N = np.array([0.2, 0.9, 0.5, 0.9]), np.array([10, 30, 20, 40])
    kept = [recall.rank_to_budget(scores_N, tokens_N, b).nonzero()[0].tolist() for b in
            (29, 30, 69, 70, 89, 90, 1000)]  # fmt: skip
    assert kept == [[], [1], [1], [1, 3], [1, 3], [1, 2, 3], [0, 1, 2, 3]]


def test_pages_are_read_back_in_any_order(web):
    """Offsets find each page, Chinese ones among them."""
    order = np.random.default_rng(0).permutation(len(web))
    assert [p["url"] for p in web.pages(order)] == [web.urls[i] for i in order]
    assert any("题" in text for text in web.texts(range(len(web))))


def test_seed_and_never_hosts_do_not_meet(web):
    """Whole hosts are never seeded, the seed takes math pages of other hosts only."""
    seed_N, never_N = recall.choose_seed(web, CFG)
    assert seed_N.any() and never_N.any() and web.math_N[seed_N | never_N].all()
    hosts = np.array(web.hosts)
    assert not set(hosts[seed_N]) & set(hosts[never_N])
    for host in set(hosts[never_N]):
        assert never_N[(hosts == host) & web.math_N].all()


def test_training_pages_are_seed_against_uncollected(web):
    """Positives are the seed and the extra pages, negatives neither seed nor collected before."""
    seed_N, collected_N = np.zeros(len(web), bool), np.zeros(len(web), bool)
    seed_N[:5], collected_N[3:20] = True, True
    drawn = recall.training_pages(web, seed_N, collected_N, ["extra"], 1, CFG)
    assert sorted(i for i, is_math in drawn if is_math) == [0, 1, 2, 3, 4, len(web)]
    others = [i for i, is_math in drawn if not is_math]
    assert len(others) == len({*others}) == 6 and {*others} <= {*range(20, len(web))}
    assert drawn != recall.training_pages(web, seed_N, collected_N, ["extra"], 2, CFG)


@pytest.mark.parametrize("num_seed, num_extra", [(1, 0), (0, 1), (7, 3), (40, 0)])
def test_there_are_never_more_negatives_than_positives(web, num_seed, num_extra):
    """As many of each while pages last, in every round and whatever the caps allow (Sec. 2.1)."""
    for num_positives, num_negatives in ((2000, 1500), (5, 2000), (2000, 3)):
        cfg = dataclasses.replace(CFG, num_positives=num_positives, num_negatives=num_negatives)
        seed_N = np.arange(len(web)) < num_seed
        none_N = np.zeros(len(web), bool)
        for number in (1, 2):
            drawn = recall.training_pages(web, seed_N, none_N, ["x"] * num_extra, number, cfg)
            positives = sum(is_math for _, is_math in drawn)
            assert positives == min(num_seed + num_extra, num_positives)
            others = len(web) - num_seed
            assert len(drawn) - positives == min(positives, num_negatives, others)


def test_metrics_by_hand():
    """Precision, recall, never-seeded recall and overlap of a web of six pages."""
    web = recall.Web(
        "", list("abcdef"), list("abcdef"), np.zeros(6), np.array([10, 20, 30, 40, 50, 60]),
        math_N=np.array([1, 1, 0, 1, 1, 0], bool),
    )  # fmt: skip
    flags = lambda text: np.array([c == "1" for c in text])
    row = recall.round_metrics(
        web, flags("101010"), flags("100000"), flags("010100"), flags("001000")
    )
    assert (row["pages"], row["tokens"]) == (3, 90)
    assert row["precision"] == pytest.approx(2 / 3) and row["recall"] == pytest.approx(2 / 4)
    assert row["recall_outside_seed"] == pytest.approx(1 / 3)
    assert row["recall_never_seeded"] == 0.0
    assert row["overlap"] == pytest.approx(30 / 90)


def _two_rounds(folder, web):
    seed_N, never_N = recall.choose_seed(web, CFG)
    collected_N = before_N = np.zeros(len(web), bool)
    rows = []
    for number in (1, 2):
        collected_N, seed_N, row = recall.run_round(
            folder / f"round-{number}", web, CFG, number, seed_N, never_N, before_N, []
        )
        before_N = before_N | collected_N
        rows.append(row)
    files = {
        f"{p.parent.name}/{p.name}": p.read_bytes()
        for p in sorted(folder.glob("round-*/*"))
        if not p.name.startswith(".")
    }
    return rows, files, seed_N, never_N


def test_the_loop_grows_the_seed_without_never_hosts(web, tmp_path):
    """Round two starts from more pages, none of a never-seeded host, and keeps to its budget."""
    rows, _, seed_N, never_N = _two_rounds(tmp_path, web)
    assert rows[1]["seed_pages"] == rows[0]["seed_pages"] + rows[0]["joining"]
    assert rows[0]["joining"] > 0 and not (seed_N & never_N).any()
    assert [row["tokens"] <= row["budget"] for row in rows] == [True, True]
    assert not rows[1]["stop"]


def test_the_loop_continues_from_any_missing_file(web, tmp_path):
    """With files removed from any step on, as a kill leaves it, the rest comes out the same."""
    _, whole, _, _ = _two_rounds(tmp_path, web)
    for first in ("model.bin", "scores.npy", "round.json"):
        removed = False
        for name in ("model.bin", "scores.npy", "domains.tsv", "round.json"):
            removed |= name == first
            if removed:
                (tmp_path / "round-1" / name).unlink()
        (tmp_path / "round-1" / "model.train.txt").write_text("half a fi")
        for path in (tmp_path / "round-2").iterdir():
            path.unlink()
        _, again, _, _ = _two_rounds(tmp_path, web)
        again.pop("round-1/model.train.txt", None)
        assert again == whole


def test_the_stop_rule_is_on_tokens_collected_before(web, tmp_path):
    """A second round of the first round's budget collects the same pages and stops; 98% is met
    exactly at the boundary."""
    seed_N, never_N = recall.choose_seed(web, CFG)
    everything_N = np.ones(len(web), bool)
    _, _, row = recall.run_round(tmp_path / "r", web, CFG, 1, seed_N, never_N, everything_N, [])
    assert row["overlap"] == 1.0 and row["stop"]


def test_exactly_the_annotated_pages_join(web, tmp_path):
    """With every second page scored high, each math host is a domain, and what joins is its
    uncollected pages outside the seed, but none of a never-seeded host."""
    seed_N, never_N = recall.choose_seed(web, CFG)
    scores_N = np.where(np.arange(len(web)) % 2, 0.9, 0.1).astype(np.float32)
    (tmp_path / "model.bin").touch()  # these two steps are done
    np.save(tmp_path / "scores.npy", scores_N)
    budget = int(web.tokens_N[1::2].sum())
    cfg = dataclasses.replace(CFG, budgets=(budget,))
    collected_N, next_seed_N, row = recall.run_round(
        tmp_path, web, cfg, 1, seed_N, never_N, np.zeros(len(web), bool), []
    )
    assert collected_N.tolist() == [i % 2 == 1 for i in range(len(web))]
    joins_N = web.math_N & ~collected_N & ~seed_N & ~never_N
    assert (web.math_N & ~collected_N & never_N).any() and joins_N.any()
    assert next_seed_N.tolist() == (seed_N | joins_N).tolist()
    assert row["joining"] == joins_N.sum()
