"""Train a policy by Group Relative Policy Optimization (Sec. 4, Algorithm 1).

    python train_grpo.py --preset cpu --init runs/sft --run_dir runs/grpo
    python train_grpo.py --init models/qwen --chat_template chatml --problems mine.jsonl \\
        --reward answer
    torchrun --nproc_per_node 8 train_grpo.py --init runs/sft      # the paper's settings

`train` reads as Algorithm 1. What its phases do is in sampler.py (sampling), rewards.py (rewards),
advantages.py (advantages, weights) and grpo.py (the objective of Eq. 3 and 4, the update). The same
command continues a run.
"""

import math
import sys
from dataclasses import dataclass
from functools import partial

import torch

from kernels.rows import KL_ESTIMATORS
from nanomath.advantages import ADVANTAGES, LOSS_NORMS, outcome_advantages, output_weights
from nanomath.chat import CHOICES, use_template
from nanomath.checkpoint import load_model
from nanomath.config import RunConfig, one_line_errors, opt, parse
from nanomath.data import epoch_order
from nanomath.dist import (
    Dist,
    copy_weights,
    make_replica,
    refresh_replica,
)
from nanomath.grpo import (
    Objective,
    RolloutBatch,
    make_batch,
    policy_update,
    response_logprobs,
    update_metrics,
)
from nanomath.lock import RunLock
from nanomath.model import Transformer
from nanomath.monitor import (
    SHOWN,
    WHY_LOSS_IS_0,
    Clock,
    cost_metrics,
    draw_plots,
    heldout_metrics,
    rollout_metrics,
    sample_lines,
)
from nanomath.optim import SCHEDULES, make_adamw
from nanomath.rewards import Rewards
from nanomath.run import Run, open_run
from nanomath.sampler import Rollouts, sample_groups
from nanomath.tasks import Problem, benchmarks, countdown, encode_prompt
from nanomath.tokenizer import Tokenizer


@dataclass(frozen=True)
class GRPOConfig(RunConfig):
    run_dir: str = opt("runs/grpo", "folder of this run", may_change=True)
    init: str = opt(
        "runs/speedrun-cpu/sft",
        "run folder, checkpoint or Hugging Face folder to start from",
        may_change=True,
    )
    chat_template: str = opt(
        "auto", "layout of a prompt, see chat.py; auto: as trained, else plain", choices=CHOICES
    )
    # Problems
    problems: str | None = opt(
        None,
        "your own JSONL of question and answer, instead of Countdown; one in ten is held out; "
        "needs --reward answer, or your own",
    )
    num_numbers: tuple[int, ...] = opt((3, 4), "numbers per Countdown problem", low=2, high=5)
    max_number: int = opt(99, "largest given number", low=1)
    max_target: int = opt(100, "largest target", low=1)
    num_problems: int = opt(20_000, "training problems; of --problems, at most", low=1)
    prompt_style: str = opt("short", "prompt wording", choices=countdown.STYLES)
    # Algorithm 1
    num_iterations: int = opt(1, "outer iterations I: reference <- policy at each", low=1)
    num_steps: int = opt(144, "steps M per iteration (paper silent)", low=1)
    batch_size: int = opt(16, "questions per step P over all ranks, Sec. 4.2: 1024 outputs", low=1)
    group_size: int = opt(64, "outputs per question G, Sec. 4.2", low=2)
    max_new_tokens: int = opt(1024, "tokens per output at most, Sec. 4.2", low=1)
    temperature: float = opt(1.0, "sampling temperature (paper silent)", low=1e-3)
    max_rows: int = opt(512, "outputs sampled at a time, per process", low=1, may_change=True)
    cache_gb: float = opt(
        0.0, "GB for keys and values, fewer rows if need be; 0: any", low=0.0, may_change=True
    )
    num_updates: int = opt(1, "passes mu over each batch, Sec. 4.2", low=1)
    num_minibatches: int = opt(1, "optimizer steps per pass (paper silent)", low=1)
    # Objective and optimizer
    clip_eps: float = opt(0.2, "clip range eps of Eq. 3 (paper silent)", low=0.0)
    clip_eps_high: float | None = opt(
        None, "clip range above 1 (DAPO: 0.28); none: --clip_eps", low=0.0
    )
    kl_coef: float = opt(0.04, "weight beta of the KL to the reference, Sec. 4.2", low=0.0)
    kl_estimator: str = opt("k3", "estimate of the KL; k3: Eq. 4", choices=KL_ESTIMATORS)
    advantage: str = opt(
        "std",
        "reward less its group's mean; std: over its std, Sec. 4.1.2; leave_one_out: less the mean "
        "of the others (RLOO)",
        choices=ADVANTAGES,
    )
    loss_norm: str = opt(
        "response",
        "weight of a token; response: 1/|o_i|, Eq. 3; token: the same for all of a batch (DAPO); "
        "constant: 1/--max_new_tokens (Dr. GRPO)",
        choices=LOSS_NORMS,
    )
    mask_truncated: bool = opt(
        False, "outputs without an end leave the loss, but not their group's mean, std and G"
    )
    drop_constant_groups: bool = opt(
        False, "groups of equal rewards leave the loss and P, instead of counting with advantage 0"
    )
    lr: float = opt(1e-6, "learning rate, Sec. 4.2", low=0.0)
    schedule: str = opt(
        "constant", "learning rate over steps (paper silent)", choices=(*SCHEDULES,)
    )
    warmup_steps: int = opt(0, "steps of linear warm-up (paper silent)", low=0)
    beta1: float = opt(0.9, "AdamW (paper silent: as in pretraining)", low=0.0, high=1.0)
    beta2: float = opt(0.95, "AdamW (paper silent: as in pretraining)", low=0.0, high=1.0)
    # Rewards
    reward: tuple[str, ...] = opt(
        ("format", "equation"),
        "one or several, summed: format, equation, answer, my_file.py:my_function",
    )
    reward_weights: tuple[float, ...] = opt((), "a weight for each reward function; none: 1 each")
    reward_seconds: float = opt(
        10.0,
        "time limit of a function of yours on one output; beyond it there is no reward",
        low=0.1,
        high=120.0,
        may_change=True,
    )
    reward_workers: int = opt(
        0,
        "processes for functions of yours, per rank; 0: its share of the cores, at most 8",
        low=0,
        may_change=True,
    )
    # What is shown
    eval_interval: int = opt(25, "steps between held-out evaluations", low=1)
    num_eval_problems: int = opt(200, "problems of one held-out evaluation", low=1)
    num_eval_samples: int = opt(
        8, "samples K per held-out problem for Pass@K and Maj@K; 0: greedy answers only", low=0
    )
    eval_temperature: float = opt(0.7, "temperature of those samples, Sec. 5.2.2", low=1e-3)


# GSM8K's training file, one question in ten held out. DEVIATION: Sec. 4.2 adds MATH's training set,
# 144K questions in all. Rates, KL and batch are Sec. 4.2's, the defaults.
_GSM8K = {"problems": "data/gsm8k_train.jsonl", "reward": ("answer",)}
# From chat models, as in Sec. 4.2: they end their answers and box them before any training. What
# the presets of real models need of a machine: nanomath/plan.py, by the same names.
_GSM8K_QWEN = {
    **_GSM8K,
    "chat_template": "chatml",
    "max_new_tokens": 512,  # as verl's GSM8K runs of these models (docs/algo/baseline.md)
    "num_steps": 417,  # once through the 6,676 questions
}
PRESETS = {
    "gsm8k_qwen_0b5": {
        **_GSM8K_QWEN,
        "init": "models/Qwen2.5-0.5B-Instruct",
        "micro_batch_size": 4,  # fits 24 GB
    },
    "gsm8k_qwen_1b5": {**_GSM8K_QWEN, "init": "models/Qwen2.5-1.5B-Instruct"},
    "deepseekmath_7b": {  # Sec. 4.2 on 8 GPUs of 80 GB, or 16
        **_GSM8K,
        "init": "models/deepseek-math-7b-instruct",
        "chat_template": "deepseekmath",
        "activation_checkpointing": "full",
        "cache_gb": 40.0,  # 78 of a GPU's 128 outputs at a time: all of them would take 65 GB
    },
    # The well-known Countdown run (philschmid.de/mini-deepseek-r1): 3 GPUs trained on one question
    # each, 8 times per step, and a fourth sampled. Here all 4 do both.
    "countdown_qwen_3b": {
        "init": "models/Qwen2.5-3B-Instruct",
        "chat_template": "chatml",
        "num_numbers": (3, 4),
        "prompt_style": "full",
        "lr": 5e-7,
        "schedule": "cosine",
        "warmup_steps": 14,  # 3% of the steps
        "num_steps": 450,
        "kl_coef": 0.001,
        "batch_size": 24,
        "group_size": 8,
        "max_new_tokens": 1024,
        "micro_batch_size": 4,  # fits 80 GB
    },
    # DEVIATION: a small model takes a higher rate, fewer and shorter outputs; Countdown a smaller
    # KL coefficient.
    "gpu": {
        **countdown.RANGES["gpu"],
        "max_new_tokens": 256,
        "num_steps": 400,
        "lr": 1e-4,
        "kl_coef": 0.001,
        "batch_size": 64,
        "group_size": 32,
        "micro_batch_size": 256,
    },
    "cpu": {
        **countdown.RANGES["cpu"],
        "num_problems": 10_000,
        "max_new_tokens": 160,  # about eight attempts
        "num_steps": 140,
        # With a reward for the format alone, giving up pays more than being cut off: the policy
        # learns to write "17-17=0" at any distance.
        "reward": ("equation",),
        "lr": 5e-5,  # at 2e-4 greedy accuracy falls by 15 points in 20 steps
        "schedule": "cosine",
        "warmup_steps": 10,
        "beta2": 0.99,  # the gradient of 256 outputs is noisy
        "kl_coef": 0.001,
        "batch_size": 32,
        "group_size": 8,
        "micro_batch_size": 32,  # stays in the cache: 128 takes 1.6 times as long
        "checkpoint_interval": 25,
        "eval_interval": 35,
        "num_eval_samples": 4,
    },
    "smoke": {
        **countdown.RANGES["smoke"],
        "num_problems": 500,
        "max_new_tokens": 96,
        "num_steps": 6,
        "lr": 3e-4,
        "kl_coef": 0.001,
        "batch_size": 4,
        "group_size": 8,
        "micro_batch_size": 32,
        "checkpoint_interval": 3,
        "eval_interval": 3,
        "num_eval_problems": 50,
    },
}


def problem_set(cfg: GRPOConfig, split: str, num: int) -> list[Problem]:
    """Return `num` problems of a split, of --problems at most; held-out ones are the same for every
    seed."""
    if cfg.problems:
        return benchmarks.read_split(cfg.problems, split)[:num]
    return countdown.generate(
        num,
        split=split,
        seed=cfg.seed if split == "train" else 0,
        num_numbers=cfg.num_numbers,
        max_number=cfg.max_number,
        max_target=cfg.max_target,
        style=cfg.prompt_style,
    )


def drop_long_prompts(
    cfg: GRPOConfig, problems: list[Problem], tokenizer: Tokenizer, max_context: int, dist: Dist
) -> list[Problem]:
    """Return the problems whose prompt leaves room for an output; name the others.

    Raises ValueError where none does.
    """
    lengths = [len(encode_prompt(tokenizer, problem)) for problem in problems]
    kept, dropped = [], []
    for problem, length in zip(problems, lengths, strict=True):
        (kept if length < max_context else dropped).append(problem)
    if not kept:
        shorter = "shorten the questions" if cfg.problems else "give --prompt_style short"
        raise ValueError(
            f"no prompt leaves room for an output: the shortest has {min(lengths)} tokens and "
            f"{cfg.init} a context of {max_context}; {shorter}, or take another model"
        )
    if dropped and dist.is_main:
        ids = ", ".join(str(problem.id) for problem in dropped[:8])
        print(
            f"warning: {len(dropped)} of {len(problems)} problems are left out, prompts of "
            f"{max_context} tokens or more fill the context of {cfg.init}: "
            f"{cfg.problems or 'Countdown'} {ids}{', ...' if len(dropped) > 8 else ''}",
            flush=True,
        )
    return kept


def judge(
    rewards: Rewards, problems: list[Problem], rollouts: Rollouts, tokenizer: Tokenizer
) -> tuple[torch.Tensor, list[str], dict[str, list]]:
    """Return the rewards [P, G] (NaN: none), the outputs as text, and each function's rewards."""
    texts = []
    for tokens_GT, lengths_G in zip(rollouts.tokens_PGT, rollouts.lengths_PG, strict=True):
        for tokens_T, length in zip(tokens_GT.tolist(), lengths_G.tolist(), strict=True):
            texts.append(tokenizer.decode(tokens_T[:length]))
    group_size = rollouts.lengths_PG.shape[1]
    repeated = [problem for problem in problems for _ in range(group_size)]
    totals, parts = rewards.score(repeated, texts)
    values = [float("nan") if total is None else total for total in totals]
    rewards_PG = torch.tensor(values, dtype=torch.float64).view(len(problems), group_size)
    return rewards_PG, texts, parts


def update(
    cfg: GRPOConfig,
    policy: Transformer,
    optimizer: torch.optim.Optimizer,
    batch: RolloutBatch,
    lr: float,
    dist: Dist,
) -> dict[str, float]:
    """Make mu passes of num_minibatches optimizer steps over the batch (Alg. 1 l.10-11)."""
    clip_eps_high = cfg.clip_eps if cfg.clip_eps_high is None else cfg.clip_eps_high
    objective = Objective(
        cfg.clip_eps, clip_eps_high, cfg.kl_coef, cfg.temperature, cfg.kl_estimator
    )
    steps = [
        policy_update(  # Alg. 1 l.11
            policy,
            optimizer,
            batch,
            objective,
            lr=lr,
            max_grad_norm=cfg.max_grad_norm,
            micro_batch_size=cfg.micro_batch_size,
            dist=dist,
            part=part,
            num_parts=cfg.num_minibatches,
        )
        for _ in range(cfg.num_updates)  # Alg. 1 l.10
        for part in range(cfg.num_minibatches)
    ]
    return update_metrics(steps, cfg.kl_coef)


def train(cfg: GRPOConfig, dist: Dist, lock: RunLock, rewards: Rewards) -> None:
    """Run Algorithm 1 with outcome rewards (Sec. 4.1.2, 4.1.4)."""
    with one_line_errors():
        check(cfg, dist)
        policy, tokenizer, _ = load_model(  # Alg. 1 l.1
            cfg.init,
            dist,
            activation_checkpointing=cfg.activation_checkpointing,
            compile=cfg.compile,
        )
        if tokenizer is None:
            raise ValueError(f"--init {cfg.init} holds no tokenizer.json: texts cannot be encoded")
        use_template(tokenizer, cfg.chat_template)
        modules = {"model": policy}
        if cfg.kl_coef > 0:
            # Its weights are set at the start of each iteration (l.3), or come from a checkpoint.
            reference, _, _ = load_model(cfg.init, dist, compile=cfg.compile)
            modules["reference"] = reference.requires_grad_(False)
        # On one CPU the policy samples for itself; else a whole copy does, refreshed before use.
        sampling_model = make_replica(policy, dist)
        optimizer = make_adamw(policy, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=0.0)
        problems, heldout = (
            drop_long_prompts(
                cfg, problem_set(cfg, split, num), tokenizer, policy.cfg.max_context, dist
            )
            for split, num in (("train", cfg.num_problems), ("heldout", cfg.num_eval_problems))
        )
        run = Run(cfg, dist, lock, modules, optimizer, tokenizer)
    total_steps = cfg.num_iterations * cfg.num_steps
    scoring = {
        "temperature": cfg.temperature,
        "micro_batch_size": cfg.micro_batch_size,
        "num_parts": cfg.num_minibatches,
        "device": dist.device,
    }
    more = {
        "max_rows": cfg.max_rows,
        "cache_gb": cfg.cache_gb or math.inf,
        # A second bar, at a terminal, when sampling takes longer than this.
        "progress": 5.0 if dist.is_main and sys.stderr.isatty() else None,
    }
    evaluate = partial(
        heldout_metrics,
        tokenizer=tokenizer,
        problems=heldout,
        rewards=rewards,
        num_samples=cfg.num_eval_samples,
        temperature=cfg.eval_temperature,
        max_new_tokens=cfg.max_new_tokens,
        dist=dist,
        **more,
    )
    for step in run.steps(total_steps, desc="grpo"):  # Alg. 1 l.2, l.4
        if step % cfg.num_steps == 0 and cfg.kl_coef > 0:
            copy_weights(reference, policy)  # Alg. 1 l.3
        clock = Clock(dist.device)
        chosen = epoch_order(len(problems), step, cfg.batch_size, cfg.seed)  # Alg. 1 l.5
        my_places = range(dist.rank, cfg.batch_size, dist.world_size)
        mine = [problems[chosen[place]] for place in my_places]
        prompts = [encode_prompt(tokenizer, problem) for problem in mine]
        refresh_replica(sampling_model, policy, dist)  # Alg. 1 l.6: old <- policy
        is_shown = step % cfg.eval_interval == 0
        metrics = evaluate(sampling_model) if is_shown else {}
        clock.lap("evaluation")
        rollouts = sample_groups(  # Alg. 1 l.7
            sampling_model,
            prompts,
            cfg.group_size,
            max_new_tokens=cfg.max_new_tokens,
            eos_ids=tokenizer.stop_ids,
            temperature=cfg.temperature,
            seed=cfg.seed,
            step=step,
            prompt_ids=my_places,  # a question drawn twice makes two groups, not one group twice
            vocab_limit=tokenizer.sample_limit,
            **more,
        )
        clock.lap("sampling")
        rewards_PG, texts, parts = judge(rewards, mine, rollouts, tokenizer)  # Alg. 1 l.8
        advantages_PG = outcome_advantages(rewards_PG, cfg.advantage)  # Alg. 1 l.9
        weights_PG = output_weights(  # 1 / (P G |o_i|), Eq. 3
            rewards_PG,
            rollouts,
            max_new_tokens=cfg.max_new_tokens,
            dist=dist,
            loss_norm=cfg.loss_norm,
            mask_truncated=cfg.mask_truncated,
            drop_constant_groups=cfg.drop_constant_groups,
        )
        clock.lap("rewards")
        batch = make_batch(
            prompts,
            rollouts,
            advantages_PG,
            weights_PG,
            num_prompts=cfg.batch_size,
            world_size=dist.world_size,
        )
        if cfg.kl_coef > 0:
            batch.ref_logp_N = response_logprobs(reference, batch, **scoring)
        if cfg.num_updates * cfg.num_minibatches > 1:  # else the old policy is the policy itself
            batch.old_logp_N = response_logprobs(policy, batch, **scoring)
        clock.lap("logprobs")
        lr = SCHEDULES[cfg.schedule](
            step, num_steps=total_steps, peak=cfg.lr, warmup_steps=cfg.warmup_steps
        )
        metrics |= update(cfg, policy, optimizer, batch, lr, dist)  # Alg. 1 l.10-11
        clock.lap("update")
        metrics |= rollout_metrics(rewards_PG, parts, rollouts, dist) | {"lr": lr}
        metrics |= cost_metrics(clock.seconds, batch, cfg.num_updates, dist)
        is_last = step + 1 == total_steps
        if is_last:
            refresh_replica(sampling_model, policy, dist)
            metrics |= evaluate(sampling_model)
        ids = [problems[place].id for place in chosen]
        run.log(step, metrics, shown=SHOWN, batch=("problems", ids))
        if step == 0 and loss_starts_at_0(cfg):
            run.say(WHY_LOSS_IS_0)
        if dist.is_main and (is_shown or is_last):
            run.samples(step, sample_lines(mine[0], texts, rollouts, rewards_PG, advantages_PG))
            draw_plots(cfg.run_dir, at_end=is_last)
    run.close()


def loss_starts_at_0(cfg: GRPOConfig) -> bool:
    """Tell whether every ratio is 1 and every question's weighted advantages sum to 0."""
    num_steps = cfg.num_updates * cfg.num_minibatches
    return num_steps == 1 and cfg.loss_norm == "response" and not cfg.mask_truncated


def check(cfg: GRPOConfig, dist: Dist) -> None:
    """Refuse what would only fail in the middle of a step. Raises ValueError."""
    if cfg.num_eval_samples == 1:
        raise ValueError("--num_eval_samples is 1: give 0, or at least 2 for Pass@K and Maj@K")
    if cfg.problems and "equation" in cfg.reward:
        raise ValueError(
            "--problems needs --reward answer, or one of your own: equation is Countdown's"
        )
    parts = cfg.num_minibatches * dist.world_size
    if cfg.num_minibatches > 1 and cfg.batch_size % parts:
        raise ValueError(
            f"--batch_size {cfg.batch_size} must divide by --num_minibatches times the number of "
            f"processes ({parts}): every optimizer step is a mean over equally many questions"
        )


def main() -> None:
    cfg = parse(GRPOConfig, PRESETS, description=__doc__)
    with open_run(cfg) as (dist, lock):
        with one_line_errors():
            rewards = Rewards(
                cfg.reward,
                cfg.reward_weights,
                seconds=cfg.reward_seconds,
                num_workers=cfg.reward_workers,
            )
        with rewards:
            train(cfg, dist, lock, rewards)


if __name__ == "__main__":
    main()
