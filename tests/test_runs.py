"""The runs of runs/*.sh: their figures are the planner's, and each really runs, on tiny models.

The models have random weights, the architectures of the real ones, and come as Hugging Face folders
that transformers wrote.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import evaluate
import train_grpo
from nanomath.base.config import parse
from nanomath.base.log import read_metrics
from nanomath.measure import plan
from nanomath.run import load, presets
from nanomath.tasks import benchmarks

ROOT = Path(__file__).resolve().parent.parent
DATA = os.environ.get("NANOMATH_DATA")
# Run -> model family, and what its configuration is called in transformers.
RUNS = {
    "gsm8k_qwen_0b5": ("chatml", "Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gsm8k_qwen_1b5": ("chatml", "Qwen3", {"num_key_value_heads": 2, "head_dim": 12}),
    "countdown_qwen_3b": ("chatml", "Qwen2", {"num_key_value_heads": 1}),
    "deepseekmath_7b": ("deepseekmath", "Llama", {"tie_word_embeddings": False}),
}


# ---------------------------------------------------------------------------- figures


def grpo_preset(name: str) -> train_grpo.GRPOConfig:
    return parse(train_grpo.GRPOConfig, presets.GRPO, ["--preset", name])


def planned(name: str, **changes) -> tuple[float, float, float]:
    """Return the planner's GB per GPU, the GPU's, and the seconds of a step."""
    cfg = replace(plan.PlanConfig(**plan.PRESETS[name]), **changes)
    assert plan.advice(cfg, "grpo") == "fits"
    times = plan.step_times(cfg, "grpo")
    seconds = times["sampling"] + times["reference"] + times["training"]
    return sum(plan.memory(cfg, "grpo").values()) / 1e9, cfg.gpu_memory_gb, seconds


def row_of_docs(name: str) -> str:
    lines = (ROOT / "docs" / "running.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith(f"| `bash runs/{name}.sh` |"))
    return row


@pytest.mark.parametrize("name", RUNS)
def test_headers_show_what_the_planner_says(name):
    """Every script's header, and docs/running.md, give the plan's memory and time; the header also
    the sizes, the GPUs' number and memory, and the size of a checkpoint."""
    header = (ROOT / "runs" / f"{name}.sh").read_text()
    shown = re.search(r"Plan: ([\d.]+) GB of (\d+), (\d+) s a step", header).groups()
    gb, gpu_gb, seconds = planned(name)
    assert shown == (f"{gb:.1f}", f"{gpu_gb:.0f}", f"{seconds:.0f}")
    assert f"{gb:.1f} of {gpu_gb:.0f} GB, {seconds:.0f} s" in row_of_docs(name)
    assert f"--preset {name})" in header and f"PRESET={name}\n" in header
    assert f'NPROC="${{NPROC:-{plan.PRESETS[name].get("num_gpus", 8)}}}"' in header
    grpo = grpo_preset(name)
    size = f"{grpo.batch_size} questions x {grpo.group_size} outputs"
    assert f"# {size} of up to {grpo.max_new_tokens} tokens a step, {grpo.num_steps} s" in header
    parameters = plan.PlanConfig(**plan.PRESETS[name]).model.num_parameters
    assert f"Disk: {16 * parameters / 1e9:.0f} GB a checkpoint" in header  # fp32, two moments


def test_other_figures_of_the_headers():
    """What a 7B step takes on two machines, and without the limit on the cache; 1.5B in 24 GB."""
    header = (ROOT / "runs" / "deepseekmath_7b.sh").read_text()
    gb, _, seconds = planned("deepseekmath_7b", num_gpus=16)
    assert f"({gb:.1f} GB, {seconds:.0f} s a step)" in header
    assert f"{gb:.1f} of 80 GB, {seconds:.0f} s" in row_of_docs("deepseekmath_7b")
    cfg = plan.PlanConfig(**plan.PRESETS["deepseekmath_7b"])
    assert f"{plan.sampled_at_a_time(cfg)[0]} of its 128 outputs" in header
    anyhow = replace(cfg, cache_gb=0.0)
    assert f"take {sum(plan.memory(anyhow, 'grpo').values()) / 1e9:.1f} GB" in header
    saved = plan.sampling_seconds(cfg) - plan.sampling_seconds(anyhow)
    assert f"would save {saved:.0f} s a step" in header
    header = (ROOT / "runs" / "gsm8k_qwen_1b5.sh").read_text()
    cfg = plan.PlanConfig(**plan.PRESETS["gsm8k_qwen_1b5"] | {"gpu_memory_gb": 24.0})
    assert plan.advice(cfg, "grpo").startswith("NO") and "not fit 24 GB" in header
    state = sum(plan.state_bytes(cfg, "grpo").values()) / 1e9
    assert f"are {state:.0f} GB by themselves" in header


def test_the_plan_in_the_docs():
    """docs/performance.md shows, word for word, what the planner prints for 7B."""
    lines = plan.report(plan.PlanConfig(**plan.PRESETS["deepseekmath_7b"])).splitlines()
    shown = "\n".join(f"    {line}".rstrip() for line in lines)
    page = (ROOT / "docs" / "performance.md").read_text()
    assert shown in page
    anyhow = plan.PlanConfig(**plan.PRESETS["deepseekmath_7b"] | {"cache_gb": 0.0})
    assert f"would take {sum(plan.memory(anyhow, 'grpo').values()) / 1e9:.1f} GB" in page
    assert plan.advice(anyhow, "grpo") == "NO; fits with --max_rows 64"


@pytest.mark.parametrize("name", RUNS)
def test_the_plan_is_of_the_run(name):
    """The planner's preset has the sizes of the trainer's, and evaluation its lengths and
    prompts."""
    grpo, planner = grpo_preset(name), plan.PlanConfig(**plan.PRESETS[name])
    same = ("group_size", "max_new_tokens", "max_rows", "cache_gb", "micro_batch_size")
    for field in (*same, "activation_checkpointing"):
        assert getattr(planner, field) == getattr(grpo, field), field
    assert (planner.batch_size, planner.kl_coef) == (grpo.batch_size, grpo.kl_coef)
    after = parse(evaluate.EvalConfig, presets.EVALUATION, ["--preset", name])
    for field in ("max_new_tokens", "chat_template", "prompt_style", "num_numbers", "max_number"):
        assert getattr(after, field) == getattr(grpo, field), field
    assert ("countdown" in after.tasks) == (grpo.problems is None)


def test_shapes_are_those_of_the_models():
    """Parameters as the models' own files count them, but for Qwen's biases."""
    known = {"gsm8k_qwen_0b5": 494_032_768, "gsm8k_qwen_1b5": 1_543_714_304}
    for name, count in (known | {"countdown_qwen_3b": 3_085_938_688}).items():
        cfg = plan.PlanConfig(**plan.PRESETS[name]).model
        assert replace(cfg, qkv_bias=True).num_parameters == count
        assert cfg.num_parameters == pytest.approx(count, rel=1e-4)


@pytest.mark.skipif(not DATA, reason="NANOMATH_DATA is not set: no public benchmark files")
def test_steps_go_once_through_gsm8k():
    """Nine tenths of GSM8K's 7,473 training questions are trained on, each once, and no test
    question is among them."""
    path = f"{DATA}/gsm8k_train.jsonl"
    train, heldout = benchmarks.read_splits(path)
    assert (len(train), len(heldout)) == (6676, 797)
    grpo = grpo_preset("gsm8k_qwen_0b5")
    assert grpo.num_steps == len(train) // grpo.batch_size
    tested = {problem.prompt for problem in benchmarks.read_benchmark("gsm8k", DATA)}
    assert not tested & {problem.prompt for problem in train + heldout}


# ---------------------------------------------------------------------------- running them


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder for each run, in the layout it is published in."""
    transformers = pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location(
        "chat_tests", ROOT / "tests" / "text" / "test_chat.py"
    )
    chat_tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chat_tests)
    made = {}
    for number, (name, (template, kind, changes)) in enumerate(RUNS.items()):
        made[name] = folder = tmp_path_factory.mktemp(name)
        config = {
            "vocab_size": 512,  # more than tokens, as the real ones have: those are never sampled
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        }
        config = getattr(transformers, f"{kind}Config")(**(config | changes))
        torch.manual_seed(number)
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
        chat_tests.make_tokenizer(template, folder)
    return made


@pytest.fixture
def questions(tmp_path):
    """A folder with files of GSM8K's and MATH's names and fields, and a reward that is dense."""
    rows = [
        {"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"}
        for i in range(60)
    ]
    for name, part in (("gsm8k_train", rows[:50]), ("gsm8k_test", rows[50:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    row = {"problem": "Find x.", "solution": r"\boxed{7}", "level": "Level 1", "type": "Algebra"}
    (tmp_path / "math_test.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "rewards.py").write_text(
        "def even(problem, text):\n"
        "    return sum(ord(c) % 2 == 0 for c in text) / max(len(text), 1)\n"
    )
    return tmp_path


def command(name: str, folders, questions, run_dir, nproc: int) -> tuple[list, dict]:
    """Return a run of three steps: its command and environment."""
    flags = ["--num_steps", "3", "--checkpoint_interval", "1", "--batch_size", "2", "--group_size",
             "4", "--max_new_tokens", "6", "--num_eval_problems", "3", "--eval_interval", "2",
             "--threads", "1", "--lr", "0.01", "--reward", f"{questions}/rewards.py:even",
             "--num_problems", "40"]  # fmt: skip
    if name != "countdown_qwen_3b":
        flags += ["--problems", f"{questions}/gsm8k_train.jsonl"]
    env = os.environ | {
        "MODEL": str(folders[name]), "RUN": str(run_dir), "NPROC": str(nproc),
        "EVALUATE": f"--data {questions} --num_problems 4 --num_samples 2 --max_new_tokens 6",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    return ["bash", ROOT / "runs" / f"{name}.sh", *flags], env


def check_run(name: str, start, run_dir) -> None:
    """Three steps that trained, two evaluations and their difference, an export that equals."""
    transformers = pytest.importorskip("transformers")
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == [0, 1, 2] and all(row["stepped"] for row in rows)
    assert rows[0]["kl"] == 0.0 < rows[2]["kl"]  # the reference is the policy, to the last bit
    tasks = presets.EVALUATION[name].get("tasks", ("countdown",))
    for task in tasks:
        end = f"-{task}.json" if len(tasks) > 1 else ".json"
        after = json.loads((run_dir / f"after{end}").read_text())
        assert after["task"] == task and after["difference"].keys() >= {"greedy", "pass@1"}
        assert (run_dir / f"before{end}").is_file()
    ours, tokenizer, _ = load.load_model(run_dir, dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        run_dir / "exported", dtype=torch.float32
    )
    assert type(theirs).__name__ == f"{RUNS[name][1]}ForCausalLM"
    tokens_BT = torch.randint(400, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits_BTV = ours.float()(tokens_BT)
        assert torch.equal(logits_BTV, theirs.eval()(tokens_BT).logits)
        before, _, _ = load.load_model(start)
        assert (before(tokens_BT) - logits_BTV).abs().max() > 0.01
    text = "What is 3 + 4?\nReason step by step."
    exported = transformers.AutoTokenizer.from_pretrained(run_dir / "exported")
    assert exported(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert tokenizer.template == RUNS[name][0]


def test_a_run_from_download_to_export(folders, questions, capfd):
    """runs/gsm8k_qwen_0b5.sh on one process: it plans, evaluates, trains, compares, exports."""
    argv, env = command("gsm8k_qwen_0b5", folders, questions, questions / "run", 1)
    subprocess.run(argv, env=env, check=True, timeout=300)
    assert "grpo: fits" in capfd.readouterr().out
    check_run("gsm8k_qwen_0b5", folders["gsm8k_qwen_0b5"], questions / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name != "gsm8k_qwen_0b5"])
def test_runs_on_two_processes(folders, questions, name):
    """The other runs, under torchrun: sharded training and evaluation, an export that equals."""
    argv, env = command(name, folders, questions, questions / "run", 2)
    subprocess.run(argv, env=env, check=True, timeout=300)
    check_run(name, folders[name], questions / "run")


@pytest.mark.slow
def test_a_killed_run_continues(folders, questions, capfd, monkeypatch):
    """Killed after its first checkpoint, the same command ends at the weights of a run that was
    not; a third call trains and writes nothing."""
    name, run_dir = "gsm8k_qwen_0b5", questions / "run"
    argv, env = command(name, folders, questions, run_dir, 1)
    killed = subprocess.Popen(argv, env=env, start_new_session=True)
    while not list(run_dir.glob("checkpoints/step-*/COMMIT")):
        assert killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert len(read_metrics(run_dir)) < 3
    capfd.readouterr()
    subprocess.run(argv, env=env, check=True, timeout=300)
    assert "continuing" in capfd.readouterr().out
    check_run(name, folders[name], run_dir)
    exported = (run_dir / "exported" / "model.safetensors").stat()
    subprocess.run(argv, env=env, check=True, timeout=300)
    assert "all 3 steps are done" in capfd.readouterr().out
    assert (run_dir / "exported" / "model.safetensors").stat() == exported
    flags = ["--preset", name, "--init", folders[name], "--run_dir", questions / "whole"]
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", *map(str, [*flags, *argv[2:]])])
    train_grpo.main()
    weights = [load.load_model(folder)[0] for folder in (run_dir, questions / "whole")]
    pairs = zip(*(model.parameters() for model in weights), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


@pytest.mark.parametrize("name", RUNS)
def test_what_the_scripts_call(tmp_path, name):
    """download is only made when asked for; without a model the command that gets it is named;
    two machines get one rendezvous, and only the first plans and exports."""
    log = tmp_path / "log"
    for program in ("python", "torchrun"):
        (tmp_path / program).write_text(f'#!/usr/bin/env bash\necho {program} "$@" >> {log}\n')
        (tmp_path / program).chmod(0o755)
    script = ["bash", ROOT / "runs" / f"{name}.sh"]
    keys = ("MODEL", "RUN", "NPROC", "NODES", "NODE", "HOST", "REVISION", "EVALUATE")
    env = {key: value for key, value in os.environ.items() if key not in keys}
    env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL": str(tmp_path / "model")}
    text = subprocess.run([*script, "--help"], env=env, capture_output=True, text=True).stdout
    assert "Plan:" in text and "download" in text
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and f"{name}.sh download" in done.stderr and not log.exists()
    subprocess.run([*script, "download"], env=env, check=True)
    *data, model = log.read_text().splitlines()
    assert all(line.startswith("python -m nanomath.hub.download ") for line in (*data, model))
    assert len(data) == {"countdown_qwen_3b": 0, "deepseekmath_7b": 2}.get(name, 1)
    hub = Path(grpo_preset(name).init).name
    assert re.search(rf"download \S+/{hub} --revision \S+ --to {tmp_path}/model$", model)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    for node in ("0", "1"):
        log.unlink()
        machines = {"NODES": "2", "NODE": node, "HOST": "first", "NPROC": "8"}
        subprocess.run([*script, "--num_steps", "5"], env=env | machines, check=True)
        lines = log.read_text().splitlines()
        training = [line for line in lines if "train_grpo.py" in line]
        assert len(training) == 1 and training[0].endswith(" --num_steps 5")
        assert "--nnodes 2 --nproc_per_node 8" in training[0] and "first:29500" in training[0]
        alone = ["nanomath.measure.plan", "nanomath.play.export"] if node == "0" else []
        assert [line.split()[2] for line in lines if line.startswith("python")] == alone
        assert sum("evaluate.py" in line for line in lines) == 2


@pytest.mark.parametrize(("given", "seconds"), [(None, "900"), ("60", "60")])
def test_torchrun_gives_the_ranks_time_to_save(tmp_path, given, seconds):
    """Processes that torchrun starts have 900 s after a SIGTERM, not its 30, or what is given."""
    log = tmp_path / "log"
    for program, line in (
        ("python", ""),
        ("torchrun", f"echo $TORCH_ELASTIC_SHUTDOWN_TIMEOUT >> {log}"),
    ):
        (tmp_path / program).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (tmp_path / program).chmod(0o755)
    (tmp_path / "config.json").touch()
    env = {k: v for k, v in os.environ.items() if k != "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}
    env |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": given} if given else {}
    env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL": str(tmp_path), "NPROC": "2"}
    env |= {"RUN": str(tmp_path), "NODE": "1", "NODES": "2", "HOST": "first"}
    (tmp_path / "exported").touch()
    subprocess.run(["bash", ROOT / "runs" / "deepseekmath_7b.sh"], env=env, check=True)
    assert log.read_text().split() == [seconds] * 3  # evaluate, train, evaluate


def test_an_export_is_made_anew_after_more_training(tmp_path):
    """An export older than the newest checkpoint, of a run that a signal ended early, is replaced;
    a newer one is kept."""
    log = tmp_path / "log"
    (tmp_path / "python").write_text(f'#!/usr/bin/env bash\necho "$@" >> {log}\n')
    (tmp_path / "python").chmod(0o755)
    for folder in ("checkpoints/step-000001", "checkpoints/step-000002", "exported"):
        (tmp_path / "run" / folder).mkdir(parents=True)
        (tmp_path / "run" / folder / "COMMIT").touch()
    (tmp_path / "config.json").touch()
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NPROC": "1"}
    env |= {"MODEL": str(tmp_path), "RUN": str(tmp_path / "run")}
    for age, num_exports in ((10, 0), (-10, 1)):
        log.unlink(missing_ok=True)
        newest = tmp_path / "run" / "checkpoints" / "step-000002" / "COMMIT"
        os.utime(newest, (time.time() - age,) * 2)
        subprocess.run(["bash", ROOT / "runs" / "gsm8k_qwen_0b5.sh"], env=env, check=True)
        assert log.read_text().count("nanomath.play.export") == num_exports
        assert (tmp_path / "run" / "exported").exists() == (num_exports == 0)


@pytest.mark.skipif(not DATA, reason="NANOMATH_DATA is not set: no public benchmark files")
def test_training_on_the_real_gsm8k(folders, tmp_path, monkeypatch):
    """A step on GSM8K's own questions: every output is judged, held-out questions are answered."""
    argv = ["--preset", "gsm8k_qwen_0b5", "--init", folders["gsm8k_qwen_0b5"], "--run_dir",
            tmp_path / "run", "--problems", f"{DATA}/gsm8k_train.jsonl", "--num_steps", "1",
            "--batch_size", "3", "--group_size", "4", "--max_new_tokens", "8", "--threads", "1",
            "--num_problems", "100", "--num_eval_problems", "5"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", *map(str, argv)])
    train_grpo.main()
    (row,) = read_metrics(tmp_path / "run")
    assert (row["no_reward"], row["reward_answer"], row["constant_groups"]) == (0.0, 0.0, 1.0)
    assert row["heldout_pass@1"] == 0.0 and row["length"] > 1
    shown = (tmp_path / "run" / "samples.txt").read_text()
    assert r"put the final answer inside \boxed{}" in shown
    shutil.rmtree(tmp_path / "run")
