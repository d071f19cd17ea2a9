"""The experiments by name, each stated once, for the trainers, evaluate.py and the planner.

The paper's own values are the defaults of the settings; a preset holds what differs from them.
"""

from nanomath.tasks import countdown

SHAPE = ("num_layers", "width", "num_heads", "num_kv_heads", "ffn_width")


def shape(*values: int) -> dict[str, int]:
    return dict(zip(SHAPE, values, strict=True))


PRETRAIN = {
    "deepseekmath_7b": {  # Sec. 2.3
        **shape(30, 4096, 32, 32, 11008),
        "batch_size": 2560,  # 10M tokens
        "num_steps": 47684,  # 500B tokens
        "lr": 4.2e-4,
        "activation_checkpointing": "full",  # fits 8 GPUs of 80 GB, by nanomath.measure.plan
    },
    # From here on small runs. DEVIATION: a small model takes a higher rate and a shorter warm-up.
    "gpu": {
        **shape(8, 512, 8, 8, 1376),
        "context": 512,
        "batch_size": 256,
        "micro_batch_size": 64,
        "num_steps": 300,  # a dozen times through the embedded web's mathematics
        "lr": 1e-3,
        "warmup_steps": 50,
        "eval_interval": 100,
        "checkpoint_interval": 100,
    },
    "cpu": {
        **shape(4, 128, 4, 4, 344),
        "context": 256,
        "batch_size": 8,
        "micro_batch_size": 8,
        "num_steps": 1000,
        "lr": 3e-3,
        "warmup_steps": 50,
        "eval_interval": 200,
        "max_valid_tokens": 65_536,
        "checkpoint_interval": 100,
    },
    "smoke": {
        **shape(2, 64, 2, 2, 176),
        "context": 128,
        "batch_size": 16,
        "micro_batch_size": 16,
        "num_steps": 20,
        "lr": 3e-3,
        "warmup_steps": 5,
        "eval_interval": 10,
        "max_valid_tokens": 8_192,
        "checkpoint_interval": 10,
    },
}

SFT = {
    # DEVIATION: a small model takes a higher rate, which may fall, and fewer and shorter rows.
    "gpu": {
        "context": 512,
        "batch_size": 128,
        "micro_batch_size": 64,
        "num_steps": 2000,
        "lr": 5e-4,
        "schedule": "cosine",
        "warmup_steps": 50,
        "checkpoint_interval": 500,
    },
    "cpu": {
        "context": 192,
        "batch_size": 6,  # many small steps: 2200 of 11 rows end at a loss two fifths higher
        "micro_batch_size": 6,
        "num_steps": 4000,
        "lr": 3e-3,
        "schedule": "cosine",
        "warmup_steps": 40,
        "beta2": 0.98,
        "checkpoint_interval": 200,
    },
    "smoke": {
        "context": 160,
        "batch_size": 16,
        "micro_batch_size": 16,
        "num_steps": 200,
        "lr": 3e-3,
        "warmup_steps": 5,
        "checkpoint_interval": 50,
    },
}

# GSM8K's training file, one question in ten held out. DEVIATION: Sec. 4.2 adds MATH's training set,
# 144K questions in all. Rates, KL and batch are Sec. 4.2's, the defaults.
_GSM8K = {"problems": "data/gsm8k_train.jsonl", "reward": ("answer",)}
# From chat models, as in Sec. 4.2: they end their answers and box them before any training. What
# they need of a machine: nanomath/measure/plan.py, by the same names.
_GSM8K_QWEN = {
    **_GSM8K,
    "chat_template": "chatml",
    "max_new_tokens": 512,  # as verl's GSM8K runs of these models (docs/algo/baseline.md)
    "num_steps": 417,  # once through the 6,676 questions
}
GRPO = {
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
        "prompt_style": "full",
        "lr": 5e-7,
        "schedule": "cosine",
        "warmup_steps": 14,  # 3% of the steps
        "num_steps": 450,
        "kl_coef": 0.001,
        "batch_size": 24,
        "group_size": 8,
        "micro_batch_size": 4,  # fits 80 GB
    },
    # DEVIATION: a small model takes a higher rate, fewer and shorter outputs; Countdown a smaller
    # KL coefficient; preset cpu none, a lower temperature and no reward for the format.
    "gpu": {
        **vars(countdown.RANGES["gpu"]),
        "max_new_tokens": 256,
        "num_steps": 400,
        "temperature": 0.7,  # this and the reward: as preset cpu
        "reward": ("equation",),
        "lr": 1e-4,
        "kl_coef": 0.001,
        "batch_size": 64,
        "group_size": 32,
        "micro_batch_size": 256,
    },
    "cpu": {
        **vars(countdown.RANGES["cpu"]),
        "num_problems": 10_000,
        "max_new_tokens": 144,  # a search through nine attempts takes 131
        "num_steps": 60,
        # At 1 a small model slips in every other search; held-out samples are drawn so, too.
        "temperature": 0.7,
        # With a reward for the format alone, giving up pays more than being cut off.
        "reward": ("equation",),
        "lr": 1e-4,  # at 3e-4 it unlearns to calculate
        "schedule": "cosine",
        "warmup_steps": 5,
        "beta2": 0.99,  # the gradient of 256 outputs is noisy
        "kl_coef": 0.0,  # an exact judge cannot be fooled; no reference saves a sixth of the time
        "batch_size": 32,
        "group_size": 8,
        "micro_batch_size": 32,  # stays in the cache: 128 takes 1.6 times as long
        "checkpoint_interval": 20,
        "eval_interval": 10,
        "num_eval_samples": 4,
    },
    "smoke": {
        **vars(countdown.RANGES["smoke"]),
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

# What evaluation must do as training does, and what only evaluation has; of GSM8K and MATH it takes
# the test files.
_AS_TRAINED = (
    *("num_numbers", "max_number", "max_target", "prompt_style", "chat_template"),
    *("max_new_tokens", "cache_gb"),
)
_EVALUATION = {
    "smoke": {"num_problems": 50},
    "gsm8k_qwen_0b5": {"tasks": ("gsm8k",)},
    "gsm8k_qwen_1b5": {"tasks": ("gsm8k",)},
    "deepseekmath_7b": {"tasks": ("gsm8k", "math")},
}
EVALUATION = {
    name: {key: run[key] for key in _AS_TRAINED if key in run} | _EVALUATION.get(name, {})
    for name, run in GRPO.items()
}
