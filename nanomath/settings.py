"""The settings of train_grpo.py: each with its default, which is the paper's.

Presets: nanomath/run/presets.py. What a run costs by these names: nanomath/measure/plan.py. What
the objective's settings change as formulas: the table in docs/objectives.md.
"""

from dataclasses import dataclass

from kernels.reference import KL_ESTIMATORS
from nanomath.advantages import ADVANTAGES, LOSS_NORMS
from nanomath.base.config import RunConfig, opt
from nanomath.dist import Dist
from nanomath.optim import SCHEDULES
from nanomath.tasks import countdown
from nanomath.text.chat import CHOICES


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
        "your own JSONL of questions and answers instead of Countdown; one in ten is held out; "
        "needs --reward answer or one of your own",
    )
    num_numbers: tuple[int, ...] = opt((3, 4), "numbers in a Countdown problem", low=2, high=5)
    max_number: int = opt(99, "largest given number", low=1)
    max_target: int = opt(100, "largest target", low=1)
    num_problems: int = opt(20_000, "training problems; with --problems, at most", low=1)
    prompt_style: str = opt("short", "prompt wording", choices=countdown.STYLES)
    # Algorithm 1
    num_iterations: int = opt(1, "outer iterations I: reference <- policy at each", low=1)
    num_steps: int = opt(144, "steps M per iteration (paper silent)", low=1)
    batch_size: int = opt(16, "questions per step P over all ranks, Sec. 4.2: 1024 outputs", low=1)
    group_size: int = opt(64, "outputs per question G, Sec. 4.2", low=2)
    max_new_tokens: int = opt(1024, "most tokens an output may have, Sec. 4.2", low=1)
    temperature: float = opt(1.0, "sampling temperature (paper silent)", low=1e-3, high=1e6)
    sampler: str = opt(
        "engine",
        "what draws the outputs: engine, or plain (sampler.py: the same tokens, a group at a time)",
        choices=("engine", "plain"),
        may_change=True,
    )
    max_rows: int = opt(512, "most outputs sampled at a time, per process", low=1, may_change=True)
    cache_gb: float = opt(0.0, "most GB for keys and values; 0: no limit", low=0.0, may_change=True)
    num_updates: int = opt(1, "passes mu over each batch, Sec. 4.2", low=1)
    num_minibatches: int = opt(1, "optimizer steps per pass (paper silent)", low=1)
    # Objective and optimizer
    clip_eps: float = opt(
        0.2,
        "clip range eps of Eq. 3 (paper silent); changes nothing unless --num_updates or "
        "--num_minibatches is above 1: before a batch's second update every ratio is 1",
        low=0.0,
        below=1.0,
    )
    clip_eps_high: float | None = opt(
        None,
        "clip range above 1 (DAPO: 0.28); like --clip_eps it acts on later updates only; "
        "none: the value of --clip_eps",
        low=0.0,
    )
    kl_coef: float = opt(0.04, "weight beta of the KL to the reference, Sec. 4.2", low=0.0)
    kl_estimator: str = opt("k3", "estimate of the KL; k3: Eq. 4", choices=KL_ESTIMATORS)
    advantage: str = opt(
        "std",
        "mean: reward minus its group's mean; std: that divided by the group's std, Sec. 4.1.2; "
        "leave_one_out: reward minus the mean of the others (RLOO)",
        choices=ADVANTAGES,
    )
    loss_norm: str = opt(
        "response",
        "weight of a token; response: 1/|o_i|, Eq. 3; token: the same for all of a batch (DAPO); "
        "constant: 1/--max_new_tokens (Dr. GRPO)",
        choices=LOSS_NORMS,
    )
    mask_truncated: bool = opt(
        False, "truncated outputs leave the loss, but count in their group's mean, std and G"
    )
    drop_constant_groups: bool = opt(
        False,
        "groups of equal rewards leave the loss and P instead of counting with advantage 0; "
        "they are not replaced by others",
    )
    lr: float = opt(1e-6, "learning rate, Sec. 4.2", low=0.0)
    schedule: str = opt(
        "constant", "learning rate over steps (paper silent)", choices=(*SCHEDULES,)
    )
    warmup_steps: int = opt(0, "steps of linear warm-up (paper silent)", low=0)
    beta1: float = opt(0.9, "AdamW (paper silent: as in pretraining)", low=0.0, below=1.0)
    beta2: float = opt(0.95, "AdamW (paper silent: as in pretraining)", low=0.0, below=1.0)
    # Rewards
    reward: tuple[str, ...] = opt(
        ("format", "equation"),
        "one or several reward functions, summed: format, equation, answer, my_file.py:my_function",
    )
    reward_weights: tuple[float, ...] = opt((), "a weight per reward function; 1 each by default")
    reward_seconds: float = opt(
        10.0,
        "seconds a custom reward function may take per output; after that it has no reward",
        low=0.1,
        high=120.0,
        may_change=True,
    )
    reward_workers: int = opt(
        0,
        "processes per rank for custom reward functions; 0: its share of the cores, at most 8",
        low=0,
        may_change=True,
    )
    # What is shown
    eval_interval: int = opt(25, "steps between held-out evaluations", low=1)
    num_eval_problems: int = opt(200, "problems of one held-out evaluation", low=1)
    num_eval_samples: int = opt(
        8, "samples K per held-out problem for Pass@K and Maj@K; 0: greedy answers only", low=0
    )
    eval_temperature: float = opt(
        0.7, "temperature of those samples, Sec. 5.2.2", low=1e-3, high=1e6
    )


def loss_starts_at_0(cfg: GRPOConfig) -> bool:
    """Tell whether every ratio is 1 and every question's weighted advantages sum to 0."""
    is_one_update = cfg.num_updates * cfg.num_minibatches == 1
    return is_one_update and cfg.loss_norm == "response" and not cfg.mask_truncated


def clip_without_effect(cfg: GRPOConfig) -> str | None:
    """Return a line for a run that sets a clip range which no ratio can ever leave, else None."""
    names = ("clip_eps", "clip_eps_high")
    given = [f"--{n}" for n in names if getattr(cfg, n) != getattr(GRPOConfig, n)]
    if not given or cfg.num_updates * cfg.num_minibatches > 1:
        return None
    return (
        f"note: {' and '.join(given)} will change nothing: with one update per batch every ratio "
        "is 1; give --num_updates or --num_minibatches above 1"
    )


def check(cfg: GRPOConfig, dist: Dist) -> None:
    """Refuse what would only fail in the middle of a step. Raises ValueError."""
    if cfg.num_eval_samples == 1:
        raise ValueError("--num_eval_samples is 1: give 0, or at least 2 for Pass@K and Maj@K")
    if cfg.reward_weights and not any(cfg.reward_weights):
        raise ValueError("--reward_weights are all 0: every advantage would be 0")
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
