"""Find pages that contain benchmark text (Sec. 2.1, step 6).

A page is contaminated when it holds any 10-gram of a benchmark question or answer, or the whole of
one that has 3 to 9 grams, not all of them numbers; others are not used. Grams are those of text.py,
so that Chinese, which has no spaces, is covered as well. Every hit is counted per benchmark text: a
short answer that matches half the web must be seen, not silently obeyed.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanomath.base.files import read_jsonl
from nanomath.corpus.text import canonical, ngram_hashes

NUM_GRAMS = 10  # Sec. 2.1
MIN_GRAMS = 3  # Sec. 2.1
FIELDS = (
    *("question", "answer", "problem", "solution"),
    *("Question", "Answer", "body", "Body", "input", "passage"),
)
_CALCULATOR = re.compile("<<[^<>]*>>")  # GSM8K: "half of it is 48/2 = <<48/2=24>>24"


@dataclass(frozen=True)
class BenchmarkText:
    """One question or answer: `name` says where it is from, as in `gsm8k_test:17:question`."""

    name: str
    text: str


def read_benchmark(path: str | Path) -> list[BenchmarkText]:
    """Read questions and answers from JSONL (the fields in FIELDS, and `messages`).

    A list of options is one text, lettered as it is printed: alone, "none of the above" would be
    matched whole and match half the web; without letters "One, Two, Three, Four" would.

    Raises FileNotFoundError, or ValueError naming the file and line where a line is not a JSON
    object, or the file where no line has such a field.
    """
    path = Path(path)
    texts = []
    for number, row in read_jsonl(path, max_bad_fraction=0.0):
        values = [(name, row.get(name)) for name in FIELDS]
        values.append(("options", _options_text(row.get("options"))))
        if isinstance(row.get("messages"), list):
            values += [
                (f"message{i}", message.get("content"))
                for i, message in enumerate(row["messages"])
                if isinstance(message, dict)
            ]
        texts += [
            BenchmarkText(f"{path.stem}:{number}:{name}", value)
            for name, value in values
            if isinstance(value, str) and value
        ]
    if not texts:
        raise ValueError(f"{path}: no line has any of the fields {', '.join(FIELDS)}, options")
    return texts


def _options_text(options: object) -> object:
    if not isinstance(options, list) or not all(isinstance(item, str) for item in options):
        return options  # a text with its letters, or nothing to read
    letters = (f"({chr(ord('A') + i)})" for i in range(len(options)))
    return "\n".join(
        option if option.startswith(letter) else f"{letter} {option}"
        for letter, option in zip(letters, options)
    )


@dataclass
class _Lookup:
    """Sorted hashes and, for each, the benchmark texts that have it (rows of a sparse table)."""

    hashes: np.ndarray
    first: np.ndarray
    owners: np.ndarray

    @classmethod
    def build(cls, pairs: Sequence[tuple[np.ndarray, int]]) -> "_Lookup":
        hashes = np.concatenate([h for h, _ in pairs])
        owners = np.concatenate([np.full(len(h), owner) for h, owner in pairs])
        order = np.lexsort((owners, hashes))
        unique, first = np.unique(hashes[order], return_index=True)
        return cls(unique, np.append(first, len(hashes)), owners[order])

    def find(self, hashes: np.ndarray) -> set[int]:
        place = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        found = np.unique(place[self.hashes[place] == hashes])
        return {int(o) for i in found for o in self.owners[self.first[i] : self.first[i + 1]]}


def _match_length(canonical_text: bytes) -> int:
    """Return how many grams in a row must match: 10, all of 3 to 9, or 0 for a text not used."""
    words = canonical_text.split()
    if len(words) >= NUM_GRAMS:
        return NUM_GRAMS
    # DEVIATION: Sec. 2.1 matches every text of 3 or more grams. Our grams drop operators, so that
    # the answer (1, 2, 3) would match "1 + 2 = 3", "1-2-3" and every list that counts: fewer than
    # 10 numbers with no word among them identify nothing.
    if len(words) < MIN_GRAMS or all(word.isdigit() for word in words):
        return 0
    return len(words)


class Decontaminator:
    """The index of all benchmark texts, and the hits counted while pages pass through it."""

    def __init__(self, texts: Iterable[BenchmarkText]):
        self.texts = list(texts)
        self.hits: Counter[str] = Counter()
        self._lookups: dict[int, _Lookup] = {}
        pairs: dict[int, list[tuple[np.ndarray, int]]] = {}
        # How many texts are matched by 10-grams, matched whole, and not used.
        self.summary = {"long": 0, "short": 0, "unused": 0}
        for owner, item in enumerate(self.texts):
            # With the calculator's marks, as the file has it, and without, as a page shows it.
            forms = {canonical(text): None for text in (item.text, _CALCULATOR.sub("", item.text))}
            lengths = [_match_length(form) for form in forms]
            for form, n in zip(forms, lengths):
                if n:
                    pairs.setdefault(n, []).append((np.unique(ngram_hashes(form, n)), owner))
            longest = max(lengths)
            kind = "long" if longest == NUM_GRAMS else "short" if longest else "unused"
            self.summary[kind] += 1
        for n in sorted(pairs):
            self._lookups[n] = _Lookup.build(pairs[n])

    def matches(self, page_text: str) -> list[str]:
        """Return the names of the benchmark texts found in a page, and count them."""
        text = canonical(page_text)
        owners: set[int] = set()
        for n, lookup in self._lookups.items():
            owners |= lookup.find(ngram_hashes(text, n))
        names = sorted({self.texts[owner].name for owner in owners})
        self.hits.update(names)
        return names
