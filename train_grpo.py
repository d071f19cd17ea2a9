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
from nanomath.base.files import content_sha256, file_sha256
from nanomath.data import epoch_order
from nanomath.dist import (
    Dist,
    broadcast_json,
    copy_weights,
    make_replica,
    refresh_replica,
)
from nanomath.engine.stream import sample_groups, sample_stream
from nanomath.grpo import policy_update, response_logprobs, update_metrics
from nanomath.measure.evaluation import heldout_metrics
from nanomath.model import Transformer
from nanomath.optim import SCHEDULES, make_adamw
from nanomath.rewards import Rewards
from nanomath.rollouts import RolloutBatch, Rollouts, make_batch
from nanomath.run import presets
from nanomath.run.guard import RunLock, StopSignal
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
from nanomath.settings import GRPOConfig, check, clip_without_effect, loss_starts_at_0
from nanomath.tasks import Problem, benchmarks, countdown, encode_prompt
from nanomath.text.tokenizer import Tokenizer

MAX_STEPS_WITHOUT_REWARD = 16  # in a row: warnings alone would let a broken function run for days


def load_modules(cfg: GRPOConfig, dist: Dist) -> tuple[dict[str, Transformer], Tokenizer]:
    """Return "model", the policy, and with a KL its "reference", and the tokenizer of --init."""
    policy, tokenizer = load_start(cfg, dist)
    modules = {"model": policy}
    if cfg.kl_coef > 0:
        # Its weights are set at the start of each iteration (l.3), or come from a checkpoint.
        reference, _ = start_model(cfg, dist, compile=cfg.compile)
        modules["reference"] = reference.requires_grad_(False)
    return modules, tokenizer


def problem_sets(cfg: GRPOConfig) -> tuple[list[Problem], list[Problem]]:
    """Return the problems to train on and, the same for every seed, those held out."""
    if cfg.problems:
        train, heldout = benchmarks.read_splits(cfg.problems)
        return train[: cfg.num_problems], heldout[: cfg.num_eval_problems]
    generate = partial(countdown.generate, ranges=countdown.Ranges.of(cfg), style=cfg.prompt_style)
    train = generate(cfg.num_problems, split="train", seed=cfg.seed)
    return train, generate(cfg.num_eval_problems, split="heldout", seed=0)


def drop_long_prompts(
    cfg: GRPOConfig,
    sets: tuple[list[Problem], ...],
    tokenizer: Tokenizer,
    max_context: int,
    dist: Dist,
) -> list[list[Problem]]:
    """Return of each set the problems whose prompt leaves room for an output; name the others.

    Raises ValueError where none does.
    """
    kept, dropped, tight = [], [], 0
    for problems in sets:
        lengths = [len(encode_prompt(tokenizer, problem)) for problem in problems]
        if min(lengths) >= max_context:
            shorter = "shorten the questions" if cfg.problems else "give --prompt_style short"
            raise ValueError(
                f"no prompt leaves room for an output: the shortest has {min(lengths)} tokens and "
                f"{cfg.init} a context of {max_context}; {shorter}, or take another model"
            )
        pairs = [*zip(problems, lengths, strict=True)]
        kept.append([problem for problem, length in pairs if length < max_context])
        dropped += [problem for problem, length in pairs if length >= max_context]
        tight += sum(max_context - cfg.max_new_tokens < length < max_context for length in lengths)
    count = sum(map(len, sets))
    if dropped and dist.is_main:
        ids = ", ".join(str(problem.id) for problem in dropped[:8])
        print(
            f"warning: {len(dropped)} of {count} problems are left out, prompts of "
            f"{max_context} tokens or more fill the context of {cfg.init}: "
            f"{cfg.problems or 'Countdown'} {ids}{', ...' if len(dropped) > 8 else ''}",
            flush=True,
        )
    if tight and dist.is_main:
        print(
            f"note: after {tight} of {count} prompts the context of {cfg.init} "
            f"({max_context} tokens) ends an output before --max_new_tokens {cfg.max_new_tokens}",
            flush=True,
        )
    return kept


def check_cache(
    cfg: GRPOConfig, model: Transformer, tokenizer: Tokenizer, problems: list[Problem]
) -> None:
    """Refuse now, with the sampler's error, a --cache_gb that it would refuse within a step."""
    if cfg.cache_gb:
        prompts = [encode_prompt(tokenizer, problem) for problem in problems]
        extremes = [min(prompts, key=len), max(prompts, key=len)]
        sizes = {"max_new_tokens": cfg.max_new_tokens, "cache_gb": cfg.cache_gb}
        sample_stream(model, extremes, 1, eos_ids=(), **sizes)


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


def evaluate(
    cfg: GRPOConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    problems: list[Problem],
    rewards: Rewards,
    dist: Dist,
    stop: StopSignal | None = None,
) -> dict[str, float]:
    """Return Pass@1, and with --num_eval_samples Pass@K and Maj@K, of held-out problems; {} when a
    signal to `stop` ended that."""
    return heldout_metrics(
        model,
        tokenizer=tokenizer,
        problems=problems,
        rewards=rewards,
        num_samples=cfg.num_eval_samples,
        temperature=cfg.eval_temperature,
        dist=dist,
        stop=stop,
        **sampler_settings(cfg, dist),
    )


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


def end_without_rewards(run: Run, rewards: Rewards, metrics: dict[str, float]) -> None:
    """Let the run end where no output of MAX_STEPS_WITHOUT_REWARD steps in a row had a reward."""
    num_outputs = run.cfg.batch_size * run.cfg.group_size
    count = run.state.get("without_reward", 0) + 1 if metrics["no_reward"] == num_outputs else 0
    run.state["without_reward"] = count
    if count >= MAX_STEPS_WITHOUT_REWARD:
        reasons = broadcast_json(rewards.missing, run.dist)  # a rank without questions has none
        run.ends_with = (
            f"no output has had a reward for {count} steps: "
            + "; ".join(f"reward {name}, {reason}" for name, reason in reasons.items())
            + ". Mend that and give the same command: it continues from the checkpoint of this step"
        )


def note_reward_files(run: Run) -> None:
    """Say which reward functions have changed since the run's last checkpoint.

    They may: a broken one must be mended for the run to go on (end_without_rewards).
    """
    files = {name.rpartition(":")[0] for name in run.cfg.reward if ":" in name}
    now = {file: file_sha256(file) for file in sorted(files)}
    before = run.state.get("reward_files", {})
    for file in now:
        if before.get(file, now[file]) != now[file]:
            run.say(f"note: --reward {file} has changed since step {run.state['step']}")
    run.state["reward_files"] = now


def train(cfg: GRPOConfig, dist: Dist, lock: RunLock, rewards: Rewards) -> None:
    """Run Algorithm 1 with outcome rewards (Sec. 4.1.2, 4.1.4)."""
    with one_line_errors():
        check(cfg, dist)
        modules, tokenizer = load_modules(cfg, dist)  # Alg. 1 l.1
        policy, reference = modules["model"], modules.get("reference")
        # On one CPU the policy samples for itself; else a whole copy does, refreshed before use.
        sampling_model = make_replica(policy, dist)
        optimizer = make_adamw(policy, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=0.0)
        sets = problem_sets(cfg)
        asked = [problem for part in sets for problem in part]
        data = {
            "--problems": content_sha256(map(vars, asked)),
            "--init's tokenizer": content_sha256(encode_prompt(tokenizer, p) for p in asked[:100]),
        }
        problems, heldout = drop_long_prompts(cfg, sets, tokenizer, policy.cfg.max_context, dist)
        check_cache(cfg, sampling_model, tokenizer, [*problems, *heldout])
        run = Run(cfg, dist, lock, modules, optimizer, tokenizer, data)
        note_reward_files(run)
    total_steps = cfg.num_iterations * cfg.num_steps
    run.say(
        f"{cfg.init}: {policy.cfg.num_parameters:,} parameters, {dist.world_size} x "
        f"{dist.device.type}; {cfg.problems or 'Countdown'}: {len(problems)} problems, "
        f"{len(heldout)} held out; {total_steps} steps of {cfg.batch_size} questions x "
        f"{cfg.group_size} outputs; reward {' + '.join(cfg.reward)}"
    )
    if cfg.problems and dist.is_main:
        for note in benchmarks.unreadable_references([*problems, *heldout], cfg.problems):
            run.say(f"warning: {note}")
    if note := clip_without_effect(cfg):
        run.say(note)
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
            metrics = evaluate(cfg, sampling_model, tokenizer, heldout, rewards, dist, run.signal)
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
            after = evaluate(cfg, sampling_model, tokenizer, heldout, rewards, dist, run.signal)
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
