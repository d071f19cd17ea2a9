"""The scripts as a user meets them: bad input is one clear line, resuming is exact."""

import contextlib
import copy
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_grpo
import train_pretrain
import train_sft
from nanomath import activations, algorithm1, optim
from nanomath.base.config import parse
from nanomath.base.log import read_metrics
from nanomath.data import PackedExamples, TokenShards, epoch_order, write_shards
from nanomath.dist import Dist
from nanomath.engine.stream import sample_groups
from nanomath.measure import evaluation
from nanomath.model import ModelConfig, Transformer
from nanomath.optim import cosine_lr
from nanomath.run import checkpoint, load, presets
from nanomath.run import problems as run_problems
from nanomath.run.guard import run_lock
from nanomath.run.loop import Run
from nanomath.run.metrics import MEASURED, PANELS
from nanomath.tasks import benchmarks, countdown
from nanomath.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
ALONE = Dist(0, 0, 1, torch.device("cpu"))
SMALL_GRPO = ["--preset", "smoke", "--threads", "1", "--num_problems", "40", "--batch_size", "2",
              "--group_size", "4", "--max_new_tokens", "6", "--num_eval_problems", "4"]  # fmt: skip


def run_script(module, argv, monkeypatch):
    """Call a script's main() with this command line."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, argv)])
    module.main()


def message(module, argv, monkeypatch, capsys) -> str:
    """Return the one line a script ends with."""
    with pytest.raises(SystemExit) as error:
        run_script(module, argv, monkeypatch)
    assert error.value.code not in (None, 0)
    text = capsys.readouterr().err if error.value.code == 2 else str(error.value)
    assert text.strip().count("\n") == 0, text
    return text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["Numbers: 1 2 3\nTarget: 6\n<think>1+2=3</think>"] * 3, 280)


def save_start(run_dir, tokenizer, dtype, max_context=64):
    """Make a run folder with an untrained model."""
    cfg = ModelConfig(tokenizer.vocab_size, 1, 16, 2, 2, 16, max_context=max_context)
    model = Transformer(cfg).to(dtype)
    model.init_weights(0)
    checkpoint.Checkpoints(run_dir, {"model": model}, None, tokenizer, ALONE).save(1, {})
    return run_dir


@pytest.fixture
def start(tmp_path, tokenizer):
    """A run folder with an untrained model."""
    return save_start(tmp_path / "start", tokenizer, torch.float32)


# ------------------------------------------------------------------------------- bad input


def test_missing_checkpoint_names_the_command_that_makes_one(tmp_path, monkeypatch, capsys):
    """Without a checkpoint to start from, the trainers say how to make one."""
    for module in (train_grpo, train_sft):
        argv = ["--init", tmp_path / "none", "--run_dir", tmp_path / module.__name__]
        text = message(module, argv, monkeypatch, capsys)
        assert "no checkpoint under" in text and "bash speedrun.sh" in text


def test_wrong_flag_names_the_nearest(monkeypatch, capsys):
    """A misspelt flag is named with the one that was meant."""
    for module, wrong, meant in (
        (train_grpo, "--groupsize", "--group_size"),
        (train_sft, "--contxt", "--context"),
        (train_pretrain, "--num_layer", "--num_layers"),
    ):
        text = message(module, [wrong, "4"], monkeypatch, capsys)
        assert wrong in text and meant in text


def test_bad_data_files_are_named(tmp_path, start, tokenizer, monkeypatch, capsys):
    """A missing, empty or broken data file is one line that names it."""
    argv = ["--preset", "smoke", "--init", start, "--run_dir", tmp_path / "sft", "--data"]
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text("{\n" * 20)
    for name, words in (("no.jsonl", "missing"), ("empty.jsonl", "empty"), ("broken.jsonl", "bad")):
        text = message(train_sft, [*argv, tmp_path / name], monkeypatch, capsys)
        assert name in text and words in text
    text = message(
        train_pretrain,
        ["--preset", "smoke", "--tokenizer", tmp_path, "--run_dir", tmp_path / "base"],
        monkeypatch,
        capsys,
    )
    assert "tokenizer.json" in text


def test_checkpoint_of_another_shape_is_refused(tmp_path, start, tokenizer, monkeypatch, capsys):
    """A run folder whose checkpoint has another shape than the model is one line with both."""
    cfg = ModelConfig(tokenizer.vocab_size, 1, 32, 2, 2, 16, max_context=64)
    wide = Transformer(cfg)
    modules = {"model": wide, "reference": wide}
    checkpoint.Checkpoints(tmp_path / "grpo", modules, None, tokenizer, ALONE).save(1, {})
    argv = [*SMALL_GRPO, "--init", start, "--run_dir", tmp_path / "grpo"]
    text = message(train_grpo, argv, monkeypatch, capsys)
    assert "[32, 32]" in text and "[16, 16]" in text and "attention" in text


def test_run_folder_in_use_and_with_other_settings_is_refused(tmp_path, start, monkeypatch, capsys):
    """Two trainers on one folder, or one with other settings, are refused by name."""
    argv = [*SMALL_GRPO, "--init", start, "--run_dir", tmp_path / "grpo"]
    with run_lock(tmp_path / "grpo"):
        assert "in use" in message(train_grpo, argv, monkeypatch, capsys)
    (tmp_path / "grpo" / "config.json").write_text(json.dumps({"lr": 1.0}))
    text = message(train_grpo, argv, monkeypatch, capsys)
    assert "other settings" in text and "--lr was 1.0" in text


# ------------------------------------------------------------------------------- Algorithm 1


def plain_loop(cfg, start_dir, reward) -> torch.Tensor:
    """Train with minibatches, a schedule and clipped gradients in a plain loop: final weights.

    algorithm1.py has none of these. With loss_norm token: the other objective that is tested,
    whatever its flags' values.
    """
    is_paper = cfg.loss_norm == "response"
    policy, tokenizer, _ = load.load_model(start_dir, device="cpu")
    problems, _ = run_problems.problem_sets(cfg)
    optimizer = torch.optim.AdamW(
        policy.parameters(), betas=(cfg.beta1, cfg.beta2), weight_decay=0.0
    )
    total_steps = cfg.num_iterations * cfg.num_steps

    def logp_of(model, prompt, output):
        logits_TV = model(torch.tensor([prompt + output]))[0, len(prompt) - 1 : -1]
        logp_TV = (logits_TV / cfg.temperature).log_softmax(-1)
        return logp_TV.gather(1, torch.tensor(output)[:, None])[:, 0]

    for step in range(total_steps):
        if step % cfg.num_steps == 0:
            reference = copy.deepcopy(policy)  # l.3
        chosen = epoch_order(len(problems), step, cfg.batch_size, cfg.seed)  # l.5
        prompts = [tokenizer.encode(problems[i].prompt, bos=True) for i in chosen]
        rollouts = sample_groups(  # l.6, l.7
            policy, prompts, cfg.group_size, max_new_tokens=cfg.max_new_tokens,
            eos_ids=tokenizer.stop_ids, temperature=cfg.temperature, seed=cfg.seed, step=step,
            vocab_limit=tokenizer.sample_limit,
        )  # fmt: skip
        outputs = []  # (prompt, output, advantage, weight, log-probabilities of old and reference)
        for p, prompt in enumerate(prompts):
            rows = [
                tokens[:length]
                for tokens, length in zip(
                    rollouts.tokens_PGT[p].tolist(), rollouts.lengths_PG[p].tolist(), strict=True
                )
            ]
            rewards = np.array([reward(None, tokenizer.decode(row)) for row in rows])  # l.8
            # l.9; numpy's default is the population's std
            scale = rewards.std() if is_paper else 1 - 1 / len(rewards)
            advantages = (rewards - rewards.mean()) / scale if np.ptp(rewards) else 0 * rewards
            for row, advantage in zip(rows, advantages, strict=True):
                with torch.no_grad():
                    old, ref = logp_of(policy, prompt, row), logp_of(reference, prompt, row)
                weight = 1 / (cfg.batch_size * cfg.group_size * len(row))
                if not is_paper:
                    weight = float(row[-1] in tokenizer.stop_ids and np.ptp(rewards) > 0)
                outputs.append((prompt, row, float(advantage), weight, old, ref))
        # A sum over all tokens in the loss, over their number.
        num_tokens = sum(weight * len(row) for _, row, _, weight, _, _ in outputs)
        divisor = 1 if is_paper else num_tokens
        lr = cosine_lr(step, num_steps=total_steps, peak=cfg.lr, warmup_steps=cfg.warmup_steps)
        per_part = len(outputs) // cfg.num_minibatches
        for _ in range(cfg.num_updates):  # l.10
            for part in range(cfg.num_minibatches):
                optimizer.zero_grad()
                for prompt, row, advantage, weight, old, ref in outputs[part * per_part :][
                    :per_part
                ]:
                    logp = logp_of(policy, prompt, row)
                    ratio = (logp - old).exp()
                    clipped = ratio.clamp(1 - cfg.clip_eps, 1 + (cfg.clip_eps_high or cfg.clip_eps))
                    kl = (ref - logp).exp() - (ref - logp) - 1  # Eq. 4
                    if not is_paper:
                        kl = (ref - logp) ** 2 / 2
                    gain = torch.minimum(ratio * advantage, clipped * advantage)  # Eq. 3
                    total = -(gain - cfg.kl_coef * kl).sum()
                    (total * weight / divisor * cfg.num_minibatches).backward()
                grads = [p.grad for p in policy.parameters()]
                norm = torch.cat([grad.flatten() for grad in grads]).norm()
                for grad in grads:
                    grad.mul_(min(1.0, cfg.max_grad_norm / norm))
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()  # l.11
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def digits_reward(problem, completion) -> float:
    """A dense reward, so that no group is constant: the share of even characters."""
    return sum(ord(character) % 2 == 0 for character in completion) / max(len(completion), 1)


def reward_file(folder, reward=digits_reward) -> str:
    """Write a reward as a user's file; return what --reward takes."""
    (folder / "rewards.py").write_text(inspect.getsource(reward))
    return f"{folder}/rewards.py:{reward.__name__}"


def coarse_reward(problem, completion) -> float:
    """A reward that is often equal within a group."""
    return float(sum(map(ord, completion)) % 3 == 0)


OTHER_OBJECTIVE = [
    "--loss_norm", "token", "--advantage", "leave_one_out", "--kl_estimator", "k2",
    "--clip_eps_high", "0.3", "--mask_truncated", "--drop_constant_groups", "--num_updates", "1",
]  # fmt: skip


@pytest.mark.parametrize("sampler", ["engine", "plain"])
def test_train_grpo_is_algorithm_1(tmp_path, tokenizer, monkeypatch, sampler):
    """The weights equal nanomath/algorithm1.py's: two iterations of two steps, mu = 2, clipping."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.stop_ids = (*tokenizer.stop_ids, *range(0, 250, 6))  # so that some outputs end
    start = save_start(tmp_path / "start", tokenizer, torch.float64)
    argv = [
        *SMALL_GRPO, "--num_iterations", "2", "--num_steps", "2", "--num_updates", "2",
        "--batch_size", "4", "--kl_coef", "0.3", "--lr", "0.02", "--schedule", "constant",
        "--temperature", "0.8", "--clip_eps", "0.1", "--sampler", sampler,
        "--reward", reward_file(tmp_path), "--reward_weights", "1.0",
        "--init", str(start), "--run_dir", str(tmp_path / "grpo"),
    ]  # fmt: skip
    run_script(train_grpo, argv, monkeypatch)
    trained, _, _ = load.load_model(tmp_path / "grpo", device="cpu")
    cfg = parse(train_grpo.GRPOConfig, presets.GRPO, argv)
    policy, _, _ = load.load_model(start, device="cpu")
    started = copy.deepcopy(policy)
    problems, _ = run_problems.problem_sets(cfg)
    means = algorithm1.train(
        policy,
        [tokenizer.encode(problem.prompt, bos=True) for problem in problems],
        lambda index, output: digits_reward(None, tokenizer.decode(output)),
        eos_ids=tokenizer.stop_ids,
        vocab_limit=tokenizer.sample_limit,
        num_iterations=2,
        num_steps=2,
        num_updates=2,
        batch_size=4,
        group_size=cfg.group_size,
        max_new_tokens=cfg.max_new_tokens,
        temperature=0.8,
        lr=0.02,
        clip_eps=0.1,
        kl_coef=0.3,
        seed=cfg.seed,
    )
    rows = read_metrics(tmp_path / "grpo")
    assert list(means) == pytest.approx([row["reward"] for row in rows], abs=1e-9)
    expected, actual, before = (
        torch.cat([p.detach().flatten() for p in model.parameters()])
        for model in (policy, trained, started)
    )
    assert (expected - before).abs().max() > 0.05
    assert (actual - expected).abs().max() < 1e-8
    assert any(row["clip_low"] + row["clip_high"] > 0 for row in rows)


@pytest.mark.parametrize("flags", [[], OTHER_OBJECTIVE], ids=["paper", "other"])
def test_every_flag_of_the_objective_equals_a_plain_loop(tmp_path, tokenizer, monkeypatch, flags):
    """The weights equal a plain loop's: two iterations, mu = 2, minibatches, KL, clipping; by the
    paper's objective and, with mu = 1, every flag of the objective at another value."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.stop_ids = (*tokenizer.stop_ids, *range(0, 250, 6))  # so that some outputs end
    start = save_start(tmp_path / "start", tokenizer, torch.float64)
    reward = coarse_reward if flags else digits_reward
    argv = [
        *SMALL_GRPO, "--num_iterations", "2", "--num_steps", "2", "--num_updates", "2",
        "--num_minibatches", "2", "--batch_size", "4", "--kl_coef", "0.3", "--lr", "0.02",
        "--schedule", "cosine", "--warmup_steps", "1", "--temperature", "0.8",
        "--clip_eps", "0.1", "--max_grad_norm", "0.5", *flags,
        "--reward", reward_file(tmp_path, reward), "--reward_weights", "1.0",
        "--init", str(start), "--run_dir", str(tmp_path / "grpo"),
    ]  # fmt: skip
    run_script(train_grpo, argv, monkeypatch)
    model, _, _ = load.load_model(tmp_path / "grpo", device="cpu")
    cfg = parse(train_grpo.GRPOConfig, presets.GRPO, argv)
    expected = plain_loop(cfg, start, reward)
    actual = torch.cat([p.detach().flatten() for p in model.parameters()])
    started, _, _ = load.load_model(start, device="cpu")
    moved = actual - torch.cat([p.detach().flatten() for p in started.parameters()])
    assert moved.abs().max() > 0.05
    assert (actual - expected).abs().max() < 1e-8
    rows = read_metrics(tmp_path / "grpo")
    assert any(row["clip_low"] + row["clip_high"] > 0 for row in rows)
    # l.3: the first log row of an iteration is against a fresh reference, the later ones are not.
    assert rows[2]["kl"] < rows[1]["kl"] and all(row["constant_groups"] < 1 for row in rows)
    if flags:
        assert any(row["constant_groups"] > 0 for row in rows)
        assert any(0 < row["truncated"] < 1 for row in rows)


def test_a_policy_that_does_not_move_has_ratio_1_and_kl_0(tmp_path, start, monkeypatch):
    """With a learning rate of 0 every ratio is 1 and each KL 0, to the last bit in fp32, over
    several steps per pass, several passes and outputs that are not in the loss."""
    argv = [
        *SMALL_GRPO, "--num_steps", "2", "--lr", "0", "--num_updates", "2", "--num_minibatches",
        "2", "--batch_size", "4", "--micro_batch_size", "7", "--kl_coef", "0.3", "--reward",
        reward_file(tmp_path, digits_reward), "--init", start, "--run_dir", tmp_path / "grpo",
    ]  # fmt: skip
    run_script(train_grpo, argv, monkeypatch)
    for row in read_metrics(tmp_path / "grpo"):
        assert row["kl"] == row["loss_kl"] == row["kl_old"] == 0.0 and row["ratio_max"] == 1.0
        assert row["grad_norm"] > 0 and row["sampler_gap"] > 0


def test_a_question_drawn_twice_makes_two_groups(tmp_path, start, monkeypatch):
    """The groups of one question that a batch holds twice are sampled apart from one another."""
    drawn, real = [], train_grpo.sample_groups
    monkeypatch.setattr(
        train_grpo, "sample_groups", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1]
    )
    argv = [*SMALL_GRPO, "--num_problems", "1", "--num_steps", "1", "--init", start]
    run_script(train_grpo, [*argv, "--run_dir", tmp_path / "grpo"], monkeypatch)
    tokens_PGT = drawn[0].tokens_PGT
    assert tokens_PGT.shape[:2] == (2, 4) and not torch.equal(tokens_PGT[0], tokens_PGT[1])


def test_heldout_problems_are_never_trained_on(tmp_path, start, monkeypatch):
    """What a run evaluates is of the held-out split, what it samples outputs of is not."""
    asked = {"train": [], "heldout": []}
    real_judge, real_metrics = train_grpo.judge, train_grpo.heldout_metrics

    def judge(rewards, problems, *rest):
        asked["train"] += problems
        return real_judge(rewards, problems, *rest)

    def metrics(model, tokenizer, problems, **rest):
        asked["heldout"] += problems
        return real_metrics(model, tokenizer, problems, **rest)

    monkeypatch.setattr(train_grpo, "judge", judge)
    monkeypatch.setattr(train_grpo, "heldout_metrics", metrics)
    argv = [*SMALL_GRPO, "--num_steps", "1", "--init", start, "--run_dir", tmp_path / "grpo"]
    run_script(train_grpo, argv, monkeypatch)
    for split, problems in asked.items():
        payloads = [problem.payload for problem in problems]
        assert {countdown.split_of(p["nums"], p["target"]) for p in payloads} == {split}


def test_batches_without_a_reward_or_a_difference_leave_the_weights_alone(
    tmp_path, start, monkeypatch
):
    """Every reward None, with a KL; every reward equal, without one: the run goes on,
    counts the steps it left out, and ends at the weights it began with."""
    # Countdown's problems have no reference answer: None; an untrained model has no format: 0.
    for reward, kl_coef, no_reward in (
        ("answer", "0.3", 8),
        ("answer", "0", 8),
        ("format", "0", 0),
    ):
        run_dir = tmp_path / f"{reward}-{kl_coef}"
        argv = [*SMALL_GRPO, "--reward", reward, "--reward_weights", "1", "--kl_coef", kl_coef]
        argv += ["--num_steps", "2", "--num_updates", "2", "--lr", "0.1", "--init", start]
        run_script(train_grpo, [*argv, "--run_dir", run_dir], monkeypatch)
        for row in read_metrics(run_dir):
            assert (row["empty_steps"], row["stepped"], row["grad_norm"]) == (2.0, 1.0, 0.0)
            assert (row["no_reward"], row["constant_groups"], row["loss"]) == (no_reward, 1.0, 0.0)
        assert all(map(torch.equal, load_weights(run_dir), load_weights(start)))


@pytest.mark.slow
def test_ranks_without_rows_or_rewards_do_not_hang(tmp_path, start):
    """Two processes share one question, so that one has no rows, and no output has a reward: after
    16 such steps both end, having saved, with the reason that only the other one knows."""
    argv = [
        *SMALL_GRPO, "--batch_size", "1", "--num_updates", "2", "--num_steps", "2",
        "--device", "cpu", "--init", start, "--run_dir", tmp_path / "two",
    ]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # Countdown's problems have no reference answer, hence no such reward.
    for flags in ([], ["--reward", "answer", "--num_steps", "20"]):
        argv[-1] = tmp_path / f"two-{len(flags)}"
        done = subprocess.run(
            [*command, ROOT / "train_grpo.py", *argv, *flags],
            capture_output=True, text=True, cwd=ROOT, timeout=120,
        )  # fmt: skip
        assert (done.returncode == 0) == (not flags), done.stderr[-3000:]
        rows = read_metrics(argv[-1])
        assert len(rows) == (16 if flags else 2)
        assert {row["no_reward"] for row in rows} == {4.0 if flags else 0.0}
        assert all(row["empty_steps"] == 2 for row in rows) or not flags
    said = (
        r"step 15: no output has had a reward for 16 steps: reward answer, problem \d+: it returned"
    )
    assert re.search(said, done.stderr)
    assert (argv[-1] / "checkpoints" / "step-000016" / "COMMIT").exists()


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, tokenizer, monkeypatch):
    """torchrun with two sharded processes samples the same tokens and ends at the same weights."""
    start = save_start(tmp_path / "start", tokenizer, torch.float64)
    reward = "def digits(p, text):\n    return sum(ord(c) % 2 == 0 for c in text) / 9\n"
    (tmp_path / "rewards.py").write_text(reward)
    argv = [
        *SMALL_GRPO, "--batch_size", "5", "--num_updates", "2", "--kl_coef", "0.3", "--lr", "0.01",
        "--num_iterations", "2", "--num_steps", "2", "--device", "cpu", "--init", str(start),
        "--reward", f"{tmp_path}/rewards.py:digits", "--reward_weights", "1.0",
    ]  # fmt: skip
    run_script(train_grpo, [*argv, "--run_dir", tmp_path / "one"], monkeypatch)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, ROOT / "train_grpo.py", *argv, "--run_dir", tmp_path / "two"],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    weights = [
        torch.cat([p.detach().flatten() for p in load_weights(tmp_path / name)])
        for name in ("one", "two", "start")
    ]
    assert (weights[0] - weights[1]).abs().max() < 1e-8 < (weights[0] - weights[2]).abs().max()
    samples = [(tmp_path / name / "samples.txt").read_text() for name in ("one", "two")]
    assert samples[0] == samples[1] and "advantage" in samples[0]
    # The ranks had 3 and 2 questions, and 2 and 2 held-out problems: no mean of means is the same.
    one, two = (rows_without_times(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 4 and one[2]["kl"] < one[1]["kl"]
    for rows in zip(one, two, strict=True):
        assert rows[0] == pytest.approx(rows[1], rel=1e-6, abs=1e-9)


def load_weights(run_dir):
    return load.load_model(run_dir, device="cpu")[0].parameters()


def test_what_would_fail_in_the_first_step_is_refused_before_it(
    tmp_path, start, monkeypatch, capsys
):
    """Prompts over the model's context, two rewards of one name, uneven minibatches, a cache too
    small for one output: one line."""
    argv = [*SMALL_GRPO, "--init", start, "--run_dir", tmp_path / "grpo"]
    text = message(train_grpo, [*argv, "--prompt_style", "full"], monkeypatch, capsys)
    assert "a context of 64" in text and "--prompt_style" in text
    twice = ["--reward", "format", "format"]
    assert "different function names" in message(train_grpo, [*argv, *twice], monkeypatch, capsys)
    text = message(train_grpo, [*argv, "--num_minibatches", "3"], monkeypatch, capsys)
    assert "--batch_size 2 must divide" in text
    text = message(train_grpo, [*argv, "--cache_gb", "1e-9"], monkeypatch, capsys)
    assert "cache_gb 1e-09 holds no single sample" in text
    assert not (tmp_path / "grpo" / "config.json").exists()


def test_prompts_that_fill_the_context_are_dropped_and_named(
    tmp_path, start, tokenizer, monkeypatch, capsys
):
    """Too long a prompt is left out by its line's number before anything is drawn, and the run goes
    on with the others; with none left one line says what to shorten."""
    long, path = " ".join(["word"] * 200), tmp_path / "own.jsonl"
    # The shortest of the long prompts fills the context to the last token.
    asked = [benchmarks.make_prompt(f"What is {i} + 1?{long}") for i in range(0, 40, 8)]
    limit = min(len(tokenizer.encode(prompt, bos=True)) for prompt in asked)
    save_start(tmp_path / "wide", tokenizer, torch.float32, max_context=limit)

    def write(questions):
        rows = [{"question": question, "answer": "#### 1"} for question in questions]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write([f"What is {i} + 1?{long if i % 8 == 0 else ''}" for i in range(40)])
    argv = [*SMALL_GRPO, "--init", tmp_path / "wide", "--problems", path, "--reward", "answer"]
    argv += ["--num_steps", "3", "--batch_size", "8", "--group_size", "2"]
    seen, real = [], train_grpo.sample_groups
    monkeypatch.setattr(
        train_grpo, "sample_groups", lambda model, prompts, *a, **k: (
            seen.extend(map(len, prompts)) or real(model, prompts, *a, **k)
        ),
    )  # fmt: skip
    run_script(train_grpo, [*argv, "--run_dir", tmp_path / "grpo"], monkeypatch)
    shown = capsys.readouterr().out
    assert "problems, " in shown and "3 steps of 8 questions x 2 outputs; reward answer" in shown
    assert "grpo: all 3 steps are done" in shown and "before --max_new_tokens" not in shown
    named = [line for line in shown.splitlines() if "left out" in line]
    ids = sorted(int(i) for line in named for i in line.split("own.jsonl ")[1].split(", "))
    splits = benchmarks.read_splits(path)
    assert ids == sorted(q.id for q in [*splits[0], *splits[1]] if long in q.prompt)
    assert len(named) == 1 and len(ids) == 5  # once for both splits
    assert len(seen) == 24 and max(seen) < limit
    one_rank = SimpleNamespace(is_main=True)
    cfg = train_grpo.GRPOConfig(problems=str(path), init="wide", max_new_tokens=limit)
    run_problems.drop_long_prompts(cfg, splits, tokenizer, limit, one_rank)
    assert f"after 35 of 40 prompts the context of wide ({limit} tokens) ends an output" in (
        capsys.readouterr().out
    )
    write([f"What is {i} + 1?{long}" for i in range(40)])
    argv += ["--run_dir", tmp_path / "none"]
    text = message(train_grpo, argv, monkeypatch, capsys)
    assert f"a context of {limit}" in text and "shorten the questions" in text
    assert "--prompt_style" not in text


def test_no_reference_is_held_without_a_kl(tmp_path, start, monkeypatch):
    """--kl_coef 0 loads, copies and saves no reference, and the run trains."""
    copied = []
    monkeypatch.setattr(train_grpo, "copy_weights", lambda *models: copied.append(models))
    reward = "def even(p, text):\n    return sum(ord(c) % 2 == 0 for c in text) / 9\n"
    (tmp_path / "rewards.py").write_text(reward)
    argv = [*SMALL_GRPO, "--init", start, "--reward", f"{tmp_path}/rewards.py:even"]
    for kl_coef, files in (("0", {"model", "optim"}), ("0.1", {"model", "optim", "reference"})):
        run_dir = tmp_path / kl_coef
        flags = ["--kl_coef", kl_coef, "--run_dir", run_dir, "--num_steps", "1"]
        run_script(train_grpo, [*argv, *flags], monkeypatch)
        found = (run_dir / "checkpoints" / "step-000001").glob("*.safetensors")
        assert {path.name.split("-")[0] for path in found} == files
        assert len(copied) == (kl_coef != "0")
    start_weights, run_weights = (load_weights(folder) for folder in (start, tmp_path / "0"))
    assert any((a - b).abs().max() > 0 for a, b in zip(start_weights, run_weights, strict=True))


def test_unknown_reward_is_refused_before_anything_is_bound(tmp_path, start, monkeypatch, capsys):
    """A mistyped reward is one line, and the corrected command may use the same run folder."""
    argv = [*SMALL_GRPO, "--init", start, "--run_dir", tmp_path / "grpo", "--reward_weights", "1"]
    assert "nope" in message(train_grpo, [*argv, "--reward", "nope"], monkeypatch, capsys)
    run_script(train_grpo, [*argv, "--reward", "format", "--num_steps", "1"], monkeypatch)
    assert len(read_metrics(tmp_path / "grpo")) == 1


def test_grpo_on_own_problems(tmp_path, tokenizer, monkeypatch, capsys):
    """--problems trains on a file of questions and answers, one in ten held out, by --reward
    answer; a line that is skipped is named once, and so is a reference that cannot be judged;
    Countdown's reward is refused with the fix."""
    start = save_start(tmp_path / "start", tokenizer, torch.float32, max_context=128)
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(120)]
    (tmp_path / "own.jsonl").write_text("{\n" + "".join(json.dumps(row) + "\n" for row in rows))
    held_out = benchmarks.read_splits(tmp_path / "own.jsonl")[1][0].id
    rows[held_out - 2]["answer"] = "nan"
    (tmp_path / "own.jsonl").write_text("{\n" + "".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    argv = [*SMALL_GRPO, "--init", start, "--run_dir", tmp_path / "grpo"]
    argv += ["--num_steps", "2", "--problems", tmp_path / "own.jsonl"]
    assert "needs --reward answer" in message(train_grpo, argv, monkeypatch, capsys)
    argv += ["--reward", "answer"]
    run_script(train_grpo, argv, monkeypatch)
    last = read_metrics(tmp_path / "grpo")[-1]
    assert (last["reward_answer"], last["no_reward"], last["heldout_pass@1"]) == (0.0, 0.0, 0.0)
    shown = capsys.readouterr()
    assert shown.err.count("skipped 1 of 121 lines") == 1
    assert shown.out.count("references cannot be judged") == 1
    assert f"own.jsonl:{held_out}: 'nan'" in shown.out
    parts = benchmarks.read_splits(tmp_path / "own.jsonl")
    assert len(parts[0]) + len(parts[1]) == 120
    assert 1 <= len(parts[1]) < 30
    assert not {p.id for p in parts[0]} & {p.id for p in parts[1]}
    (tmp_path / "own.jsonl").write_text(json.dumps(rows[0]) + "\n")
    argv[argv.index(tmp_path / "grpo")] = tmp_path / "other"
    assert "split; give more" in message(train_grpo, argv, monkeypatch, capsys)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_trainers_recompute_activations(tmp_path, start, monkeypatch, mode):
    """GRPO and SFT with --activation_checkpointing end at the same bits, having recomputed."""
    (tmp_path / "sft.jsonl").write_text('{"prompt": "1+1=", "solution": "2"}\n' * 9)
    sft = ["--preset", "smoke", "--context", "32", "--batch_size", "4", "--data",
           tmp_path / "sft.jsonl"]  # fmt: skip
    for module, argv in ((train_grpo, SMALL_GRPO), (train_sft, sft)):
        weights = {}
        for flag in ("none", mode):
            run_dir = tmp_path / module.__name__ / flag
            calls, real = [], activations.checkpoint

            def counted(*args, calls=calls, real=real, **kwargs):
                calls.append(1)
                return real(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(activations, "checkpoint", counted)
                flags = ["--activation_checkpointing", flag, "--num_steps", "2"]
                run_script(
                    module, [*argv, *flags, "--init", start, "--run_dir", run_dir], monkeypatch
                )
            assert bool(calls) == (flag != "none")
            weights[flag] = torch.cat([p.detach().flatten() for p in load_weights(run_dir)])
        assert torch.equal(weights["none"], weights[mode])


# ------------------------------------------------------------------------------- kills and signals


class Killed(BaseException):
    """Ends a run in the middle of a step, as a kill would."""


def rows_without_times(run_dir) -> list[dict]:
    return [
        {k: v for k, v in row.items() if not any(fnmatch(k, name) for name in MEASURED)}
        for row in read_metrics(run_dir)
    ]


def files_of(run_dir) -> dict:
    """Return all that a GRPO run must leave the same, however it was cut."""
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    paths = [run_dir / "samples.txt", *newest.glob("*.safetensors")]
    files = {path.name: path.read_bytes() for path in paths}
    return files | {"newest": newest.name, "metrics": rows_without_times(run_dir)}


@pytest.mark.parametrize("settings", [(1, 1, 1), (2, 2, 2)])
def test_killed_and_resumed_grpo_equals_the_uninterrupted_run(
    tmp_path, start, monkeypatch, settings
):
    """GRPO cut between two optimizer steps, before and after the reference was refreshed, and
    continued each time is bit-exact: metrics, samples, policy, reference, moments."""
    num_iterations, num_updates, num_minibatches = settings
    argv = [
        *SMALL_GRPO, "--init", start, "--num_iterations", num_iterations, "--lr", "0.01",
        "--num_steps", 6 // num_iterations, "--num_updates", num_updates, "--kl_coef", "0.04",
        "--num_minibatches", num_minibatches, "--checkpoint_interval", "2", "--eval_interval", "2",
        "--reward", reward_file(tmp_path), "--reward_weights", "1.0",
    ]  # fmt: skip
    run_script(train_grpo, [*argv, "--run_dir", tmp_path / "whole"], monkeypatch)

    real, calls = train_grpo.policy_update, []
    for dies_in_step, resumes_at in ((3, 0), (5, 2)):  # the reference is refreshed in step 3
        calls.clear()
        last = (dies_in_step - resumes_at) * num_updates * num_minibatches + num_updates

        def dying(*args, last=last, **kwargs):
            calls.append(1)
            if len(calls) == last:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(train_grpo, "policy_update", dying)
        with pytest.raises(Killed):
            run_script(train_grpo, [*argv, "--run_dir", tmp_path / "cut"], monkeypatch)
        assert len(read_metrics(tmp_path / "cut")) == dies_in_step
        assert not (tmp_path / "cut" / "plots").exists()
    monkeypatch.setattr(train_grpo, "policy_update", real)
    run_script(train_grpo, [*argv, "--run_dir", tmp_path / "cut"], monkeypatch)

    whole, cut = files_of(tmp_path / "whole"), files_of(tmp_path / "cut")
    assert whole == cut and whole["newest"] == "step-000006" and len(whole) == 6
    rows = whole["metrics"]
    assert [row["step"] for row in rows if "heldout_pass@1" in row] == [0, 2, 4, 5]
    assert len(rows) == 6 and all(row["grad_norm"] > 0.001 for row in rows)
    assert any(row["kl"] > 1e-4 for row in rows) and {row["stepped"] for row in rows} == {1.0}
    assert (rows[3]["kl"] < rows[2]["kl"]) == (num_iterations == 2)
    assert whole["samples.txt"].count(b"=== step") == 4
    assert (tmp_path / "cut" / "plots" / "metrics.png").exists()


def test_evaluations_leave_training_as_it_is(tmp_path, start, monkeypatch, capsys):
    """However often held-out problems are asked, with samples or without, the weights end at the
    same bits; the row of step 0 is of the policy before any update, the last of the final one, and
    each row counts the seconds of its evaluations."""
    argv = [*SMALL_GRPO, "--init", start, "--num_steps", "3", "--lr", "0.01", "--reward",
            reward_file(tmp_path), "--reward_weights", "1.0"]  # fmt: skip
    asked = []

    def heldout_metrics(model, tokenizer, problems, *, num_samples, **settings):
        asked.append((torch.cat([p.detach().flatten() for p in model.parameters()]), num_samples))
        time.sleep(0.1)
        return real(model, tokenizer, problems, num_samples=num_samples, **settings)

    real = train_grpo.heldout_metrics
    monkeypatch.setattr(train_grpo, "heldout_metrics", heldout_metrics)
    weights, said = {}, []
    for interval, num_samples in ((1, 3), (9, 0)):
        run_dir = tmp_path / f"every-{interval}"
        flags = ["--eval_interval", interval, "--num_eval_samples", num_samples]
        run_script(train_grpo, [*argv, *flags, "--run_dir", run_dir], monkeypatch)
        weights[interval] = torch.cat([p.detach().flatten() for p in load_weights(run_dir)])
        said.append(capsys.readouterr().out.count("the loss starts at 0"))
    assert torch.equal(weights[1], weights[9]) and said == [1, 1]
    started = torch.cat([p.detach().flatten() for p in load_weights(start)])
    assert [num_samples for _, num_samples in asked] == [3, 3, 3, 3, 0, 0]
    for first, last in (asked[0::3], asked[4:]):
        assert torch.equal(first[0], started) and torch.equal(last[0], weights[1])
    for interval, counts in ((1, (1, 1, 2)), (9, (1, 0, 1))):
        for row, count in zip(read_metrics(tmp_path / f"every-{interval}"), counts, strict=True):
            assert row["seconds_evaluation"] >= 0.1 * count
    names = [{k for k in row if k.startswith("heldout")} for row in read_metrics(run_dir)]
    shown = {"heldout_pass@1", "heldout_reward"}
    assert names == [shown, set(), shown]
    names = {k for k in read_metrics(tmp_path / "every-1")[1] if k.startswith("heldout")}
    assert names == {*shown, "heldout_pass@3", "heldout_maj@3"}
    argv += ["--run_dir", tmp_path / "refused", "--num_eval_samples", "1"]
    text = message(train_grpo, argv, monkeypatch, capsys)
    assert "at least 2" in text


def test_every_metric_has_a_line_in_the_glossary(tmp_path, start, monkeypatch):
    """The names in metrics.jsonl of a run, one step of it skipped, and those of docs/metrics.md are
    the same; and all but what says that a step was skipped is plotted."""
    real = optim.clip_grad_norm
    norms = iter([float("nan"), 1.0, 1.0])
    monkeypatch.setattr(optim, "clip_grad_norm", lambda *args: real(*args) * next(norms))
    argv = [*SMALL_GRPO, "--init", start, "--num_steps", "3", "--run_dir", tmp_path / "grpo"]
    run_script(train_grpo, argv, monkeypatch)
    logged = {name for row in read_metrics(tmp_path / "grpo") for name in row} - {"step"}
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = page.split("|---|---|\n")[1].split("\n\n")[0]
    names = [
        name for line in table.splitlines() for name in re.findall("`([^`]+)`", line.split("|")[1])
    ]
    patterns = [name.replace("K", "[0-9]*") for name in names]
    assert len({*names}) == len(names)
    assert [name for name in logged if not any(fnmatch(name, p) for p in patterns)] == []
    assert [p for p in patterns if not any(fnmatch(name, p) for name in logged)] == []
    drawn = [name for _, panel in PANELS for name in panel]
    unseen = {name for name in logged if not any(fnmatch(name, p) for p in drawn)}
    assert unseen == {"loss", "no_reward", "stepped", "empty_steps", "skipped_problems"}
    assert [p for p in drawn if not any(fnmatch(name, p) for name in logged)] == []


def test_killed_and_resumed_sft_equals_the_uninterrupted_run(tmp_path, start, monkeypatch):
    """SFT cut between checkpoints and continued ends at the same bits, rate by rate."""
    examples = [{"prompt": f"{i}+1=", "solution": str(i + 1)} for i in range(9)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    argv = [
        "--preset",
        "smoke",
        "--threads",
        "1",
        "--init",
        start,
        "--data",
        tmp_path / "sft.jsonl",
    ]
    argv += ["--context", "32", "--batch_size", "2", "--num_steps", "6", "--schedule", "cosine"]
    argv += ["--warmup_steps", "2", "--checkpoint_interval", "2", "--seed", "3"]
    run_script(train_sft, [*argv, "--run_dir", tmp_path / "whole"], monkeypatch)
    real_log, real_batch, seeds = Run.log, PackedExamples.batch, []
    monkeypatch.setattr(
        PackedExamples, "batch", lambda *args: seeds.append(args[-1]) or real_batch(*args)
    )

    def dying_log(run, step, *args, **kwargs):
        real_log(run, step, *args, **kwargs)
        if step == 4:  # the newest checkpoint is of step 3
            raise Killed

    monkeypatch.setattr(Run, "log", dying_log)
    with pytest.raises(Killed):
        run_script(train_sft, [*argv, "--run_dir", tmp_path / "cut"], monkeypatch)
    monkeypatch.setattr(Run, "log", real_log)
    run_script(train_sft, [*argv, "--run_dir", tmp_path / "cut"], monkeypatch)
    rows, cut = rows_without_times(tmp_path / "whole"), rows_without_times(tmp_path / "cut")
    assert rows == cut and len(rows) == 6 and {*seeds} == {3}
    share = [cosine_lr(step, num_steps=6, peak=3e-3, warmup_steps=2) for step in range(6)]
    assert [row["lr"] for row in rows] == share
    assert all(map(torch.equal, *(load_weights(tmp_path / name) for name in ("whole", "cut"))))


@pytest.mark.parametrize("world_size", [2, 3])
def test_validation_counts_every_token_once_on_any_number_of_ranks(
    tmp_path, monkeypatch, world_size
):
    """Nats and tokens that the ranks add up are those of one rank, also where some of them have no
    row in the last batch."""
    write_shards(tmp_path / "t", [range(1, 30)] * 3, vocab_size=31, token_num_bytes=[1] * 31)
    valid, parts = TokenShards(tmp_path / "t"), []
    cfg = train_pretrain.PretrainConfig(context=9, micro_batch_size=2, max_valid_tokens=9 * 7)
    model = Transformer(ModelConfig(31, 1, 16, 2, 2, 16)).double()
    model.init_weights(0, std=0.2)
    monkeypatch.setattr(
        train_pretrain, "all_reduce_sum", lambda sums, dist: parts.append(sums) or sums
    )
    train_pretrain.bits_per_byte(model, valid, cfg, ALONE)
    for rank in range(world_size):
        dist = Dist(rank, rank, world_size, ALONE.device)
        with contextlib.suppress(ZeroDivisionError):  # a rank without rows, if it were alone
            train_pretrain.bits_per_byte(model, valid, cfg, dist)
    one, *others = parts
    assert one["tokens"] == 63 == sum(part["tokens"] for part in others)
    assert sum(part["nats"] for part in others) == pytest.approx(one["nats"], rel=1e-12)


def test_sigterm_saves_after_the_step_and_the_same_command_continues(tmp_path, start, monkeypatch):
    """A SIGTERM ends the run with status 0 and a checkpoint of the step it came in."""
    argv = [*SMALL_GRPO, "--init", start, "--run_dir", tmp_path / "grpo"]
    real_update = train_grpo.update

    def signalled_update(*args):
        signal.raise_signal(signal.SIGTERM)
        return real_update(*args)

    monkeypatch.setattr(train_grpo, "update", signalled_update)
    with pytest.raises(SystemExit) as end:
        run_script(train_grpo, argv, monkeypatch)
    assert end.value.code == 0
    assert (tmp_path / "grpo/checkpoints/step-000001/COMMIT").exists()
    monkeypatch.setattr(train_grpo, "update", real_update)
    run_script(train_grpo, argv, monkeypatch)
    assert [row["step"] for row in read_metrics(tmp_path / "grpo")] == list(range(6))


def test_sft_and_pretraining_lower_the_loss_and_resume_exactly(
    tmp_path, tokenizer, monkeypatch, capsys
):
    """Both trainers learn a repeated text, and a second call after the end changes nothing."""
    pages = [{"text": "1+1=2, 1+2=3, 2+2=4, 3+3=6. " * 8} for _ in range(40)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))
    tokenizer.save(tmp_path / "tokenizer")
    base = ["--preset", "smoke", "--threads", "1", "--corpus", tmp_path / "corpus.jsonl",
            "--valid", tmp_path / "corpus.jsonl", "--tokenizer", tmp_path / "tokenizer",
            "--run_dir", tmp_path / "base", "--context", "64", "--batch_size", "4"]  # fmt: skip
    run_script(train_pretrain, base, monkeypatch)
    rows = read_metrics(tmp_path / "base")
    assert rows[-1]["loss"] < rows[0]["loss"] - 1.0
    assert rows[-1]["valid_bits_per_byte"] < rows[9]["valid_bits_per_byte"]

    for path, change, words in (
        ("base/tokens/valid/shard-00000.bin", lambda raw: raw[:-1] + b"!", "bin: damaged, its sha"),
        ("corpus.jsonl", lambda raw: raw.replace(b"3+3=6", b"3+3=7"), "from another file"),
    ):
        raw = (tmp_path / path).read_bytes()
        (tmp_path / path).write_bytes(change(raw))
        assert words in message(train_pretrain, base, monkeypatch, capsys)
        (tmp_path / path).write_bytes(raw)

    examples = [{"prompt": "1+1=", "solution": "2"}, {"prompt": "3+3=", "solution": "6"}] * 20
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    sft = ["--preset", "smoke", "--threads", "1", "--init", tmp_path / "base",
           "--data", tmp_path / "sft.jsonl", "--context", "32", "--batch_size", "4"]  # fmt: skip
    run_script(train_sft, [*sft, "--run_dir", tmp_path / "sft"], monkeypatch)
    rows = read_metrics(tmp_path / "sft")
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    run_script(train_sft, [*sft, "--run_dir", tmp_path / "sft"], monkeypatch)
    assert read_metrics(tmp_path / "sft") == rows


def docs_block(after: str) -> str:
    """Return the indented block that follows a line of docs/models.md which ends with `after`."""
    text = (ROOT / "docs" / "models.md").read_text().split(after + "\n\n")[1]
    lines = []
    for line in text.splitlines():
        if line and not line.startswith("    "):
            break
        lines.append(line[4:])
    return "\n".join(lines).strip() + "\n"


@pytest.mark.slow
def test_docs_from_own_problems_and_reward_to_a_run(tmp_path, tokenizer):
    """The rows, reward file and commands of docs/models.md, on a tiny model and few outputs."""
    save_start(tmp_path / "start", tokenizer, torch.float32, max_context=512)
    row = json.loads(docs_block("has lines like"))
    rows = [{**row, "question": f"{row['question']} ({i})"} for i in range(40)]
    del rows[3]["steps"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_reward.py").write_text(docs_block("Say `my_reward.py` is"))
    commands = docs_block("Then train, evaluate and export:").replace("\\\n", "").splitlines()
    assert [command.split()[1] for command in commands] == ["train_grpo.py", "evaluate.py", "-m"]
    small = "--device cpu --threads 1 --max_new_tokens 8"
    extra = ["--batch_size 40 --group_size 4 --num_steps 1", "--num_samples 2"]
    commands[:2] = [f"{commands[i]} {small} {extra[i]}" for i in range(2)]
    for command in [
        "python -m nanomath.play.export --checkpoint start --out models/qwen",
        *commands,
    ]:
        argv = [sys.executable, *command.split()[1:]]
        if argv[1].endswith(".py"):
            argv[1] = str(ROOT / argv[1])
        done = subprocess.run(
            argv, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr[-3000:])
    (metrics,) = read_metrics(tmp_path / "runs/mine")
    train, _ = benchmarks.read_splits(tmp_path / "train.jsonl")
    drawn = [train[i] for i in epoch_order(len(train), 0, 40, 0)]
    unjudged = 4 * sum("steps" not in problem.payload["row"] for problem in drawn)
    assert metrics["no_reward"] == unjudged > 0 and metrics["reward"] == metrics["reward_score"]
    assert 0 <= metrics["heldout_reward"] <= 0.5  # the held-out rows' own fields reach the function
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_a_run_goes_on_when_its_reward_fails(tmp_path, start, monkeypatch, caplog):
    """A function that hangs, crashes and raises on some outputs: these are counted, and named, and
    the others' rewards are trained on."""
    (tmp_path / "bad.py").write_text(
        "import os\n"
        "def bad(problem, completion):\n"
        "    kind = sum(map(ord, completion)) % 16\n"
        "    if kind == 0:\n        os._exit(1)\n"
        "    while kind == 1:\n        pass\n"
        "    return 1 / (kind - 2)\n"
    )
    argv = [*SMALL_GRPO, "--init", start, "--run_dir", tmp_path / "grpo", "--num_steps", "3"]
    argv += ["--group_size", "12", "--reward", f"{tmp_path}/bad.py:bad", "format"]
    run_script(train_grpo, [*argv, "--reward_seconds", "0.7", "--reward_workers", "3"], monkeypatch)
    rows = read_metrics(tmp_path / "grpo")
    assert len(rows) == 3 and 0 < sum(row["no_reward"] for row in rows) < 3 * 24
    text = "\n".join(record.getMessage() for record in caplog.records)
    for failure in ("exit status 1", "more than 0.7 s", "ZeroDivisionError"):
        assert failure in text
    assert all("reward_format" in row for row in rows)


def test_a_run_in_which_nothing_is_rewarded_ends(tmp_path, start, monkeypatch):
    """So many steps in a row without any reward, counted over a restart, end the run with the
    functions, what failed last and a checkpoint; one fewer does not; mended, the same command goes
    on and does not count the old ones."""
    monkeypatch.setattr(run_problems, "MAX_STEPS_WITHOUT_REWARD", 4)
    broken, file = tmp_path / "broken", tmp_path / "mine.py"
    file.write_text(
        "from pathlib import Path\n"
        "def mine(problem, text):\n"
        f"    if Path({str(broken)!r}).exists():\n"
        "        raise OSError('no such service')\n"
        "    return len(text)\n"
    )
    argv = [*SMALL_GRPO, "--init", start, "--run_dir", tmp_path / "grpo", "--num_steps", "12"]
    argv += ["--reward", f"{file}:mine", "format", "--checkpoint_interval", "100"]
    broken_steps, stopped_after = {0, 1, 2, 4, 5, 6, 7}, 5
    real = train_grpo.judge

    def judge(rewards, *args):
        step = len(read_metrics(tmp_path / "grpo"))
        broken.touch() if step in broken_steps else broken.unlink(missing_ok=True)
        if step == stopped_after:
            signal.raise_signal(signal.SIGTERM)
        return real(rewards, *args)

    monkeypatch.setattr(train_grpo, "judge", judge)
    for words in ("0", f"step 7: no output has had a reward for 4 steps: reward {file}:mine, "):
        with pytest.raises(SystemExit) as end:
            run_script(train_grpo, argv, monkeypatch)
        assert str(end.value).startswith(words)
    assert "OSError: no such service (mine.py, line 4). Mend that" in str(end.value)
    assert "format" not in str(end.value)
    assert (tmp_path / "grpo/checkpoints/step-000008/COMMIT").exists()
    broken_steps |= {9, 10, 11}
    run_script(train_grpo, argv, monkeypatch)
    rows = read_metrics(tmp_path / "grpo")
    assert [row["step"] for row in rows if row["no_reward"] == 8] == sorted(broken_steps)
    assert len(rows) == 12


# ------------------------------------------------------------------------------ the same run


def test_a_run_continues_without_its_init(tmp_path, start, monkeypatch, capsys):
    """A run that has a checkpoint needs --init no more: moved away, it ends as if it were there;
    a run without a checkpoint still names what is missing."""
    init = tmp_path / "init"
    shutil.copytree(start, init)
    argv = [*SMALL_GRPO, "--init", init, "--checkpoint_interval", "2"]
    for name in ("whole", "cut"):
        stop_after(monkeypatch, 3 if name == "cut" else None)
        with contextlib.suppress(SystemExit):
            run_script(train_grpo, [*argv, "--run_dir", tmp_path / name], monkeypatch)
    stop_after(monkeypatch, None)
    shutil.rmtree(init)
    run_script(train_grpo, [*argv, "--run_dir", tmp_path / "cut"], monkeypatch)
    whole, cut = (unmeasured(read_metrics(tmp_path / name)) for name in ("whole", "cut"))
    assert cut == whole and len(cut) == 6
    for a, b in zip(load_weights(tmp_path / "whole"), load_weights(tmp_path / "cut"), strict=True):
        assert torch.equal(a, b)
    capsys.readouterr()
    text = message(train_grpo, [*argv, "--run_dir", tmp_path / "new"], monkeypatch, capsys)
    assert f"no checkpoint under {init}" in text


def unmeasured(rows):
    return [
        {k: v for k, v in row.items() if not any(fnmatch(k, name) for name in MEASURED)}
        for row in rows
    ]


REAL_UPDATE = train_grpo.update


def stop_after(monkeypatch, num_updates):
    """Send a SIGTERM in this update of the next run; None: none."""
    calls = []

    def update(*args):
        calls.append(None)
        if len(calls) == num_updates:
            signal.raise_signal(signal.SIGTERM)
        return REAL_UPDATE(*args)

    monkeypatch.setattr(train_grpo, "update", update)


def test_a_run_refuses_other_data_than_it_began_with(tmp_path, tokenizer, monkeypatch, capsys):
    """A changed problems file, SFT file or corpus is refused by name when the run goes on; the
    same contents in another place, or said of a run that noted none, are not."""
    start = save_start(tmp_path / "start", tokenizer, torch.float32, max_context=128)
    rows = [{"question": f"{i} + 1", "answer": f"#### {i + 1}"} for i in range(30)]
    write_jsonl(tmp_path / "own.jsonl", rows)
    argv = [*SMALL_GRPO, "--init", start, "--run_dir", tmp_path / "grpo", "--reward", "answer"]
    argv += ["--problems", tmp_path / "own.jsonl", "--checkpoint_interval", "1"]
    stop_after(monkeypatch, 2)
    with pytest.raises(SystemExit):
        run_script(train_grpo, argv, monkeypatch)
    stop_after(monkeypatch, None)
    for changed in ([*rows[:-1], {**rows[-1], "answer": "#### 7"}], rows[::-1], rows[1:]):
        write_jsonl(tmp_path / "own.jsonl", changed)
        text = message(train_grpo, argv, monkeypatch, capsys)
        assert "other contents of --problems" in text and "--run_dir" in text
    write_jsonl(tmp_path / "own.jsonl", rows)
    state = tmp_path / "grpo/checkpoints/step-000002/state.json"
    assert set(json.loads(state.read_text())["data"]) == {"--problems", "--init's tokenizer"}
    run_script(train_grpo, argv, monkeypatch)
    assert len(read_metrics(tmp_path / "grpo")) == 6

    texts = [{"prompt": f"{i} + 1 =", "solution": f" {i + 1}"} for i in range(30)]
    write_jsonl(tmp_path / "sft.jsonl", texts)
    sft = ["--preset", "smoke", "--threads", "1", "--init", start, "--run_dir", tmp_path / "sft",
           "--batch_size", "2", "--context", "32", "--num_steps", "4", "--checkpoint_interval", "1",
           "--data"]  # fmt: skip
    run_script(train_sft, [*sft, tmp_path / "sft.jsonl"], monkeypatch)
    write_jsonl(tmp_path / "moved.jsonl", texts)
    run_script(train_sft, [*sft, tmp_path / "moved.jsonl"], monkeypatch)
    write_jsonl(tmp_path / "sft.jsonl", texts[1:])
    text = message(train_sft, [*sft, tmp_path / "sft.jsonl"], monkeypatch, capsys)
    assert "other contents of --data" in text

    pages = [{"text": f"1 + {i} = {i + 1}. " * 8} for i in range(40)]
    write_jsonl(tmp_path / "pages.jsonl", pages)
    tokenizer.save(tmp_path / "tokenizer")
    base = ["--preset", "smoke", "--threads", "1", "--corpus", tmp_path / "pages.jsonl",
            "--valid", tmp_path / "pages.jsonl", "--tokenizer", tmp_path / "tokenizer",
            "--run_dir", tmp_path / "base", "--context", "64", "--batch_size", "2",
            "--num_steps", "2", "--checkpoint_interval", "1"]  # fmt: skip
    run_script(train_pretrain, base, monkeypatch)
    write_jsonl(tmp_path / "pages.jsonl", pages[1:])
    shutil.rmtree(tmp_path / "base" / "tokens")  # tokenized anew, nothing there tells
    text = message(train_pretrain, base, monkeypatch, capsys)
    assert "other contents of --corpus, --valid" in text


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_changed_reward_file_is_named_and_the_run_goes_on(tmp_path, start, monkeypatch, capsys):
    """A reward function may be mended within a run; that it has changed is said once."""
    path = tmp_path / "mine.py"
    path.write_text("def even(problem, text):\n    return len(text) % 2\n")
    argv = [*SMALL_GRPO, "--init", start, "--run_dir", tmp_path / "grpo", "--reward",
            f"{path}:even", "--checkpoint_interval", "1"]  # fmt: skip
    stop_after(monkeypatch, 2)
    with pytest.raises(SystemExit):
        run_script(train_grpo, argv, monkeypatch)
    stop_after(monkeypatch, None)
    assert "has changed" not in capsys.readouterr().out
    path.write_text("def even(problem, text):\n    return len(text) % 3\n")
    run_script(train_grpo, argv, monkeypatch)
    assert f"note: --reward {path} has changed since step 2" in capsys.readouterr().out
    run_script(train_grpo, argv, monkeypatch)
    assert "has changed" not in capsys.readouterr().out


# ------------------------------------------------------------------------------ left evaluations


def signal_in_evaluation(monkeypatch, number):
    """Send a SIGTERM in the evaluation of this number, before its last output; None: none."""
    calls = []

    def evaluate_problems(*args, **settings):
        calls.append(None)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("the evaluation went on")
        return real(*args, **settings)

    real = evaluation.evaluate_problems
    monkeypatch.setattr(evaluation, "evaluate_problems", evaluate_problems)


def test_sigterm_in_an_evaluation_leaves_it_and_saves(tmp_path, start, monkeypatch, capsys):
    """A SIGTERM while held-out problems are sampled ends the run at once, with a checkpoint of what
    was done; continued, it ends as one that was never cut. In the last evaluation the update
    stands, and the row has no held-out figures."""
    argv = [*SMALL_GRPO, "--init", start, "--checkpoint_interval", "50", "--eval_interval", "2"]
    run_script(train_grpo, [*argv, "--run_dir", tmp_path / "whole"], monkeypatch)
    whole = unmeasured(read_metrics(tmp_path / "whole"))
    for number, step in ((1, 0), (2, 2), (3, 4)):  # evaluations at steps 0, 2 and 4
        run_dir = tmp_path / f"cut-{number}"
        signal_in_evaluation(monkeypatch, number)
        with pytest.raises(SystemExit) as end:
            run_script(train_grpo, [*argv, "--run_dir", run_dir], monkeypatch)
        assert end.value.code == 0
        saved = [path.name for path in (run_dir / "checkpoints").glob("step-*")]
        assert saved == ([f"step-{step:06d}"] if step else [])
        if number == 2:  # again, with nothing done in between: nothing to save, no error
            signal_in_evaluation(monkeypatch, 1)
            with pytest.raises(SystemExit) as end:
                run_script(train_grpo, [*argv, "--run_dir", run_dir], monkeypatch)
            assert end.value.code == 0
        signal_in_evaluation(monkeypatch, None)
        run_script(train_grpo, [*argv, "--run_dir", run_dir], monkeypatch)
        assert unmeasured(read_metrics(run_dir)) == whole
    signal_in_evaluation(monkeypatch, 4)
    capsys.readouterr()
    run_script(train_grpo, [*argv, "--run_dir", tmp_path / "last"], monkeypatch)
    *before, last = unmeasured(read_metrics(tmp_path / "last"))
    assert before == whole[:-1]
    assert last == {k: v for k, v in whole[-1].items() if not k.startswith("heldout")}
    assert "the last evaluation was left" in capsys.readouterr().out


def test_sigterm_in_a_validation_leaves_it(tmp_path, tokenizer, monkeypatch):
    """Pretraining leaves a validation, saves the step and ends."""
    pages = [{"text": f"1 + {i} = {i + 1}. " * 8} for i in range(40)]
    write_jsonl(tmp_path / "pages.jsonl", pages)
    tokenizer.save(tmp_path / "tokenizer")
    base = ["--preset", "smoke", "--threads", "1", "--corpus", tmp_path / "pages.jsonl",
            "--valid", tmp_path / "pages.jsonl", "--tokenizer", tmp_path / "tokenizer",
            "--run_dir", tmp_path / "base", "--context", "64", "--batch_size", "2",
            "--num_steps", "4", "--eval_interval", "2"]  # fmt: skip
    real = TokenShards.sequential

    def sequential(self, *args):
        signal.raise_signal(signal.SIGTERM)
        return real(self, *args)

    monkeypatch.setattr(TokenShards, "sequential", sequential)
    with pytest.raises(SystemExit) as end:
        run_script(train_pretrain, base, monkeypatch)
    assert end.value.code == 0
    assert (tmp_path / "base/checkpoints/step-000002/COMMIT").exists()
    rows = read_metrics(tmp_path / "base")
    assert len(rows) == 2 and "valid_bits_per_byte" not in rows[1]


# ------------------------------------------------------------------------------ divergence


def test_a_diverged_run_ends_with_one_line(tmp_path, start, monkeypatch, capsys):
    """Weights that are no longer finite: the line names the step, the cause and the fix, and
    metrics.jsonl stays strict JSON."""

    def broken_update(cfg, policy, *args):
        metrics = REAL_UPDATE(cfg, policy, *args)
        policy.embedding.weight.data.fill_(float("nan"))
        return metrics | {"grad_norm": float("inf"), "kl": float("nan")}

    monkeypatch.setattr(train_grpo, "update", broken_update)
    argv = [*SMALL_GRPO, "--init", start, "--run_dir", tmp_path / "grpo"]
    text = message(train_grpo, argv, monkeypatch, capsys)
    for part in ("grpo, step 1: sample", "not finite", "weights have diverged", "--lr", "none"):
        assert part in text

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    lines = (tmp_path / "grpo/metrics.jsonl").read_text().splitlines()
    (row,) = [json.loads(line, parse_constant=refuse) for line in lines]
    assert row["grad_norm"] is None and row["kl"] is None


def test_a_clip_range_that_changes_nothing_is_said(tmp_path, start, monkeypatch, capsys):
    """With one update per batch every ratio is 1: a clip range given is named in one line; with
    two updates, or the defaults, it is not."""
    argv = [*SMALL_GRPO, "--init", start, "--num_steps", "1", "--run_dir"]
    for i, (flags, names) in enumerate((
        ([], None),
        (["--clip_eps", "0.2"], None),
        (["--clip_eps", "0.9"], "--clip_eps"),
        (["--clip_eps", "0"], "--clip_eps"),
        (["--clip_eps_high", "0.28"], "--clip_eps_high"),
        (["--clip_eps", "0.1", "--clip_eps_high", "0.28"], "--clip_eps and --clip_eps_high"),
        (["--clip_eps", "0.9", "--num_updates", "2"], None),
        (["--clip_eps", "0.9", "--num_minibatches", "2"], None),
    )):  # fmt: skip
        run_script(train_grpo, [*argv, tmp_path / str(i), *flags], monkeypatch)
        out = capsys.readouterr().out
        assert (f"note: {names} will change nothing" in out) == (names is not None)
        assert ("will change nothing" in out) == (names is not None)


def test_kl_coef_0_passes_only_outputs_with_an_advantage(tmp_path, start, monkeypatch):
    """Without a KL the trainer's batches leave out outputs of advantage 0; with one, none."""
    seen = []

    def counted_update(cfg, policy, optimizer, batch, *args):
        rows = [row for rows in batch.micro_batches(1) for row in rows]
        with_advantage = [bool(a.any()) for a in batch.advantages_N.split(batch.response_lengths)]
        seen.append((len(rows), sum(with_advantage), len(batch)))
        return REAL_UPDATE(cfg, policy, optimizer, batch, *args)

    monkeypatch.setattr(train_grpo, "update", counted_update)
    path = tmp_path / "mine.py"
    path.write_text(
        "def r(problem, text):\n    return len(text) % 2 * (problem.payload['target'] % 2)\n"
    )
    for kl_coef in ("0", "0.1"):
        argv = [*SMALL_GRPO, "--init", start, "--run_dir", tmp_path / kl_coef, "--kl_coef", kl_coef]
        run_script(train_grpo, [*argv, "--reward", f"{path}:r"], monkeypatch)
    without, with_kl = seen[:6], seen[6:]
    assert all(passed == moved for passed, moved, _ in without)
    assert any(moved < count for _, moved, count in without)
    assert all(passed == count for passed, _, count in with_kl)
