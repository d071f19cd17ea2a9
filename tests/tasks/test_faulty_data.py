r"""Records that cannot be judged or trained on are named with the cure, and skipped."""

import json

import pytest

from nanomath.base.files import damaged_latex, read_examples, text_field
from nanomath.judge.answers import is_readable
from nanomath.rewards import answer_reward
from nanomath.tasks import benchmarks
from nanomath.tasks.benchmarks import BENCHMARKS, read_benchmark, read_own, unreadable_references

NULL = "'answer' is null: give a text, or remove the line"
EMPTY = "'answer' is an empty text: fill it in, or remove the line"
A_LIST = "'answer' is a list: give one text, \"3, 5\" for two answers, or remove the line"
# A line of a file, and what is said of it.
BAD = [
    ('{"question": "q", "answer": null}', NULL),
    ('{"question": "q", "answer": null, "solution": ""}', NULL),
    ('{"question": "q", "answer": []}', A_LIST),
    ('{"question": "q", "answer": ["3", "5"]}', A_LIST),
    ('{"question": "q", "answer": ""}', EMPTY),
    ('{"question": "q", "answer": " \\n"}', EMPTY),
    ('{"question": "q", "answer": {"a": 1}}', "'answer' is an object: give a text"),
    ('{"question": "q", "answer": true}', "'answer' is true or false: give a text"),
    ('{"question": "q", "answer": NaN}', "'answer' is nan: give a number or a text"),
    ('{"question": "q", "answer": Infinity}', "'answer' is inf: give a number or a text"),
    ('{"question": "q", "answer": -1e999}', "'answer' is -inf: give a number or a text"),
    ('{"question": null, "answer": "1"}', "'question' is null: give a text"),
    ('{"question": [], "answer": "1"}', "'question' is a list: give one text"),
    ('{"question": ["q"], "answer": "1"}', "'question' is a list: give one text"),
    ('{"question": "", "answer": "1"}', "'question' is an empty text: fill it in"),
    ('{"question": 5, "answer": "1"}', "'question' is a number: give a text"),
    ('{"question": {}, "answer": "1"}', "'question' is an object: give a text"),
    ('{"problem": "q"}', "and answer (or solution), found ['problem']"),
    (r'{"question": "What is $\frac12$?", "answer": "1"}', r"'question' holds a control character "
     r"where \frac was meant: double the backslash of LaTeX in JSON, \\frac"),
    (r'{"question": "q", "answer": "\frac{1}{2}"}', r"'answer' holds a control character where "
     r"\frac was meant: double the backslash of LaTeX in JSON, \\frac"),
    (r'{"question": "q", "answer": "\\pi \times 2"}', r"where \times was meant"),
    (r'{"question": "q", "solution": "so \boxed{5}"}', r"'solution' holds a control character "
     r"where \boxed was meant"),
    (r'{"question": "q", "answer": "\sqrt2"}', r"in JSON every backslash of LaTeX is doubled: \\s"),
    (r'{"question": "q", "answer": "\underline{2}"}', r"every backslash of LaTeX is doubled"),
    ('{"question": "q", "answer": ', "not JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "said"), BAD)
def test_bad_records_are_skipped_as_broken_lines_are(tmp_path, capsys, line, said):
    """One in 200 is named with file, line and cure, and skipped; alone it is refused with the same
    words."""
    path = tmp_path / "own.jsonl"
    good = [json.dumps({"question": f"q{i}", "answer": i}) for i in range(200)]
    path.write_text("\n".join([*good[:50], line, *good[50:]]))
    problems = read_own(path)
    assert [problem.payload["answer"] for problem in problems] == [str(i) for i in range(200)]
    assert [problem.id for problem in problems] == [*range(1, 51), *range(52, 202)]
    assert len(benchmarks.read_splits(path)[0]) > 150
    shown = capsys.readouterr().err
    assert "skipped 1 of 201 lines" in shown and f"{path}:51: " in shown and said in shown
    path.write_text(line + "\n")
    with pytest.raises(ValueError) as caught:
        read_own(path)
    assert f"{path}:1: " in str(caught.value) and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_field_that_holds_something_is_taken(tmp_path):
    """Where one of two names is empty the other counts; NaN in another field is no matter."""
    path = tmp_path / "own.jsonl"
    rows = [
        {"question": "", "problem": "p", "answer": None, "solution": r"so \boxed{5}"},
        {
            "question": "q",
            "problem": None,
            "answer": 0,
            "solution": "#### 7",
            "score": float("nan"),
        },
        {"question": "q", "answer": 0.5},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [problem.payload["answer"] for problem in read_own(path)] == ["5", "0", "0.5"]


def test_benchmarks_and_worked_solutions_are_checked_alike(tmp_path, capsys):
    """A benchmark's faulty record and a faulty example for SFT are named and skipped, too."""
    file = tmp_path / BENCHMARKS["gsm8k"].file
    row = {"question": "q", "answer": "#### 1"}
    for bad in ({**row, "answer": None}, {**row, "question": []}, {**row, "question": "\x0crac12"}):
        file.write_text("".join(json.dumps(r) + "\n" for r in [*[row] * 150, bad]))
        assert len(read_benchmark("gsm8k", tmp_path)) == 150
        assert f"{file}:151: '" in capsys.readouterr().err
        assert len(read_examples(file)) == 150
        assert f"{file}:151: '" in capsys.readouterr().err
    file.write_text(json.dumps({"prompt": "", "solution": "x"}) + "\n")
    assert read_examples(file) == [("", "x")]
    file.write_text(json.dumps({"prompt": "x", "solution": ""}) + "\n")
    with pytest.raises(ValueError, match=":1: 'solution' is an empty text"):
        read_examples(file)


DAMAGED = {  # as JSON reads "\frac", "\theta", ...
    "\x0crac12": r"\frac", "\x0corall x": r"\forall", "\x0cbox{5}": r"\fbox",
    "\x08eta": r"\beta", "\x08oxed{5}": r"\boxed", "\x08inom{3}{2}": r"\binom",
    "\x08egin{matrix}": r"\begin", "\x08igcup_i": r"\bigcup", "\x08ar x": r"\bar",
    "\theta": r"\theta", "2 \times 3": r"\times", "\text{cm}": r"\text", "\textbf{a}": r"\textbf",
    "\tan x": r"\tan", "\tan(2)": r"\tan", "\tfrac12": r"\tfrac",
    "x\to 0": r"\to", "\triangle ABC": r"\triangle", "\tau": r"\tau", "\top": r"\top",
    "\rho": r"\rho", "\right)": r"\right", "a \rightarrow b": r"\rightarrow", "\rangle": r"\rangle",
    "x \neq 3": r"\neq", "\nabla f": r"\nabla", "x \notin A": r"\notin", "x \nleq 3": r"\nleq",
}  # fmt: skip
ORDINARY = (
    *("\\frac12", "a\tb\tc", "total\tan apple", "\tand so", "\tother", "\tto do", "\ttext"),
    *(
        "page one\x0cRead on",
        "\x0cfrom here",
        "one\r\night two",
        "one\ru",
        "Let\nu = 3",
        "and\neither",
    ),
    *(
        "it is\not so",
        "there\nexists x",
        "\nequal",
        "\ne = 2",
        "\nitems",
        "a\r\nright",
        "\\theta\n",
    ),
)


def test_damaged_latex():
    """A control character and the rest of a command's name are that command; white space before
    ordinary words is white space."""
    assert {text: damaged_latex(text) for text in DAMAGED} == DAMAGED
    assert [text for text in ORDINARY if damaged_latex(text)] == []
    for text, command in DAMAGED.items():
        with pytest.raises(ValueError, match="double the backslash") as caught:
            text_field({"answer": f"so {text}"}, "answer")
        assert f"where {command} was meant" in str(caught.value)
        assert text_field({"answer": f"so {command} 5"}, "answer") == f"so {command} 5"


def test_missing_values_are_no_references(tmp_path):
    """What programs write for a missing value earns nothing; words do."""
    for text in ("nan", "NaN", "null", "N/A", "na", r"\text{nan}", r"\int_0 {"):
        assert not is_readable(text), text
        asked = benchmarks.Problem(0, "jsonl", "q", {"answer": text})
        assert answer_reward(asked, rf"\boxed{{{text}}}") is None
    for text in ("none", "Nan Goldin", "Monday", "no solution", "5", r"\infty", "n", "nanometre"):
        assert is_readable(text), text


def test_unreadable_references_are_announced(tmp_path):
    """One line says how many of how many references cannot be judged, and where the first is."""
    path = tmp_path / "own.jsonl"
    answers = ["1", "nan", "Monday", r"\int_0 {" + "\u4e2d" * 200, r"\frac12"]
    rows = [{"question": f"q{i}", "answer": answer} for i, answer in enumerate(answers)]
    path.write_text("\n".join(json.dumps(row) + "\n" for row in rows))
    (note,) = unreadable_references(read_own(path), path)
    assert note.startswith(f"{path}: 2 of 5 references cannot be judged: ")
    assert note.endswith(f"the first is {path}:3: 'nan'")
    assert unreadable_references(read_own(path)[::4], path) == []
    (note,) = unreadable_references(read_own(path)[3:4], path)
    assert f"{path}:7: " in note and len(note) < 400
