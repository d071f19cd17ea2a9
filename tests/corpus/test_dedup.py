"""URL keys and near-duplicates."""

import random
import tracemalloc

import numpy as np

from nanomath.corpus import dedup
from nanomath.corpus.dedup import NUM_HASHES, NearDuplicates, minhash, similarity, url_key
from nanomath.corpus.text import canonical, ngram_hashes


def test_url_key_joins_what_is_one_page_and_nothing_else():
    """Scheme, www, fragment, trailing slash and tracking drop out; path and query decide."""
    same = [
        "http://www.Example.org/a/",
        "https://example.org/a#part",
        "https://example.org/a?utm_source=x",
    ]
    assert {url_key(url) for url in same} == {"example.org/a"}
    assert url_key("https://e.org/t?b=2&a=1") == url_key("https://e.org/t?a=1&b=2")
    assert url_key("https://e.org/t?a=1") != url_key("https://e.org/t?a=2")
    assert url_key("https://e.org/A") != url_key("https://e.org/a")


def _words(seed: int, num: int = 600) -> list[str]:
    return random.Random(seed).choices([f"w{i}" for i in range(5000)], k=num)


def _signature(words: list[str]):
    return minhash(canonical(" ".join(words)))


def test_minhash_estimates_the_jaccard_similarity():
    """The estimate is within four standard errors of the true similarity of 5-gram sets."""
    for overlap in (0.0, 0.3, 0.6, 0.9, 1.0):
        first = _words(1)
        num_shared = int(overlap * 600)
        second = first[:num_shared] + _words(2)[num_shared:]
        sets = [{tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (first, second)]
        true = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        error = (true * (1 - true) / 112) ** 0.5
        assert abs(similarity(_signature(first), _signature(second)) - true) <= 4 * error + 1e-9


def test_minhash_of_a_long_page_takes_bounded_memory():
    """Ten thousand shingles and a few more, in blocks: the values of one product over all of them,
    in a fraction of its memory."""
    assert dedup._BLOCK * NUM_HASHES * 8 < 4e6
    text = canonical(" ".join(_words(1, 3 * dedup._BLOCK + 17)))
    shingles = np.unique(ngram_hashes(text, dedup.SHINGLE))
    assert len(shingles) > 2 * dedup._BLOCK and len(shingles) % dedup._BLOCK
    factors, offsets = dedup._permutations()
    whole = shingles[:, None] * factors + offsets
    tracemalloc.start()
    signature = minhash(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert signature.tolist() == (whole.min(axis=0) >> np.uint64(32)).tolist()
    assert peak < 0.75 * whole.nbytes


def test_near_duplicates_keep_the_first_page():
    """A copy with a few words changed repeats the first page; a different page is kept."""
    near, first = NearDuplicates(0.8), _words(1)
    changed = [*first[:300], "other", *first[301:]]
    assert near.add(0, _signature(first)) is None
    assert near.add(1, _signature(_words(2))) is None
    assert near.add(2, _signature(changed)) == 0
    assert near.add(3, _signature(first[:300] + _words(3, 300))) is None  # a third in common


def test_pages_shorter_than_a_shingle_repeat_only_themselves():
    """Short pages are compared whole; an empty page does not fail."""
    near = NearDuplicates()
    assert near.add(0, _signature(["one", "two"])) is None
    assert near.add(1, _signature(["one", "three"])) is None
    assert near.add(2, _signature(["one", "two"])) == 0
    assert near.add(3, _signature([])) is None


def test_a_shared_band_is_not_yet_a_duplicate():
    """Pages meet in a band of 8 hashes, but repeat each other only from the similarity asked."""
    first = np.arange(NUM_HASHES, dtype=np.uint32)
    for num_equal, owner in ((8, None), (89, None), (90, 0), (112, 0)):  # 0.8 * 112 = 89.6
        near = NearDuplicates(0.8)
        near.add(0, first)
        second = np.where(np.arange(NUM_HASHES) < num_equal, first, first + 1000)
        assert near.add(1, second.astype(np.uint32)) == owner
