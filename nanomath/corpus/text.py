"""Text as fastText and the n-gram rules see it: tokens without spaces between Chinese characters.

`normalise` makes the one-line form the classifier is trained on and scores; `canonical` makes the
stricter form (lower case, no punctuation) whose n-grams near-deduplication and decontamination
compare; `ngram_hashes` hashes all n-grams of a page in a few numpy operations.
A gram is a run of letters and digits, or one CJK character.
"""

import functools
import re
import unicodedata

import numpy as np

# Han (with 々〆〇), Hiragana, Katakana. Korean is written with spaces and needs no splitting.
_CJK = (
    "\u3005-\u3007\u3041-\u3096\u30a1-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
_CJK_CHARACTER = re.compile(f"([{_CJK}])")
_GRAM = re.compile(f"[{_CJK}]|(?:(?![{_CJK}])[^\\W_])+")
_ASCII_GRAM = re.compile("[a-z0-9]+")
# Unicode category Cf: soft hyphen, zero-width space and joiners, direction marks, tags. A reader
# does not see them, so inside a word they must not hide a match. test_text.py checks the list.
_INVISIBLE = re.compile(
    "[\u00ad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f\u202a-\u202e"
    "\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f]+"
)


def normalise(text: str) -> str:
    """Return text as one fastText line: tokens joined by single spaces, CJK characters apart.

    fastText would read `__label__x` in a page as its label and stop at `</s>`, so both are broken
    up: a page must not choose its own class.
    """
    if not text.isascii():
        text = _CJK_CHARACTER.sub(r" \1 ", text)
    text = text.replace("__label__", "_ label _").replace("</s>", "< /s>").replace("\0", " ")
    return " ".join(text.split())


def num_tokens(text: str) -> int:
    """Count the tokens of the normalised text, the unit of every budget of this stage."""
    return len(normalise(text).split())


def grams(text: str) -> list[str]:
    """Split text into lower-case words and single CJK characters; all else separates.

    Invisible characters (category Cf) are removed first, and separate nothing.
    """
    if text.isascii():
        return _ASCII_GRAM.findall(text.lower())
    # NFKC makes full-width digits and letters, common in Chinese pages, the plain ones.
    return _GRAM.findall(unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).lower())


def canonical(text: str) -> bytes:
    """Return the grams joined by one space, as UTF-8: an n-gram is a piece of these bytes."""
    return " ".join(grams(text)).encode()


def ngram_hashes(canonical_text: bytes, n: int) -> np.ndarray:
    """Hash every n-gram of canonical text; uint64, one per gram that starts an n-gram, in order.

    A polynomial hash modulo 2**64 over prefix sums: an n-gram is a substring, so each costs one
    subtraction and one product whatever its n. Empty where the text has fewer than n grams.
    """
    if not canonical_text:
        return np.empty(0, np.uint64)
    data = np.frombuffer(canonical_text, np.uint8)
    spaces = np.flatnonzero(data == 32)
    starts = np.concatenate(([0], spaces + 1))
    ends = np.concatenate((spaces, [len(data)]))
    if len(starts) < n:
        return np.empty(0, np.uint64)
    starts, ends = starts[: len(starts) - n + 1], ends[n - 1 :]
    powers, inverse_powers = _power_tables(1 << len(data).bit_length())
    prefix = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(data * powers[: len(data)], out=prefix[1:])
    return mix((prefix[ends] - prefix[starts]) * inverse_powers[starts])


def mix(values: np.ndarray) -> np.ndarray:
    """Spread uint64 values over all bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(maxsize=24)  # one entry per power of two: 24 cover pages of 8 MB
def _power_tables(size: int) -> tuple[np.ndarray, np.ndarray]:
    base = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
    tables = []
    for factor in (base, pow(base, -1, 1 << 64)):
        table = np.full(size, factor, np.uint64)
        table[0] = 1
        tables.append(np.cumprod(table, dtype=np.uint64))
    return tables[0], tables[1]
