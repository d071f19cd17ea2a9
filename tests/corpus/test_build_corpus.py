"""The script: one line per bad input, a crawl of one's own, finished runs, kill -9 and resume."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import build_corpus
from nanomath.base.config import parse
from nanomath.corpus import decontaminate, write
from nanomath.run.guard import run_lock
from nanomath.tasks import countdown, expressions

ROOT = Path(build_corpus.__file__).parent
TINY = ["--preset", "smoke", "--packages", "mpmath", "markdown", "--num_heldout", "5"]
TINY += ["--budgets", "4000", "6000", "--buckets", "2000", "--dim", "8", "--num_workers", "1"]


def _fails(*argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        build_corpus.run(list(argv))
    assert caught.value.code not in (0, None)
    return str(caught.value.code)


def _outputs(run_dir: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(run_dir)): p.read_bytes()
        for p in sorted(run_dir.rglob("*"))
        if p.is_file() and not p.name.startswith(".") and p.name != "config.json"
    }


def test_bad_input_is_one_clear_line(tmp_path):
    """A missing file, an empty one, one without pages, and a bad rules file are named."""
    run, empty, junk = str(tmp_path / "run"), tmp_path / "empty.jsonl", tmp_path / "junk.jsonl"
    empty.write_text("")
    junk.write_text("hello\n")
    assert "nowhere.jsonl is missing" in _fails("--pages", "nowhere.jsonl", "--run_dir", run)
    assert "empty.jsonl is empty" in _fails("--pages", str(empty), "--run_dir", run)
    assert "junk.jsonl: no page in it" in _fails("--pages", str(junk), "--run_dir", run)
    for flag, name, problem in [
        ("--benchmarks", empty, "empty.jsonl is empty"),
        ("--benchmarks", junk, "junk.jsonl:1: not JSON"),
        ("--seed_pages", junk, "junk.jsonl: no page in it"),
        ("--url_rules", junk, "junk.jsonl:1"),
        ("--url_rules", "nowhere.tsv", "nowhere.tsv"),
    ]:
        message = _fails(*TINY, flag, str(name), "--run_dir", run)
        assert problem in message and "\n" not in message
        assert not (tmp_path / "run" / "raw.jsonl").exists()  # before pages are parsed


def test_a_wrong_flag_names_the_nearest(tmp_path, capsys):
    """argparse's exit code 2 and the flag that was meant."""
    assert _fails("--budgetz", "5") == "2"
    assert "--budgets" in capsys.readouterr().err


def test_a_crawl_becomes_a_corpus_once(tmp_path, capsys, made_up_pages):
    """Own pages, seed and rules: math pages are found, a planted benchmark page is dropped, other
    settings are refused, and a second call says that the run is finished."""
    crawl, seed, bench = (tmp_path / name for name in ("crawl.jsonl", "seed.jsonl", "bench.jsonl"))
    rows = [json.loads(page.to_json()) for page in made_up_pages(72, seed=1)]
    planted = " ".join(f"word{i}" for i in range(12))
    target = next(row for row in rows if "sums.sympy" in row["url"])
    target["text"] += "\n" + planted
    crawl.write_text("\n".join(map(json.dumps, [*rows, rows[0]])) + "\nbad line\n")
    extra = [page for page in made_up_pages(24, seed=2) if "sympy" in page.url]
    seed.write_text("\n".join(page.to_json() for page in extra) + "\n")
    bench.write_text(json.dumps({"question": planted, "answer": "12"}) + "\n")
    argv = ["--pages", str(crawl), "--seed_pages", str(seed), "--benchmarks", str(bench)]
    argv += ["--budgets", "90000", "120000", "--num_heldout", "0", "--run_dir", str(tmp_path / "r")]
    argv += ["--dim", "8", "--lr", "1", "--epochs", "10", "--buckets", "2000", "--never_hosts", "0"]
    build_corpus.run(argv)
    assert f"skipped 1 of {len(rows) + 2} lines" in capsys.readouterr().err
    funnel = json.loads((tmp_path / "r" / "funnel.json").read_text())
    assert funnel["pages"]["same_url"] == 1
    assert funnel["contaminated"] == 1
    assert funnel["benchmark_hits"] == {"bench:1:question": 1}
    corpus = [json.loads(x) for x in (tmp_path / "r" / "corpus.jsonl").read_text().splitlines()]
    assert set(corpus[0]) == {"url", "text", "score"}
    assert not any(planted in page["text"] for page in corpus)
    valid = [json.loads(x) for x in (tmp_path / "r" / "valid.jsonl").read_text().splitlines()]
    assert funnel["validation"] == len(valid) > 0
    assert len(corpus) == funnel["collected"] - 1 - len(valid)
    assert funnel["rounds"][-1]["precision"] > 0.6
    assert (tmp_path / "r" / "plots" / "funnel.png").stat().st_size > 5000
    before = _outputs(tmp_path / "r")
    capsys.readouterr()
    build_corpus.run(argv)
    assert "the corpus is finished" in capsys.readouterr().out
    assert _outputs(tmp_path / "r") == before
    assert "--lr was 1.0, is 2.0" in _fails(*argv, "--lr", "2")


def test_a_crawl_of_unknown_hosts_gets_validation_pages(tmp_path, capsys, made_up_pages):
    """With default rules no host is math: a tenth of the collected pages validates and is not in
    the corpus, and a line whose URL cannot be read is one more bad line."""
    crawl, seed = tmp_path / "crawl.jsonl", tmp_path / "seed.jsonl"
    rows = [
        {"url": page.url.replace("sympy", "x").replace("mpmath", "y"), "text": page.text}
        for page in made_up_pages(72, seed=1)
    ]
    rows.insert(3, {"url": "http://[::1/x", "text": "text"})
    crawl.write_text("\n".join(map(json.dumps, rows)))
    extra = [page for page in made_up_pages(24, seed=2) if "sympy" in page.url]
    seed.write_text("\n".join(page.to_json() for page in extra) + "\n")
    argv = ["--pages", str(crawl), "--seed_pages", str(seed), "--budgets", "90000"]
    argv += ["--dim", "8", "--lr", "1", "--epochs", "10", "--buckets", "2000"]
    argv += ["--num_heldout", "0", "--run_dir", str(tmp_path / "r")]
    build_corpus.run(argv)
    funnel = json.loads((tmp_path / "r" / "funnel.json").read_text())
    assert funnel["validation"] == -(-funnel["collected"] // 10) > 0
    assert funnel["validation_source"] == "collected pages"
    printed = capsys.readouterr()
    assert f"{crawl}:4: " in printed.err and "validation pages of collected pages" in printed.out
    urls = {}
    for name in ("valid", "corpus"):
        lines = (tmp_path / "r" / f"{name}.jsonl").read_text().splitlines()
        urls[name] = {json.loads(line)["url"] for line in lines}
    assert len(urls["valid"]) == funnel["validation"] and not urls["valid"] & urls["corpus"]
    assert len(urls["valid"] | urls["corpus"]) == funnel["collected"]


def test_heldout_countdown_is_its_numbers_and_target():
    """A held-out problem is found as a data set's row, never by numbers alone: its equation, its
    short prompt, a worked line or a counting list drops no page. Training rows pass."""
    cfg = parse(build_corpus.CorpusConfig, build_corpus.PRESETS, ["--preset", "cpu"])
    index = decontaminate.Decontaminator(write.benchmark_texts(cfg))
    assert index.summary == {"long": 0, "short": cfg.num_heldout, "unused": 0}
    for problem in countdown.generate(20, countdown.RANGES["cpu"], split="heldout"):
        name, nums, target = f"countdown:{problem.id}", *problem.payload.values()
        assert index.matches(f"text\n{problem.prompt}text") == []
        assert index.matches(json.dumps({"nums": nums, "target": target})) == [f"{name}:row"]
        forms = expressions.expressions(nums)
        solved = [form.text for form in forms if form.value == target]
        assert solved
        for equation in solved:
            assert index.matches(f"So {equation} = {target}.") == []
    train = countdown.generate(200, countdown.RANGES["cpu"], split="train")
    assert not any(index.matches(json.dumps(problem.payload)) for problem in train)


def test_presets_are_known_and_the_embedded_web_gets_one(tmp_path, monkeypatch):
    """The paper's values are the defaults and no preset; without --pages they are not used."""
    assert sorted(build_corpus.PRESETS) == ["cpu", "gpu", "smoke"]
    seen = []
    monkeypatch.setattr(build_corpus, "main", seen.append)
    build_corpus.run(["--run_dir", str(tmp_path)])
    build_corpus.run(["--run_dir", str(tmp_path), "--pages=x.jsonl"])
    assert seen[0].budgets == build_corpus.PRESETS["cpu"]["budgets"]
    assert seen[1].budgets == build_corpus.CorpusConfig().budgets and seen[1].dim == 256


@pytest.mark.slow
def test_the_smoke_preset_recalls_real_mathematics(tmp_path):
    """Each round collects dozens of pages, most of them math, and the corpus holds them."""
    build_corpus.run(["--preset", "smoke", "--run_dir", str(tmp_path)])
    funnel = json.loads((tmp_path / "funnel.json").read_text())
    for row in funnel["rounds"]:
        assert row["pages"] >= 36 and row["precision"] > 0.6
    assert funnel["corpus"]["pages"] >= 60
    assert funnel["validation"] > 0 and funnel["contaminated"] == 0


@pytest.mark.slow
def test_kill_and_resume_give_the_same_bytes(tmp_path):
    """Killed with SIGKILL again and again, each time a bit later, a run ends like an undisturbed
    one: every file of the run folder is equal."""
    command = [sys.executable, str(ROOT / "build_corpus.py"), *TINY, "--run_dir"]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": env, "cwd": ROOT}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, **quiet)
    num_kills, delay = 0, 1.0
    for _ in range(40):
        process = subprocess.Popen([*command, str(tmp_path / "cut")], **quiet)
        try:
            assert process.wait(timeout=delay) == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            num_kills, delay = num_kills + 1, delay + 0.4
    assert num_kills >= 3
    whole, cut = _outputs(tmp_path / "whole"), _outputs(tmp_path / "cut")
    assert "corpus.jsonl" in whole and cut.keys() == whole.keys()
    assert [name for name in whole if whole[name] != cut[name]] == []


@pytest.mark.slow
def test_a_folder_in_use_is_refused(tmp_path):
    """A process on a run folder that another one holds ends with one line and writes nothing there;
    once it is free, the same command builds the corpus."""
    command = [sys.executable, str(ROOT / "build_corpus.py"), *TINY, "--run_dir", str(tmp_path)]
    with run_lock(tmp_path):
        refused = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert refused.returncode != 0 and "Traceback" not in refused.stderr
        assert re.fullmatch(r".* is in use by .*\n", refused.stderr)
        assert not (tmp_path / "config.json").exists()
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 0
    assert (tmp_path / "corpus.jsonl").stat().st_size > 0
