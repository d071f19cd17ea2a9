"""README's first screen: what is replaced, and which rollout it shows."""

from pathlib import Path

import pytest

from dev import first_screen


def example(name: str, *, correct: bool) -> dict:
    return {"prompt": "Numbers: 1 2 3\n", "text": f"{name}\n<answer>", "correct": correct}


def test_only_what_is_between_the_marks_is_replaced():
    """The section takes the old one's place, all else stays, and a second time changes nothing."""
    begin, end = first_screen.MARKS
    before = f"# top\n\n{begin}old\n{end}\n## more\n"
    after = first_screen.replaced(before, "new\n")
    assert after == f"# top\n\n{begin}new\n{end}\n## more\n"
    assert first_screen.replaced(after, "new\n") == after
    readme = (Path(first_screen.ROOT) / "README.md").read_text(encoding="utf-8")
    assert "new\n" in first_screen.replaced(readme, "new\n")  # README has the marks
    for broken in ("# top\n", f"{begin}{begin}{end}"):
        with pytest.raises(ValueError, match="once"):
            first_screen.replaced(broken, "new\n")


def test_the_rollout_is_the_first_that_grpo_mended():
    """Wrong before and right after, both outputs set off as code; none, where there is none."""
    right = {
        f"{model}{i}": example(f"{model}{i}", correct=i != 1) for model in "sg" for i in (0, 1)
    }
    evals = {
        "sft": {"examples": [right["s0"], right["s1"], right["s1"]]},
        "grpo": {"examples": [right["g0"], right["g1"], right["g0"]]},
    }
    text = first_screen.rollout(evals)
    assert text.splitlines()[2:] == [
        *("    Numbers: 1 2 3", "", "    SFT:", "    s1", "    <answer>", ""),
        *("    GRPO:", "    g0", "    <answer>"),
    ]
    assert first_screen.rollout({"sft": evals["sft"], "grpo": evals["sft"]}) == ""
