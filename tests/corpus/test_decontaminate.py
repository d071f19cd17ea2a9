"""Pages that hold benchmark text: the 10-gram rule, the 3-9 rule, Chinese, hit counts."""

import json
import os
from pathlib import Path

import pytest

from nanomath.corpus.decontaminate import BenchmarkText, Decontaminator, read_benchmark
from nanomath.corpus.pages import find_package, parse_file, source_files
from nanomath.corpus.text import grams

GSM = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did Natalia sell altogether in April and May?"
)


def _index(*texts: str) -> Decontaminator:
    return Decontaminator([BenchmarkText(f"b:{i}", text) for i, text in enumerate(texts)])


def test_ten_grams_match_and_nine_do_not():
    """Any 10 consecutive grams of a question flag a page; 9 of them never do."""
    index, words = _index(GSM), GSM.split()
    for start in range(len(words) - 9):
        piece = " ".join(words[start : start + 10])
        assert index.matches(f"before {piece} after") == ["b:0"]
        shorter = " ".join(words[start : start + 9])
        assert index.matches(f"before {shorter} after") == []


def test_case_punctuation_and_line_breaks_do_not_hide_a_match():
    """Grams are compared, not characters."""
    piece = "SHE sold -- half,\nas many *clips* in May? How (many) clips"
    assert _index(GSM).matches(piece) == ["b:0"]


def test_texts_of_three_to_nine_grams_match_whole_only():
    """A 4-gram answer needs all its grams in a row; a 2-gram answer is never used."""
    index = _index("the answer is 42", "x = 7", "two words")
    assert index.summary == {"long": 0, "short": 1, "unused": 2}
    assert index.matches("So the answer is: 42!") == ["b:0"]
    assert index.matches("the answer is 43, 42 the answer") == []
    assert index.matches("x = 7 and two words") == []


def test_nine_and_ten_gram_texts_fall_on_their_sides():
    """Nine grams are matched whole, ten by their one 10-gram: both need every gram."""
    nine, ten = "a1 a2 a3 a4 a5 a6 a7 a8 a9", "b1 b2 b3 b4 b5 b6 b7 b8 b9 b10"
    index = _index(nine, ten)
    assert index.summary == {"long": 1, "short": 1, "unused": 0}
    assert index.matches(f"{nine} {ten}") == ["b:0", "b:1"]
    assert index.matches(nine.rpartition(" ")[0] + " / " + ten.rpartition(" ")[0]) == []


def test_chinese_counts_characters():
    """Ten characters of a Chinese question flag a page, nine do not; digits are one gram."""
    question = "芳芳买了一本书有99页，看了90页，她还剩多少页没有看？"
    assert len(grams(question)) == 23
    index = _index(question)
    assert index.matches("他说：买了一本书有99页看了，真的") == ["b:0"]
    assert index.matches("他说：了一本书有99页看了，真的") == []


def test_bare_numbers_identify_nothing():
    """Nine numbers in a row are not used, ten are matched, and one word among a few is enough."""
    nine, ten = " ".join(map(str, range(1, 10))), " ".join(map(str, range(11, 21)))
    index = _index("(1, 2, 3)", nine, ten, "x = 1, 2")
    assert index.summary == {"long": 1, "short": 1, "unused": 2}
    assert index.matches(f"1 * 2 + 3 = 5; {nine}") == []
    assert index.matches(ten) == ["b:2"] and index.matches("so x = (1, 2)") == ["b:3"]


def test_invisible_characters_do_not_hide_a_match():
    """A page with zero-width spaces and soft hyphens inside words, and a benchmark with them."""
    page = GSM.replace("clips", "cl\u00adips").replace("48", "4\u200b8")
    assert _index(GSM).matches(page) == ["b:0"] and _index(page).matches(GSM) == ["b:0"]


def test_calculator_marks_are_matched_with_and_without():
    """A GSM8K answer flags pages that show <<48/2=24>> and pages that do not, as one text."""
    marked = "In May she sold 48/2 = <<48/2=24>>24 clips. Natalia sold 48+24 = <<48+24=72>>72"
    plain = "In May she sold 48/2 = 24 clips. Natalia sold 48+24 = 72"
    index = _index(marked)
    assert index.matches(marked) == ["b:0"] and index.matches(plain) == ["b:0"]
    assert index.summary == {"long": 1, "short": 0, "unused": 0}
    assert dict(index.hits) == {"b:0": 2}


def test_options_are_one_lettered_text(tmp_path):
    """A list gets letters where it has none, a text stays, and a lone option matches nothing."""
    path = tmp_path / "bench.jsonl"
    rows = [
        {"question": "q", "options": ["(A)$x>1$", "(B)none of these"]},
        {"question": "q", "options": ["is", "none of the above"]},
        {"question": "q", "options": "A) $y=6$ B) $y=-6$"},
        {"question": "q", "options": None},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    texts = [text for text in read_benchmark(path) if text.name.endswith(":options")]
    assert [text.text for text in texts] == [
        "(A)$x>1$\n(B)none of these",
        "(A) is\n(B) none of the above",
        "A) $y=6$ B) $y=-6$",
    ]
    index = Decontaminator(texts)
    assert index.matches("(a) x > 1 (b) none of these") == ["bench:1:options"]
    assert index.matches("none of the above; none of these; it is none of the above") == []


def test_hits_are_counted_per_benchmark_text():
    """Every page counts once for each text it holds, and shared 10-grams count for all owners."""
    shared = " ".join(f"s{i}" for i in range(10))
    index = _index(f"{shared} first", f"second {shared}", "never seen at all")
    index.matches(f"{shared} {shared}")
    index.matches(shared)
    index.matches("nothing here")
    assert dict(index.hits) == {"b:0": 2, "b:1": 2}


def test_read_benchmark_takes_questions_and_answers(tmp_path):
    """Both fields of each of the known layouts are read; a bad line is named."""
    path = tmp_path / "bench.jsonl"
    rows = [
        {"question": "q one", "answer": "a one", "id": 3},
        {"problem": "p two", "solution": "s two"},
        {"messages": [{"role": "user", "content": "m three"}]},
        {"question": "q four", "answer": None},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    texts = read_benchmark(path)
    assert [t.text for t in texts] == ["q one", "a one", "p two", "s two", "m three", "q four"]
    assert texts[0].name == "bench:1:question"
    path.write_text('{"question": "ok"}\n[1]\n')
    with pytest.raises(ValueError, match=r"bench\.jsonl:2"):
        read_benchmark(path)
    path.write_text('{"other": "x"}\n')
    with pytest.raises(ValueError, match="no line has any of the fields"):
        read_benchmark(path)


DATA = os.environ.get("NANOMATH_DATA")


@pytest.mark.skipif(not DATA, reason="NANOMATH_DATA is not set: no public benchmark files")
def test_cmath_questions_have_ten_grams():
    """Chinese questions are covered by the 10-gram rule (one has 9 grams), and flag themselves."""
    texts = read_benchmark(Path(DATA) / "cmath_test.jsonl")
    questions = [t for t in texts if t.name.endswith(":question")]
    lengths = [len(grams(t.text)) for t in questions]
    assert len(lengths) == 600 and sum(n >= 10 for n in lengths) == 599 and min(lengths) == 9
    index = Decontaminator(texts)
    assert all(question.name in index.matches(question.text) for question in questions[::20])


@pytest.mark.skipif(not DATA, reason="NANOMATH_DATA is not set: no public benchmark files")
def test_documentation_holds_no_benchmark_text():
    """GSM8K and CMATH match no page of networkx's documentation; MATH, with its answers like
    {0,1,2,3,4,5,6,7,8,9}, matches a few."""
    names = ("gsm8k_test.jsonl", "cmath_test.jsonl")
    index = Decontaminator(t for name in names for t in read_benchmark(Path(DATA) / name))
    competition = Decontaminator(read_benchmark(Path(DATA) / "math_test.jsonl"))
    root = find_package("networkx")
    pages = [p for f in source_files(root) for p in parse_file(("networkx", root, f))[0]]
    assert len(pages) > 500
    assert not any(index.matches(page.text) for page in pages)
    assert sum(bool(competition.matches(page.text)) for page in pages) <= 0.02 * len(pages)
