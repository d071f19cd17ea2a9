"""What a GRPO run is given and what may be wrong with it: its problems, its reward functions."""

from functools import partial

from nanomath.base.files import content_sha256, file_sha256
from nanomath.dist import Dist, broadcast_json
from nanomath.engine.stream import sample_stream
from nanomath.model import Transformer
from nanomath.rewards import Rewards
from nanomath.run.loop import Run
from nanomath.settings import GRPOConfig, clip_without_effect
from nanomath.tasks import Problem, benchmarks, countdown, encode_prompt
from nanomath.text.tokenizer import Tokenizer

MAX_STEPS_WITHOUT_REWARD = 16  # in a row: warnings alone would let a broken function run for days


def problem_sets(cfg: GRPOConfig) -> tuple[list[Problem], list[Problem]]:
    """Return the problems to train on and, the same for every seed, those held out."""
    if cfg.problems:
        train, heldout = benchmarks.read_splits(cfg.problems)
        return train[: cfg.num_problems], heldout[: cfg.num_eval_problems]
    generate = partial(countdown.generate, ranges=countdown.Ranges.of(cfg), style=cfg.prompt_style)
    train = generate(cfg.num_problems, split="train", seed=cfg.seed)
    return train, generate(cfg.num_eval_problems, split="heldout", seed=0)


def load_problems(
    cfg: GRPOConfig, tokenizer: Tokenizer, max_context: int, dist: Dist
) -> tuple[list[Problem], list[Problem], dict[str, str]]:
    """Return the problems to train on, those held out, and what names their contents (Run's data).

    Raises ValueError where no prompt leaves room for an output.
    """
    sets = problem_sets(cfg)
    asked = [problem for part in sets for problem in part]
    data = {
        "--problems": content_sha256(map(vars, asked)),
        "--init's tokenizer": content_sha256(encode_prompt(tokenizer, p) for p in asked[:100]),
    }
    problems, heldout = drop_long_prompts(cfg, sets, tokenizer, max_context, dist)
    return problems, heldout, data


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


def check_cache(
    cfg: GRPOConfig, model: Transformer, tokenizer: Tokenizer, problems: list[Problem]
) -> None:
    """Refuse now, with the sampler's error, a --cache_gb that it would refuse within a step."""
    if cfg.cache_gb:
        prompts = [encode_prompt(tokenizer, problem) for problem in problems]
        extremes = [min(prompts, key=len), max(prompts, key=len)]
        sizes = {"max_new_tokens": cfg.max_new_tokens, "cache_gb": cfg.cache_gb}
        sample_stream(model, extremes, 1, eos_ids=(), **sizes)


def announce(run: Run, problems: list[Problem], heldout: list[Problem]) -> None:
    """Say in a line what is trained on what, and what about it will not do what one may expect."""
    cfg, dist = run.cfg, run.dist
    run.say(
        f"{cfg.init}: {run.modules['model'].cfg.num_parameters:,} parameters, {dist.world_size} x "
        f"{dist.device.type}; {cfg.problems or 'Countdown'}: {len(problems)} problems, "
        f"{len(heldout)} held out; {cfg.num_iterations * cfg.num_steps} steps of {cfg.batch_size} "
        f"questions x {cfg.group_size} outputs; reward {' + '.join(cfg.reward)}"
    )
    if cfg.problems and dist.is_main:
        for note in benchmarks.unreadable_references([*problems, *heldout], cfg.problems):
            run.say(f"warning: {note}")
    if note := clip_without_effect(cfg):
        run.say(note)
