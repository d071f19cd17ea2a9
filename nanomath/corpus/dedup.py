"""Exact and near deduplication of pages (Sec. 2.1, step 3): URL keys and MinHash signatures.

The first page seen is kept, so the result depends only on the order of the pages.
"""

from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np

from nanomath.corpus.text import mix, ngram_hashes

# 14 bands of 8: two pages of Jaccard similarity s share a band with 1 - (1 - s^8)^14,
# 0.92 at 0.8 and 0.05 at 0.5. The paper does not say how it finds near-duplicates.
NUM_BANDS = 14
ROWS_PER_BAND = 8
NUM_HASHES = NUM_BANDS * ROWS_PER_BAND
SHINGLE = 5
_BLOCK = 4096  # shingles hashed at once: 3.7 MB however long the page
_TRACKING = ("utm_", "fbclid", "gclid")


def url_key(url: str) -> str:
    """Return what two URLs of one page share: no scheme, fragment, trailing slash, tracking.

    Raises ValueError where urlsplit cannot read the URL; pages.py lets no such page in.
    """
    parts = urlsplit(url.strip())
    host = (parts.hostname or "").removeprefix("www.")
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    query = urlencode(sorted(p for p in pairs if not p[0].lower().startswith(_TRACKING)))
    return f"{host}{parts.path.rstrip('/')}?{query}".rstrip("?")


def minhash(canonical_text: bytes) -> np.ndarray:
    """Return the MinHash signature of the 5-gram shingles: uint32 [NUM_HASHES]."""
    shingles = ngram_hashes(canonical_text, SHINGLE)
    if not len(shingles):  # a shorter page is one shingle
        num_grams = canonical_text.count(b" ") + 1
        shingles = ngram_hashes(canonical_text or b" ", num_grams)
    factors, offsets = _permutations()
    shingles = np.unique(shingles)
    least = np.full(NUM_HASHES, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(shingles), _BLOCK):
        permuted = shingles[start : start + _BLOCK, None] * factors
        permuted += offsets
        np.minimum(least, permuted.min(axis=0), out=least)
    return (least >> np.uint64(32)).astype(np.uint32)


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Estimate the Jaccard similarity of two pages from their signatures."""
    return float(np.mean(first == second))


class NearDuplicates:
    """The pages kept so far, found again through the bands of their signatures."""

    def __init__(self, min_similarity: float = 0.8):
        self.min_similarity = min_similarity
        self._owners: dict[tuple[int, bytes], int] = {}
        self._signatures: dict[int, np.ndarray] = {}

    def add(self, page: int, signature: np.ndarray) -> int | None:
        """Return the kept page this one repeats, or keep it and return None."""
        bands = [
            (band, rows.tobytes()) for band, rows in enumerate(signature.reshape(NUM_BANDS, -1))
        ]
        for owner in sorted({self._owners[key] for key in bands if key in self._owners}):
            if similarity(self._signatures[owner], signature) >= self.min_similarity:
                return owner
        self._signatures[page] = signature
        for key in bands:
            self._owners.setdefault(key, page)
        return None


def _permutations() -> tuple[np.ndarray, np.ndarray]:
    counters = np.arange(1, 2 * NUM_HASHES + 1, dtype=np.uint64)
    values = mix(counters * np.uint64(0x9E3779B97F4A7C15))
    return values[:NUM_HASHES] | np.uint64(1), values[NUM_HASHES:]
