"""evaluate.py: resuming by problems, what starts anew, files, bad input, several processes."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

import evaluate
from nanomath.base.config import parse
from nanomath.dist import setup
from nanomath.engine import stream as sampler
from nanomath.hub import hf
from nanomath.measure import evaluation
from nanomath.model import ModelConfig, Transformer
from nanomath.run import checkpoint, load, presets
from nanomath.run.guard import wait_for_all
from nanomath.tasks import benchmarks
from nanomath.tasks.countdown import RANGES, generate, split_of, worked_solution
from nanomath.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dist():
    return setup("cpu", 1)


@pytest.fixture
def run_folder(tmp_path, dist):
    """A run folder whose checkpoint holds a small random model."""
    problems = generate(50, RANGES["smoke"])
    tokenizer = Tokenizer.train([p.prompt + worked_solution(p) for p in problems], 290)
    save_checkpoint(tmp_path / "run", 1, tokenizer, dist, seed=0)
    return tmp_path / "run"


def save_checkpoint(folder, step, tokenizer, dist, *, seed):
    cfg = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=1,
        width=16,
        num_heads=2,
        num_kv_heads=2,
        ffn_width=32,
    )
    model = Transformer(cfg)
    model.init_weights(seed)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.Checkpoints(folder, {"model": model}, optimizer, tokenizer, dist).save(step, {})


def config(run_folder, **changes):
    cfg = parse(evaluate.EvalConfig, presets.EVALUATION, ["--preset", "smoke", "--threads", "1"])
    fields = {"num_problems": 10, "num_samples": 2, "max_new_tokens": 6}
    paths = {"checkpoint": str(run_folder), "out": str(run_folder.parent / "figures.json")}
    return dataclasses.replace(cfg, **{**fields, **paths, **changes})


def counted_problems(monkeypatch, *, stop_after=None):
    """List the problems that are sampled; raise KeyboardInterrupt after stop_after of them."""
    sampled = []
    real = evaluate.sample_problems

    def sample_problems(model, tokenizer, problems, *, temperature, **settings):
        for at, judged in real(model, tokenizer, problems, temperature=temperature, **settings):
            if temperature > 0.0:
                if len(sampled) == stop_after:
                    raise KeyboardInterrupt
                sampled.append(problems[at].id)
            yield at, judged

    monkeypatch.setattr(evaluate, "sample_problems", sample_problems)
    return sampled


def test_interrupted_evaluation_continues_to_the_same_file(run_folder, dist, monkeypatch, capsys):
    """Problems finished before an interruption are not sampled again, whatever process wrote them
    and though its last line was cut; the result is the same."""
    whole = config(run_folder, out=str(run_folder.parent / "whole.json"))
    evaluate.run(whole, dist)
    cfg = config(run_folder)
    with monkeypatch.context() as patch:
        done = counted_problems(patch, stop_after=7)
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(cfg, dist)
    assert not Path(cfg.out).exists()
    records = Path(cfg.out + ".parts") / "rank-0.jsonl"
    lines = records.read_text().splitlines(True)
    assert len(lines) == 1 + 10 + 7
    for name, kept in ((5, lines[:9]), (0, [*lines[9:-1], lines[-1][:-9]])):
        records.with_name(f"rank-{name}.jsonl").write_text("".join(kept))
    with monkeypatch.context() as patch:
        again = counted_problems(patch)
        evaluate.run(cfg, dist)
        assert len(again) == 4 and {*again} & {*done} == {done[-1]}
    first, second = (json.loads(Path(c.out).read_text()) for c in (whole, cfg))
    first["settings"].pop("out")
    second["settings"].pop("out")
    assert first == second
    shown = [Path(c.out).with_suffix(".samples.txt").read_text() for c in (whole, cfg)]
    assert shown[0] == shown[1]
    assert not Path(cfg.out + ".parts").exists()
    printed = capsys.readouterr().out
    assert "pass@2" in printed and "| format_failures |" in printed  # Countdown asks for one


def test_one_stream_runs_through_all_problems(run_folder, dist, monkeypatch):
    """Rows go on to the next problems, and however many there are the figures are the same."""
    asked, real = [], evaluation.sample_stream

    def stream(model, prompts, group_size, **settings):
        asked.append((len(prompts), group_size))
        return real(model, prompts, group_size, **settings)

    monkeypatch.setattr(evaluation, "sample_stream", stream)
    results = []
    for size in (4, 64):
        cfg = config(run_folder, max_rows=size, out=str(run_folder / f"{size}"))
        evaluate.run(cfg, dist)
        results.append(json.loads(Path(cfg.out).read_text()))
    assert asked == [(10, 1), (10, 2)] * 2
    assert results[0]["problems"] == results[1]["problems"]


@pytest.mark.parametrize(("world_size", "num_problems"), [(2, 10), (3, 10), (8, 5)])
def test_ranks_share_the_problems_evenly(run_folder, dist, monkeypatch, world_size, num_problems):
    """Each problem is sampled by one rank, and no rank has two more than another, whether an
    evaluation begins or goes on; the figures are those of one process."""
    whole = config(run_folder, num_problems=num_problems, out=str(run_folder / "whole.json"))
    evaluate.run(whole, dist)
    cfg = dataclasses.replace(whole, out=str(run_folder / "shared.json"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted_problems(patch, stop_after=2)
        evaluate.run(cfg, dist)
    loaded, folder = evaluate.open_model(cfg, dist), Path(cfg.out + ".parts")
    problems, _ = evaluate.load_problems(cfg, "countdown")
    run_hash = evaluate.evaluation_hash(cfg, *loaded[:2], problems)
    said = []  # by rank 0, which comes first
    monkeypatch.setattr(
        evaluate, "broadcast_json", lambda value, dist: said.append(value) or said[0]
    )
    shares = []
    for rank in range(world_size):
        with monkeypatch.context() as patch:
            shares.append(counted_problems(patch))
            this = dataclasses.replace(dist, rank=rank, world_size=world_size)
            evaluate.sample_unfinished(cfg, loaded, problems, folder, run_hash, this)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == num_problems - 2
    assert len({problem for share in shares for problem in share}) == sum(sizes)
    monkeypatch.undo()
    counts = counted_problems(monkeypatch)
    evaluate.run(cfg, dist)
    results = [json.loads(Path(c.out).read_text()) for c in (whole, cfg)]
    assert results[0]["problems"] == results[1]["problems"] and not counts


def test_what_outputs_depend_on_starts_anew(run_folder, dist):
    """One weight anywhere, the model's shape, the tokenizer's ends, the template, a problem's text,
    id or answer and each setting of sampling make another evaluation; where files lie, how much is
    sampled at a time and flags that chose the same problems do not."""
    cfg = config(run_folder)
    model, tokenizer, _ = evaluate.open_model(cfg, dist)
    problems, _ = evaluate.load_problems(cfg, "countdown")
    first = evaluate.evaluation_hash(cfg, model, tokenizer, problems)
    same = {"out": "x", "checkpoint": "y", "max_rows": 1, "cache_gb": 1.0, "shown_problems": 1}
    same |= {"num_problems": 11, "all_rows": True, "threads": 2, "data": "z", "few_shot": True}
    for key, value in same.items():
        other = dataclasses.replace(cfg, **{key: value})
        assert evaluate.evaluation_hash(other, model, tokenizer, problems) == first, key
    found = {first}
    for key in evaluate.SAMPLING:
        other = dataclasses.replace(cfg, **{key: getattr(cfg, key) + 1})
        found.add(evaluate.evaluation_hash(other, model, tokenizer, problems))
    for change in ({"id": 99}, {"prompt": "p"}, {"payload": {"nums": [1], "target": 1}}):
        others = [*problems[:-1], dataclasses.replace(problems[-1], **change)]
        found.add(evaluate.evaluation_hash(cfg, model, tokenizer, others))
    found.add(evaluate.evaluation_hash(cfg, model, tokenizer, problems[::-1]))
    assert len(found) == 1 + 4 + 4
    for weight in (model.embedding.weight, model.head.weight):  # the middle, the very last
        before = weight.data[-1, -1].clone()
        weight.data[-1, -1] = torch.nextafter(before, before + 1)
        found.add(evaluate.evaluation_hash(cfg, model, tokenizer, problems))
        weight.data[-1, -1] = before
    model.cfg = dataclasses.replace(model.cfg, rope_theta=5.0)
    found.add(evaluate.evaluation_hash(cfg, model, tokenizer, problems))
    tokenizer.stop_ids += (5,)
    found.add(evaluate.evaluation_hash(cfg, model, tokenizer, problems))
    tokenizer.file = tokenizer.file.replace("<think>", "<x>")
    found.add(evaluate.evaluation_hash(cfg, model, tokenizer, problems))
    assert len(found) == 9 + 5


def test_files_of_names_with_dots_do_not_meet(run_folder, dist):
    """runs of two models named 0.5b and 1.5b write files of their own, with one task or several."""
    for name in ("eval-0.5b", "eval-0.7b.json"):
        evaluate.run(config(run_folder, out=str(run_folder / name)), dist)
    assert {path.name for path in run_folder.glob("eval-*")} == {
        *("eval-0.5b", "eval-0.5b.samples.txt", "eval-0.5b.png"),
        *("eval-0.7b.json", "eval-0.7b.samples.txt", "eval-0.7b.png"),
    }
    for name, path in (("a/x-0.5b", "a/x-0.5b-math.json"), ("a/x.json", "a/x-math.json")):
        assert evaluate.task_path(name, "math", ("math", "gsm8k")) == Path(path)


@pytest.mark.parametrize(
    "flags",
    [
        *("--num_samples -1", "--num_samples 1001", "--temperature 0", "--temperature nan"),
        *("--temperature inf", "--temperature 1e300", "--num_problems 0", "--max_rows 0"),
        *("--cache_gb -1", "--cache_gb nan", "--seed -1", f"--seed {2**63}", "--threads 1025"),
        *("--shown_problems -1", "--problem_seed -1", "--num_numbers 1", "--num_numbers 6"),
        *(
            "--max_number 0",
            "--max_target 0",
            "--max_new_tokens 0",
            "--tasks none",
            "--chat_template x",
            "--out=",
        ),
    ],
)
def test_bounds_of_the_flags(flags, capsys):
    """A value that has no meaning ends with one line that names the flag."""
    if flags == "--out=":
        assert parse(evaluate.EvalConfig, presets.EVALUATION, [flags]).out == ""  # the default
        return
    with pytest.raises(SystemExit):
        parse(evaluate.EvalConfig, presets.EVALUATION, flags.split())
    error = capsys.readouterr().err
    assert flags.split()[0] in error and error.count("\n") == 1


def test_limits_of_the_sampler_change_no_figure(run_folder, dist, monkeypatch):
    """--max_rows and --cache_gb reach the sampler; an evaluation continues under other ones."""
    evaluate.run(config(run_folder, out=str(run_folder.parent / "whole.json")), dist)
    taken, real = set(), sampler.fit_rows

    def fit_rows(*args):
        taken.add((*args[2:4], real(*args)[0]))
        return real(*args)

    monkeypatch.setattr(sampler, "fit_rows", fit_rows)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted_problems(patch, stop_after=6)
        evaluate.run(config(run_folder, max_rows=2), dist)
    assert taken == {(2, math.inf, 2)}
    taken.clear()
    with monkeypatch.context() as patch:
        counts = counted_problems(patch)
        evaluate.run(config(run_folder, cache_gb=6e-6), dist)
        assert len(counts) == 4
    assert {most[:2] for most in taken} == {(512, 6e-6)} and max(most[2] for most in taken) < 3
    first, second = (
        json.loads((run_folder.parent / f"{name}.json").read_text())
        for name in ("whole", "figures")
    )
    assert all(first[key] == second[key] for key in ("problems", "metrics", "examples"))


def test_finished_is_only_shown_and_changes_start_anew(run_folder, dist, monkeypatch, capsys):
    """Same settings and weights: nothing is sampled. Another setting or other weights: all is."""
    cfg = config(run_folder)
    evaluate.run(cfg, dist)
    before = Path(cfg.out).read_bytes()
    shown = capsys.readouterr().out
    counts = counted_problems(monkeypatch)
    evaluate.run(dataclasses.replace(cfg, shown_problems=1, threads=2), dist)
    assert counts == []
    assert Path(cfg.out).read_bytes() == before
    assert capsys.readouterr().out == shown
    evaluate.run(dataclasses.replace(cfg, seed=1), dist)
    assert len(counts) == 10
    tokenizer = Tokenizer.load(next((run_folder / "checkpoints").glob("step-*")))
    save_checkpoint(run_folder, 2, tokenizer, dist, seed=1)
    evaluate.run(dataclasses.replace(cfg, seed=1), dist)
    assert len(counts) == 20
    assert json.loads(Path(cfg.out).read_text())["step"] == 2


def test_compare_with_another_file(run_folder, dist, monkeypatch, capsys):
    """Against itself the paired difference is 0 in every metric; other problems are refused,
    before anything is sampled."""
    cfg = config(run_folder)
    evaluate.run(cfg, dist)
    other = config(run_folder, out=str(run_folder.parent / "b.json"), compare=cfg.out)
    evaluate.run(other, dist)
    difference = json.loads(Path(other.out).read_text())["difference"]
    assert set(difference) == {"greedy", "pass@1", "pass@2", "maj@1", "maj@2"}
    assert all(gain["value"] == 0.0 for gain in difference.values())
    counts = counted_problems(monkeypatch)
    with pytest.raises(SystemExit, match="not of the same problems"):
        evaluate.run(dataclasses.replace(other, problem_seed=1), dist)
    assert not counts


def test_half_a_surrogate_pair(run_folder, dist):
    """A problem and an answer that no UTF-8 can hold are evaluated and kept all the same."""
    data = run_folder.parent / "rows.jsonl"
    data.write_text(r'{"question": "1 + 2 \ud800?", "answer": "\ud800"}' + "\n")
    cfg = config(run_folder, tasks=("jsonl",), problems=str(data), all_rows=True)
    evaluate.run(cfg, dist)
    assert json.loads(Path(cfg.out).read_text())["problems"][0]["answer"] == "\ud800"


def test_samples_cannot_forge_lines_or_drive_a_terminal():
    """Model text is set off line by line, with control characters escaped."""
    output = {"text": "a\x1b[2J\rb\nproblem 7 {}", "length": 3, "finished": False}
    output |= {"correct": False, "format": False, "class": None}
    record = {"id": 4, "payload": {}, "prompt": "P\n", "greedy": output, "samples": []}
    page = evaluate.sample_pages([record])
    assert "    | a\\x1b[2J\\x0db\n    | problem 7 {}" in page
    assert "greedy: correct 0, format 0, 3 tokens, truncated" in page
    assert [line for line in page.split("\n") if line.startswith("problem")] == ["problem 4 {}"]


def test_data_file(run_folder, dist, capsys):
    """--problems evaluates on all held-out rows of a file, on those of the training split only if
    asked to, on fewer only if asked to; what is left out is counted, bad rows are named."""
    data = run_folder.parent / "rows.jsonl"
    rows = [{"nums": [a, b], "target": a + b} for a in range(1, 31) for b in range(a, 31)]
    heldout = [row for row in rows if split_of(row["nums"], row["target"]) == "heldout"]
    assert 20 < len(heldout) < 100
    lines = [json.dumps(row) for row in [{"nums": [1, 2], "target": 50}, *rows]]
    data.write_text("\n".join(lines))
    cfg = config(run_folder, problems=str(data), num_problems=None, num_samples=1, max_new_tokens=2)

    def evaluated(**changes):
        evaluate.run(dataclasses.replace(cfg, **changes), dist)
        problems = json.loads(Path(cfg.out).read_text())["problems"]
        rows = [{"nums": problem["nums"], "target": problem["target"]} for problem in problems]
        printed = capsys.readouterr()
        assert "rows.jsonl:1: 50 cannot be reached from [1, 2]" in printed.err
        return rows, printed.out

    found, printed = evaluated()
    assert found == heldout
    left = len(rows) - len(heldout)
    assert f"{left} of {len(rows)} problems left out, of the training split" in printed
    assert evaluated(num_problems=7)[0] == [heldout[i * len(heldout) // 7] for i in range(7)]
    found, printed = evaluated(all_rows=True)
    assert found == rows
    assert "of the training split" not in printed


@pytest.fixture
def benchmark_files(run_folder):
    """A folder with two GSM8K rows, two MATH rows and a user's file of three."""
    folder = run_folder.parent
    gsm8k = [{"question": "1+1?", "answer": "So.\n#### 2"}, {"question": "?", "answer": "#### 3"}]
    math = [
        {"problem": "a", "solution": r"\boxed{\frac12}", "level": "Level 1", "type": "Algebra"},
        {"problem": "b", "solution": r"\boxed{7}", "level": "Level 5", "type": "Geometry"},
    ]
    own = [{"question": f"q{i}", "answer": str(i)} for i in range(3)]
    for name, rows in (("gsm8k_test", gsm8k), ("math_test", math), ("own", own)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def test_several_tasks(run_folder, benchmark_files, dist, monkeypatch, capsys):
    """Each task has files of its own and a line in the last table; adding one keeps the others;
    the difference to another checkpoint is paired task by task."""
    paths = {"data": str(benchmark_files), "problems": str(benchmark_files / "own.jsonl")}
    paths["all_rows"] = True
    cfg = config(run_folder, num_samples=2, max_new_tokens=3, **paths)
    tasks = ("gsm8k", "math", "jsonl")
    no_own = {"problems": None, "all_rows": False}
    evaluate.run(dataclasses.replace(cfg, tasks=tasks[:2], **no_own), dist)
    counts = counted_problems(monkeypatch)
    cfg = dataclasses.replace(cfg, tasks=tasks)
    evaluate.run(cfg, dist)
    assert len(counts) == 3  # the new task alone
    printed = capsys.readouterr().out
    assert printed.count("| strict | last_math |") == 5 and "format" not in printed
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in printed.splitlines()]
    assert rows[-5][0] == "task" and rows[-3:] == [["gsm8k", "2"], ["math", "2"], ["jsonl", "3"]]
    for task in tasks:
        file = benchmark_files / f"figures-{task}.json"
        result = json.loads(file.read_text())
        assert (result["task"], result["num_samples"]) == (task, 2)
        assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert "prompt" not in result["problems"][0]
    result = json.loads((benchmark_files / "figures-math.json").read_text())
    assert {label: row["problems"] for label, row in result["groups"]["level"].items()} == {
        "Level 1": 1,
        "Level 5": 1,
    }
    assert set(result["groups"]) == {"level", "type"}
    other = dataclasses.replace(cfg, out=str(benchmark_files / "b.json"), compare=cfg.out)
    evaluate.run(other, dist)
    for task in tasks:
        difference = json.loads((benchmark_files / f"b-{task}.json").read_text())["difference"]
        assert difference["pass@2"]["value"] == 0.0
    with pytest.raises(SystemExit, match="not of the same problems"):
        evaluate.run(dataclasses.replace(other, num_problems=1), dist)


def test_rows_that_grpo_trained_on_are_left_out(run_folder, benchmark_files):
    """Of a user's file the rows that train_grpo.py holds out, however the prompt is worded, and a
    note of the others; --all_rows takes all."""
    file = benchmark_files / "own.jsonl"
    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(100)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [problem.id for problem in benchmarks.read_splits(file)[1]]
    assert 4 <= len(held_out) <= 20
    for few_shot in (False, True):
        cfg = config(run_folder, problems=str(file), few_shot=few_shot, num_problems=None)
        problems, notes = evaluate.load_problems(cfg, "jsonl")
        assert [problem.id for problem in problems] == held_out
        assert f"{100 - len(held_out)} of 100 problems left out" in notes[0]
    problems, notes = evaluate.load_problems(dataclasses.replace(cfg, all_rows=True), "jsonl")
    assert (len(problems), notes) == (100, [])
    rows[7]["answer"] = "nan"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, notes = evaluate.load_problems(dataclasses.replace(cfg, all_rows=True), "jsonl")
    assert len(notes) == 1
    assert "1 of 100 references cannot be judged" in notes[0] and f"{file}:8: 'nan'" in notes[0]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    with pytest.raises(ValueError, match="--all_rows"):
        evaluate.load_problems(cfg, "jsonl")


def test_hugging_face_folder(run_folder, benchmark_files, dist, monkeypatch):
    """An exported model is evaluated from its folder, to the same figures as its run. Nothing is
    ever written there: the figures go to runs/evaluation, and --out there is refused."""
    monkeypatch.chdir(benchmark_files)
    model, tokenizer, _ = load.load_model(run_folder)
    hf.save_hf(model, tokenizer, benchmark_files / "exported", dtype=torch.float32)
    cfg = config(run_folder, tasks=("math",), data=str(benchmark_files), few_shot=False)
    results = []
    before = {path.name: path.read_bytes() for path in Path("exported").iterdir()}
    for folder, to in ((run_folder, run_folder), ("exported", "runs/evaluation/exported")):
        evaluate.run(dataclasses.replace(cfg, checkpoint=str(folder), out=""), dist)
        results.append(json.loads((Path(to) / "evaluation-math.json").read_text()))
    for out in ("exported/a.json", f"{benchmark_files}/exported/deep/a.json"):
        with pytest.raises(SystemExit, match="would be in the model's folder: give --out"):
            evaluate.run(dataclasses.replace(cfg, checkpoint="exported", out=out), dist)
    assert {path.name: path.read_bytes() for path in Path("exported").iterdir()} == before
    for place in ("../x/exported", "/x/exported"):
        monkeypatch.setattr(evaluate, "is_hf_folder", lambda path: True)
        path = evaluate.out_path(dataclasses.replace(cfg, checkpoint=place, out=""), "math")
        assert path == Path("runs/evaluation/x/exported/evaluation-math.json")
    assert results[0]["examples"] == results[1]["examples"]
    assert results[0]["problems"] == results[1]["problems"]


def test_some_problems_of_a_benchmark_are_spread_over_it(run_folder, benchmark_files):
    """--num_problems takes them evenly through the file, which may be sorted by subject."""
    rows = [json.dumps({"question": f"q{i}", "answer": "1"}) for i in range(10)]
    (benchmark_files / "own.jsonl").write_text("\n".join(rows))
    for count, expected in ((3, [0, 3, 6]), (10, list(range(10))), (None, list(range(10)))):
        own = {"problems": str(benchmark_files / "own.jsonl"), "all_rows": True}
        cfg = config(run_folder, num_problems=count, **own)
        problems, _ = evaluate.load_problems(cfg, "jsonl")
        assert [problem.prompt.split("\n")[0] for problem in problems] == [
            f"q{i}" for i in expected
        ]


def test_missing_benchmark_names_its_source(run_folder, dist, tmp_path):
    """A benchmark file that is not there ends with its path, its source and the flag."""
    for task, source in (("gsm8k", "python -m nanomath.hub.download gsm8k"), ("cmath", "QwenLM")):
        cfg = config(run_folder, tasks=(task,), data=str(tmp_path / "empty"))
        with pytest.raises(
            SystemExit, match=f"{task}_test.jsonl: no such file; .*{source}.*--data"
        ):
            evaluate.run(cfg, dist)
    with pytest.raises(SystemExit, match="--tasks jsonl needs --problems"):
        evaluate.run(config(run_folder, tasks=("jsonl",)), dist)


def test_command_line_takes_all_of_a_file():
    """No preset but smoke limits the rows of --problems; without it there are 1000 problems."""
    for name in ("", "gpu", "countdown_qwen_3b", "cpu"):
        cfg = parse(evaluate.EvalConfig, presets.EVALUATION, ["--preset", name] if name else [])
        assert cfg.num_problems is None
    assert len(evaluate.load_problems(cfg, "countdown")[0]) == 1000


def test_data_without_heldout_rows_is_refused(run_folder, dist):
    """A file of the training split alone is no evaluation set, unless --all_rows says so."""
    data = run_folder.parent / "rows.jsonl"
    data.write_text('{"nums": [1, 2], "target": 3}\n')
    cfg = config(run_folder, problems=str(data))
    with pytest.raises(SystemExit, match="1 of 1 problems left out, .* training split .--all_rows"):
        evaluate.run(cfg, dist)
    evaluate.run(dataclasses.replace(cfg, all_rows=True), dist)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "none"}, "no checkpoint under .*none, .*: bash speedrun.sh"),
        ({"compare": "none.json"}, "--compare none.json: no such file"),
        ({"problems": "none.jsonl"}, "none.jsonl is missing"),
        ({"max_number": 1, "max_target": 2}, "widen the ranges"),
        ({"tasks": ("gsm8k",), "problems": "own.jsonl"}, "--problems is read by --tasks jsonl and"),
        ({"compare": "x/../figures.json"}, "figures.json: --compare and --out are one file"),
    ],
)
def test_bad_input_is_one_line(run_folder, dist, monkeypatch, changes, message):
    """Each bad input ends with one line that names it and the fix."""
    monkeypatch.chdir(run_folder.parent)
    with pytest.raises(SystemExit, match=message) as caught:
        evaluate.run(config(run_folder, **changes), dist)
    assert "\n" not in str(caught.value)


def test_other_files_are_not_overwritten(run_folder, dist):
    """A file at --out that evaluate.py did not write is refused, and stays."""
    rows = '{"num_samples": 1, "metrics": {}, "problems": %s}'
    for text in ("notes", '{"a": 1}', "[]", rows % "[1]", rows % '[{"id": 1}]', rows % "null"):
        cfg = config(run_folder)
        Path(cfg.out).write_text(text)
        with pytest.raises(SystemExit, match="figures.json"):
            evaluate.run(cfg, dist)
        assert Path(cfg.out).read_text() == text


def test_folder_in_use(run_folder, dist, monkeypatch):
    """Two evaluations into one file: the second ends with one line."""
    cfg = config(run_folder)
    real = evaluate.sample_problems

    def sample_problems(*args, **settings):
        with pytest.raises(SystemExit, match="in use by another evaluation"):
            evaluate.run(cfg, dist)
        return real(*args, **settings)

    monkeypatch.setattr(evaluate, "sample_problems", sample_problems)
    evaluate.run(cfg, dist)
    assert Path(cfg.out).exists()


@pytest.mark.parametrize("name", sorted(presets.EVALUATION))
def test_presets_hold_enough_heldout_problems(name):
    """Every preset's ranges hold held-out problems (a part of them is drawn)."""
    cfg = parse(evaluate.EvalConfig, presets.EVALUATION, ["--preset", name])
    few = dataclasses.replace(cfg, num_problems=50)
    assert len(evaluate.load_problems(few, "countdown")[0]) == 50


@pytest.mark.slow
def test_a_slow_process_is_waited_for(run_folder, dist, tmp_path):
    """Where collectives wait 3 s at most, a process that takes 8 s longer is waited for outside of
    them, and the figures are those of one process."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import functools, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import evaluate\n"
        "def sample_problems(*args, real=evaluate.sample_problems, **settings):\n"
        "    slow = evaluate.os.environ['RANK'] == '1' and settings['temperature'] > 0\n"
        "    time.sleep(8 * slow)\n"
        "    return real(*args, **settings)\n"
        "evaluate.sample_problems = sample_problems\n"
        "evaluate.setup = functools.partial(evaluate.setup, timeout_s=3)\n"
        "evaluate.main()\n"
    )
    one = config(run_folder)
    evaluate.run(one, dist)
    two = run_folder.parent / "two.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(script), "--checkpoint", str(run_folder)]
    flags = "--preset smoke --threads 1 --device cpu --num_problems 10 --num_samples 2"
    command += [*flags.split(), "--max_new_tokens", "6", "--out", str(two)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(Path(path).read_text()) for path in (one.out, two)]
    assert results[0]["problems"] == results[1]["problems"]


def test_waiting_outside_collectives():
    """Nobody goes on before all are there, and each place is waited at on its own."""
    store, arrived = HashStore(), []
    ranks = [
        dataclasses.replace(setup("cpu", 1), rank=r, world_size=2, store=store) for r in (0, 1)
    ]

    def slow():
        for place in ("a", "b"):
            time.sleep(0.3)
            arrived.append(place)
            wait_for_all(ranks[1], place)

    thread = threading.Thread(target=slow)
    thread.start()
    for place in ("a", "b"):
        wait_for_all(ranks[0], place)
        assert arrived[-1] == place
    thread.join()
    wait_for_all(setup("cpu", 1), "alone")


@pytest.mark.slow
def test_two_processes_equal_one(run_folder, benchmark_files, dist):
    """torchrun with two processes writes the same figures and samples as one process, for two
    tasks one after the other."""
    one = config(run_folder, tasks=("countdown", "math"), data=str(benchmark_files))
    evaluate.run(one, dist)
    two = run_folder.parent / "two.json"
    flags = "--preset smoke --threads 1 --device cpu --num_problems 10 --num_samples 2"
    flags += " --max_new_tokens 6"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "evaluate.py", *flags.split()]
    command += ["--checkpoint", str(run_folder), "--out", str(two)]
    command += ["--tasks", "countdown", "math", "--data", str(benchmark_files)]
    subprocess.run(command, cwd=ROOT, env=dict(os.environ), check=True, timeout=120)
    for task in one.tasks:
        paths = [evaluate.task_path(str(base), task, one.tasks) for base in (one.out, two)]
        results = [json.loads(path.read_text()) for path in paths]
        assert results[0].pop("config_hash") == results[1].pop("config_hash")
        for result in results:
            result.pop("settings")
        assert results[0] == results[1]
        samples = [path.with_suffix(".samples.txt").read_text() for path in paths]
        assert samples[0] == samples[1]
