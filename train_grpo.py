"""Train a policy by Group Relative Policy Optimization (Sec. 4, Algorithm 1).

    python train_grpo.py --preset cpu --init runs/sft --run_dir runs/grpo
    python train_grpo.py --init models/qwen --chat_template chatml --problems mine.jsonl \\
        --reward answer
    torchrun --nproc_per_node 8 train_grpo.py --init runs/sft      # the paper's settings

torchrun kills its processes 30 s after a SIGTERM, in the middle of a longer step: set
TORCH_ELASTIC_SHUTDOWN_TIMEOUT in its environment, in seconds.

`train` reads as Algorithm 1. What its phases do is in sampler.py or engine/ (sampling), rewards.py
(rewards), advantages.py (advantages, weights) and grpo.py (the objective of Eq. 3 and 4, the
update). The same command continues a run. Next: nanomath/model.py.
"""

import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from kernels import Objective
from nanomath import sampler
from nanomath.advantages import drop_without_gradient, outcome_advantages, output_weights
from nanomath.base.config import one_line_errors, parse
from nanomath.data import epoch_order
from nanomath.dist import (
    Dist,
    copy_weights,
    make_replica,
    refresh_replica,
)
from nanomath.engine.stream import sample_groups
from nanomath.grpo import policy_update, response_logprobs, update_metrics
from nanomath.measure.evaluation import heldout_metrics
from nanomath.model import Transformer
from nanomath.optim import SCHEDULES, make_adamw
from nanomath.rewards import Rewards
from nanomath.rollouts import RolloutBatch, Rollouts, make_batch
from nanomath.run import presets
from nanomath.run.guard import RunLock
from nanomath.run.loop import Run, load_start, open_run, start_model
from nanomath.run.metrics import (
    SHOWN,
    WHY_LOSS_IS_0,
    Clock,
    cost_metrics,
    draw_plots,
    rollout_metrics,
    sample_lines,
)
from nanomath.run.problems import (
    announce,
    check_cache,
    end_without_rewards,
    load_problems,
    note_reward_files,
)
from nanomath.settings import GRPOConfig, check, loss_starts_at_0
from nanomath.tasks import Problem, encode_prompt
from nanomath.text.tokenizer import Tokenizer


def load_modules(cfg: GRPOConfig, dist: Dist) -> tuple[dict[str, Transformer], Tokenizer]:
    """Return "model", the policy, and with a KL its "reference", and the tokenizer of --init."""
    policy, tokenizer = load_start(cfg, dist)
    modules = {"model": policy}
    if cfg.kl_coef > 0:
        # Its weights are set at the start of each iteration (l.3), or come from a checkpoint.
        reference, _ = start_model(cfg, dist, compile=cfg.compile)
        modules["reference"] = reference.requires_grad_(False)
    return modules, tokenizer


# ----------------------------------------------------------------------------- phases of a step


def sampler_settings(cfg: GRPOConfig, dist: Dist) -> dict[str, Any]:
    """Return the settings that training and held-out evaluation share."""
    return {
        "max_new_tokens": cfg.max_new_tokens,
        "max_rows": cfg.max_rows,
        "cache_gb": cfg.cache_gb or math.inf,
        # A second bar, at a terminal, when sampling takes longer than this.
        "progress": 5.0 if dist.is_main and sys.stderr.isatty() else None,
    }


def sample(
    cfg: GRPOConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    places: Sequence[int],
    step: int,
    dist: Dist,
) -> Rollouts:
    """Sample G outputs of each prompt (Alg. 1 l.7); places: where in the batch the prompts are."""
    draw, limits = sample_groups, sampler_settings(cfg, dist)
    if cfg.sampler == "plain":
        draw, limits = sampler.sample_groups, {"max_new_tokens": cfg.max_new_tokens}
    return draw(
        model,
        prompts,
        cfg.group_size,
        eos_ids=tokenizer.stop_ids,
        temperature=cfg.temperature,
        seed=cfg.seed,
        step=step,
        prompt_ids=places,  # a question drawn twice makes two groups, not one group twice
        vocab_limit=tokenizer.sample_limit,
        **limits,
    )


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


def add_logprobs(
    cfg: GRPOConfig,
    batch: RolloutBatch,
    policy: Transformer,
    reference: Transformer | None,
    dist: Dist,
) -> None:
    """Give the batch the reference's log-probabilities, if there is one, and the old policy's, if
    several updates are made on it."""
    scoring = {
        "temperature": cfg.temperature,
        "micro_batch_size": cfg.micro_batch_size,
        "num_parts": cfg.num_minibatches,
        "device": dist.device,
    }
    if reference is not None:
        batch.ref_logp_N = response_logprobs(reference, batch, **scoring)
    if cfg.num_updates * cfg.num_minibatches > 1:  # else the old policy is the policy itself
        batch.old_logp_N = response_logprobs(policy, batch, **scoring)


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
        modules, tokenizer = load_modules(cfg, dist)  # Alg. 1 l.1
        policy, reference = modules["model"], modules.get("reference")
        # On one CPU the policy samples for itself; else a whole copy does, refreshed before use.
        sampling_model = make_replica(policy, dist)
        optimizer = make_adamw(policy, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=0.0)
        problems, heldout, data = load_problems(cfg, tokenizer, policy.cfg.max_context, dist)
        check_cache(cfg, sampling_model, tokenizer, [*problems, *heldout])
        run = Run(cfg, dist, lock, modules, optimizer, tokenizer, data)
        note_reward_files(run)
    total_steps = cfg.num_iterations * cfg.num_steps
    announce(run, problems, heldout)
    evaluate = partial(  # Pass@1 and, with --num_eval_samples, Pass@K and Maj@K; {} when signalled
        heldout_metrics,
        sampling_model,
        tokenizer,
        heldout,
        rewards=rewards,
        num_samples=cfg.num_eval_samples,
        temperature=cfg.eval_temperature,
        dist=dist,
        stop=run.signal,
        **sampler_settings(cfg, dist),
    )
    for step in run.steps(total_steps, desc="grpo"):  # Alg. 1 l.2, l.4
        if step % cfg.num_steps == 0 and cfg.kl_coef > 0:
            copy_weights(reference, policy)  # Alg. 1 l.3
        clock = Clock(dist.device)
        chosen = epoch_order(len(problems), step, cfg.batch_size, cfg.seed)  # Alg. 1 l.5
        places = range(dist.rank, cfg.batch_size, dist.world_size)  # this rank's
        mine = [problems[chosen[place]] for place in places]
        refresh_replica(sampling_model, policy, dist)  # Alg. 1 l.6: old <- policy
        is_shown, is_last = step % cfg.eval_interval == 0, step + 1 == total_steps
        metrics = {}
        if is_shown:
            metrics = evaluate()
            if not metrics:
                run.leave_step()
        clock.lap("evaluation")
        prompts = [encode_prompt(tokenizer, problem) for problem in mine]
        rollouts = sample(  # Alg. 1 l.7
            cfg, sampling_model, tokenizer, prompts, places, step, dist
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
        if cfg.kl_coef == 0:
            weights_PG = drop_without_gradient(weights_PG, advantages_PG)
        clock.lap("rewards")
        sizes = {"num_prompts": cfg.batch_size, "world_size": dist.world_size}
        batch = make_batch(prompts, rollouts, advantages_PG, weights_PG, **sizes)
        batch.agree_on_passes(cfg.num_minibatches, dist)
        add_logprobs(cfg, batch, policy, reference, dist)
        clock.lap("logprobs")
        lr = SCHEDULES[cfg.schedule](
            step, num_steps=total_steps, peak=cfg.lr, warmup_steps=cfg.warmup_steps
        )
        metrics |= update(cfg, policy, optimizer, batch, lr, dist)  # Alg. 1 l.10-11
        clock.lap("update")
        if is_last:
            refresh_replica(sampling_model, policy, dist)
            after = evaluate()
            if not after:
                run.say(f"the last evaluation was left: evaluate.py --checkpoint {cfg.run_dir}")
            metrics |= after
            clock.lap("evaluation")
        metrics |= rollout_metrics(rewards_PG, parts, rollouts, dist) | {"lr": lr}
        metrics |= cost_metrics(clock.seconds, batch, cfg.num_updates, dist)
        ids = [problems[place].id for place in chosen]
        run.log(step, metrics, shown=SHOWN, batch=("problems", ids))
        end_without_rewards(run, rewards, metrics)
        if step == 0 and loss_starts_at_0(cfg):
            run.say(WHY_LOSS_IS_0)
        if dist.is_main and (is_shown or is_last):
            run.samples(step, sample_lines(mine[0], texts, rollouts, rewards_PG, advantages_PG))
            draw_plots(cfg.run_dir, at_end=is_last)
    run.close()


def main() -> None:
    cfg = parse(GRPOConfig, presets.GRPO, description=__doc__)
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
