"""Tokens, n-gram hashes and the one-line form fastText reads."""

import sys
import unicodedata

import numpy as np

from nanomath.corpus.text import canonical, grams, ngram_hashes, normalise, num_tokens


def test_cjk_characters_become_tokens_of_their_own():
    """Every Han or kana character is one token, punctuation is kept, other words stay whole."""
    assert normalise("小明有12个苹果。how\nmany?") == "小 明 有 12 个 苹 果 。how many?"
    assert num_tokens("小明有12个苹果。how\nmany?") == 9
    assert normalise("ひらカナ 한국어 x") == "ひ ら カ ナ 한국어 x"


def test_newlines_separate_words():
    """The last word of a line never glues to the first of the next, whatever the line ending."""
    assert normalise("end\nStart\r\nnext\x0bword\0last") == "end Start next word last"


def test_a_page_cannot_set_its_own_label_or_end_its_line():
    """The words fastText treats as markup are broken up in pages."""
    line = normalise("buy __label__math now </s> and more")
    assert "__label__" not in line and "</s>" not in line.split()
    assert line.endswith("and more")


def test_grams_are_lower_case_runs_or_single_cjk_characters():
    """Punctuation, LaTeX and underscores separate; full-width digits equal plain ones."""
    assert grams("\\frac{X_1}{2} isn't") == ["frac", "x", "1", "2", "isn", "t"]
    assert grams("共有１２个，Ｘ") == ["共", "有", "12", "个", "x"]
    assert grams("二〇二四年") == ["二", "〇", "二", "四", "年"]


def test_invisible_characters_do_not_split_words():
    """Every character of category Cf that this Python knows drops out of a word."""
    assert grams("sol\u00adve 4\u200b8 小\u2060明") == ["solve", "48", "小", "明"]
    invisible = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) == "Cf"]
    assert len(invisible) > 150
    assert [c for c in invisible if grams(f"ab{c}cd") != ["abcd"]] == []


def test_ngram_hashes_agree_with_joined_strings():
    """Equal n-grams have equal hashes wherever they stand, and different ones different hashes."""
    rng = np.random.default_rng(0)
    words = [["a", "bb", "小", "12", "x1"][i] for i in rng.integers(0, 5, 400)]
    for n in (1, 3, 10):
        by_hash: dict[int, str] = {}
        by_text: dict[str, int] = {}
        hashes = ngram_hashes(canonical(" ".join(words)), n)
        assert len(hashes) == len(words) - n + 1
        for i, value in enumerate(hashes.tolist()):
            text = " ".join(words[i : i + n])
            assert by_hash.setdefault(value, text) == text
            assert by_text.setdefault(text, value) == value
        assert len(by_hash) > 4


def test_ngram_hashes_of_short_texts_are_empty():
    """A text with fewer than n grams has no n-gram; one with exactly n has one."""
    assert len(ngram_hashes(b"", 1)) == 0
    assert len(ngram_hashes(b"one two", 3)) == 0
    assert len(ngram_hashes(b"one two three", 3)) == 1
