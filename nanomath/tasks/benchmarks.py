"""Benchmarks of questions with one answer, and any JSONL of question and answer.

The files are read in the layouts their projects publish them in, from one folder (--data); a
missing one names its source. The prompts are this project's own: zero-shot, for tuned
models, asks for \\boxed{}; few-shot, for base models, shows four worked examples that end with
"The answer is ...". The judge is judge/answers.py.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from nanomath.base.files import read_jsonl, text_field
from nanomath.judge.answers import is_equivalent, is_readable, is_strict, read_answer
from nanomath.judge.answers import same_answer as same_readings
from nanomath.judge.copying import is_copied
from nanomath.judge.extraction import Extraction, extract_answer
from nanomath.tasks import Problem, Verdict


@dataclass(frozen=True)
class Benchmark:
    """A file and its fields; answer may be a solution that ends with #### or a \\boxed{}."""

    file: str
    source: str
    question: str = "question"
    answer: str = "answer"
    body: str = ""  # a field that comes before the question
    groups: tuple[str, ...] = ()  # fields that figures are also given by
    chinese: bool = False


_DEEPSEEK = "github.com/deepseek-ai/DeepSeek-Math, evaluation/datasets"
_TORA = "github.com/microsoft/ToRA, src/data"
_QWEN = "github.com/QwenLM/Qwen2.5-Math, evaluation/data"
_DOWNLOAD = "`python -m nanomath.hub.download {}`"
BENCHMARKS = {
    "gsm8k": Benchmark("gsm8k_test.jsonl", _DOWNLOAD),
    "math": Benchmark(
        "math_test.jsonl", _DOWNLOAD, "problem", "solution", groups=("level", "type")
    ),
    "cmath": Benchmark("cmath_test.jsonl", _QWEN, groups=("grade",), chinese=True),
    "mgsm_zh": Benchmark("mgsm_zh.jsonl", _DEEPSEEK, "messages", chinese=True),
    "gaokao_cloze": Benchmark("gaokao_mathcloze.jsonl", _DEEPSEEK, chinese=True),
    "gaokao_qa": Benchmark("gaokao_mathqa.jsonl", _DEEPSEEK, answer="label", chinese=True),
    "sat": Benchmark("sat_test.jsonl", _DEEPSEEK, answer="Answer"),
    "mmlu_stem": Benchmark("mmlu_stem_test.jsonl", _DEEPSEEK, groups=("topic",)),
    "ocw": Benchmark("ocw_test.jsonl", _DEEPSEEK, "problem"),
    "asdiv": Benchmark("asdiv_test.jsonl", _TORA, body="body"),
    "svamp": Benchmark("svamp_test.jsonl", _TORA, "Question", "Answer", body="Body"),
    "mawps": Benchmark("mawps_test.jsonl", _QWEN, "input", "target"),
}

_ZERO_SHOT = (
    "{}\nReason step by step, and put the final answer inside \\boxed{{}}.\n",
    "{}\n请一步一步地推理,并把最后的答案写在 \\boxed{{}} 里。\n",
)
_ASK_FOR_LETTER = ("The answer is the letter of one option.", "答案是选项的字母。")
_QUESTION = ("Question: {}\nAnswer:", "问题:{}\n解答:")
# Where a base model begins the next question after a few-shot answer.
STOPS = ("\nQuestion:", "\n问题:", "\n问题：")
# What comes before the question in a few-shot prompt, in the layout of _QUESTION. Written for this
# project: whole numbers, a fraction, a root, a set.
_SHOWN = (
    """\
Question: A shelf has 4 rows of 12 jars. Mia takes away 8 jars and fills half of the rest. How \
many jars does she fill?
Answer: There are 4 * 12 = 48 jars. After 8 are taken away, 48 - 8 = 40 are left. Half of them is \
40 / 2 = 20. The answer is 20.

Question: A bag holds 3 red and 5 blue marbles. Two are drawn without putting any back. What is \
the probability that both are red?
Answer: The first is red with probability $\\frac{3}{8}$ and then the second with probability \
$\\frac{2}{7}$. Together $\\frac{3}{8} \\cdot \\frac{2}{7} = \\frac{3}{28}$. The answer is \
$\\frac{3}{28}$.

Question: What is the diagonal of a rectangle with sides 2 and 6?
Answer: By Pythagoras it is $\\sqrt{2^2 + 6^2} = \\sqrt{40} = 2\\sqrt{10}$. The answer is \
$2\\sqrt{10}$.

Question: Find all $x$ with $x^2 - x = 12$.
Answer: $x^2 - x - 12 = (x - 4)(x + 3)$, which is 0 for $x = 4$ and for $x = -3$. The answer is \
$-3, 4$.

""",
    """\
问题:食堂运来6袋大米,每袋25千克,吃掉了40千克,还剩多少千克?
解答: 一共运来 6 × 25 = 150 千克。吃掉40千克后还剩 150 - 40 = 110 千克。答案是110。

问题:一本书有120页,小华第一天看了全书的1/4,第二天看了全书的1/3,两天一共看了全书的几分之几?
解答: 两天一共看了 1/4 + 1/3 = 3/12 + 4/12 = 7/12。答案是7/12。

问题:一个长方形的长是8.5厘米,宽是4厘米,它的周长是多少厘米?
解答: 周长是 2 × (8.5 + 4) = 2 × 12.5 = 25 厘米。答案是25。

问题:已知 $x>0$ 且 $x^2=18$,求 $x$。
解答: 因为 $x>0$,所以 $x=\\sqrt{18}=3\\sqrt{2}$。答案是$3\\sqrt{2}$。

""",
)


def make_prompt(question: str, *, few_shot: bool = False, chinese: bool = False) -> str:
    if not few_shot:
        return _ZERO_SHOT[chinese].format(question)
    return _SHOWN[chinese] + _QUESTION[chinese].format(question)


def read_benchmark(
    name: str, folder: str | os.PathLike, *, few_shot: bool = False
) -> list[Problem]:
    """Read a benchmark's problems. Raises FileNotFoundError, which names the source, ValueError."""
    benchmark = BENCHMARKS[name]
    path = Path(folder) / benchmark.file
    if not path.is_file():
        source = benchmark.source.format(name)
        raise FileNotFoundError(
            f"{path}: no such file; it comes from {source}; --data names its folder"
        )

    def read(row: dict) -> tuple[str, dict]:
        gold = gold_answer(text_field(row, benchmark.answer, number=True))
        groups = {key: str(row[key]) for key in benchmark.groups if key in row}
        question = _question(benchmark, row)
        prompt = make_prompt(question, few_shot=few_shot, chinese=benchmark.chinese)
        return prompt, {"answer": gold, **groups}

    return [Problem(number, name, *asked) for number, asked in read_jsonl(path, read=read)]


def _question(benchmark: Benchmark, row: dict) -> str:
    """Return what is asked: body, question, and choices with their letters."""
    messages = row.get(benchmark.question)
    if isinstance(messages, list) and messages and isinstance(messages[0], dict):
        question = text_field(messages[0], "content")  # the user's first
    else:
        question = text_field(row, benchmark.question)
    options = row.get("options")
    if isinstance(options, list):  # SAT's are one text
        marked = all(re.match(r"\(?[A-J]\)", str(option)) for option in options)
        marks = [""] * len(options) if marked else [f"({letter}) " for letter in "ABCDEFGHIJ"]
        options = "\n".join(f"{mark}{option}" for mark, option in zip(marks, options))
    asked = _ASK_FOR_LETTER[benchmark.chinese] if options else None
    parts = (row.get(benchmark.body), question, options, asked)
    return "\n".join(str(part) for part in parts if part)


def read_own(
    path: str | os.PathLike, *, few_shot: bool = False, task: str = "jsonl", with_row: bool = False
) -> list[Problem]:
    """Read a user's JSONL of question (or problem) and answer (or solution).

    with_row: payload["row"] is the whole line, with whatever fields a reward of the user's needs.
    """

    def read(row: dict) -> tuple[str, dict]:
        question = _own_field(row, "question", "problem")
        gold = gold_answer(_own_field(row, "answer", "solution", number=True))
        chinese = re.search("[\u4e00-\u9fff]", question) is not None
        # One in ten is never trained on: by the question's hash, whatever file it is in.
        digest = hashlib.blake2b(question.encode("utf-8", "surrogatepass")).digest()
        split = "train" if digest[0] % 10 else "heldout"
        payload = {"answer": gold, "split": split} | ({"row": row} if with_row else {})
        return make_prompt(question, few_shot=few_shot, chinese=chinese), payload

    return [Problem(number, task, *asked) for number, asked in read_jsonl(path, read=read)]


def _own_field(row: dict, *keys: str, number: bool = False) -> str:
    """Return the first of the fields that holds something."""
    present = [key for key in keys if key in row]
    if not present:
        raise ValueError(
            f"wanted question (or problem) and answer (or solution), found {sorted(row)[:8]}"
        )
    filled = [key for key in present if row[key] not in (None, "")]
    return text_field(row, (filled or present)[0], number=number)


def read_splits(path: str | os.PathLike) -> tuple[list[Problem], list[Problem]]:
    """Return the problems of a user's JSONL to train on and those held out, with their rows. Raises
    ValueError where there is none of either."""
    splits: dict[str, list[Problem]] = {"train": [], "heldout": []}
    for problem in read_own(path, with_row=True):
        splits[problem.payload["split"]].append(problem)
    for split, problems in splits.items():
        if not problems:
            raise ValueError(
                f"{path}: by their hash one problem in ten is held out, the others are trained on, "
                f"and none falls into the {split} split; give more problems"
            )
    return splits["train"], splits["heldout"]


def gold_answer(text: str) -> str:
    """Return the answer that a field holds: itself, or the end of a worked solution."""
    found = extract_answer(text)
    return found.answer if found.rule in ("####", "boxed") else text.strip()


def unreadable_references(problems: list[Problem], path: str | os.PathLike) -> list[str]:
    """Return a line that says how many references cannot be judged by, if there are any."""
    unread = [problem for problem in problems if not is_readable(problem.payload["answer"])]
    if not unread:
        return []
    shown = repr(unread[0].payload["answer"][:60])  # without control characters
    return [
        f"{path}: {len(unread)} of {len(problems)} references cannot be judged: they count as "
        f"strings alone and give no answer reward; the first is {path}:{unread[0].id}: {shown}"
    ]


# ----------------------------------------------------------------------------------------- judge


def is_few_shot(problem: Problem) -> bool:
    return problem.prompt.startswith(_SHOWN)


def find_answer(problem: Problem, completion: str, *, reward: bool = False) -> Extraction:
    """Return the answer of a completion and the rule that found it: verdict and vote read this one.

    What comes after the beginning of another question (STOPS) does not count. A chat model may
    restate its question: then nothing is cut, nor where a zero-shot prompt's answer comes later.
    The last formula answers only for a base model, asked by a few-shot prompt, and for no reward.
    """
    few_shot = is_few_shot(problem)
    first_line = _asked(problem).strip().partition("\n")[0]
    for stop in STOPS:
        before, found, after = completion.partition(stop)
        restated = bool(first_line) and after.lstrip(" *\n").startswith(first_line)
        if found and not restated and (few_shot or extract_answer(before).answer):
            completion = before
    return extract_answer(completion, last_math=few_shot and not reward)


def can_judge(problem: Problem) -> bool:
    """Say whether the problem has a reference that the judge can read."""
    reference = problem.payload.get("answer")
    return isinstance(reference, str) and is_readable(reference)


def _asked(problem: Problem) -> str:
    """Return the question, and the request after it, without the examples before it."""
    prompt = problem.prompt
    for shown, layout in zip(_SHOWN, _QUESTION, strict=True):
        prompt = prompt.removeprefix(shown + layout.partition("{}")[0])
    return prompt


def judge(problem: Problem, completion: str, *, reward: bool = False) -> Verdict:
    """Judge one output: right is an answer that equals the reference and is not a copy of the
    question (copying.py). Its marks: strict (the reference's very string, spacing and spelling
    apart), format (there is an answer) and last_math (its last formula is its answer).

    Its vote is the judge's own reading; an answer that is not read votes as its string ("Monday").
    A right answer and a copy of the question with its value are told apart by their verdicts, see
    group_answers.
    """
    found, gold = find_answer(problem, completion, reward=reward), problem.payload["answer"]
    marks = {"format": found.answer is not None, "last_math": found.rule == "last math"}
    if found.answer is None:
        return Verdict(False, None, {"strict": False, **marks})
    is_right = is_equivalent(found.answer, gold)
    is_right = is_right and not is_copied(found.answer, _asked(problem), gold)
    strict = is_strict(found.answer, gold)
    return Verdict(is_right, read_answer(found.answer), {"strict": strict, **marks})


# The judge's own comparison: two answers that it calls equal vote together.
same_answer = same_readings


def stop_texts(problem: Problem) -> tuple[str, ...]:
    return STOPS if is_few_shot(problem) else ()
