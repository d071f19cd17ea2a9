"""One training run: the loop over steps that resumes, logs, checkpoints, and stops when asked.

    run = Run(cfg, dist, lock, {"model": model}, optimizer, tokenizer)
    for step in run.steps(num_steps, desc="pretrain"):
        run.log(step, supervised_update(run, cfg, step, batch))

What every trainer owes its users is here; what its steps are about stays in the scripts.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from kernels import NotFinite
from nanomath.base.config import RunConfig, lock_config, one_line_errors
from nanomath.base.log import RunLog, progress
from nanomath.data import TrainBatch
from nanomath.dist import Dist, barrier, set_timeout, setup
from nanomath.optim import SCHEDULES, supervised_step
from nanomath.run.checkpoint import Checkpoints, SaveFailed, agree, newest_name
from nanomath.run.guard import RunLock, StopSignal, raise_together, run_lock
from nanomath.run.load import load_model
from nanomath.text.chat import use_template
from nanomath.text.tokenizer import Tokenizer

MAX_SKIPPED_STEPS = 10  # in a row, with a gradient that is not finite
STEP_TIMEOUT_S = 900  # how long ranks wait for one another once the first step is done
MAX_FAILED_SAVES = 3  # in a row; the run goes on in between, on the older checkpoints


@contextmanager
def open_run(cfg: RunConfig) -> Iterator[tuple[Dist, RunLock]]:
    """Set up the processes and lock the run folder; clean up at the end.

    Raises SystemExit with one line when the folder is in use, and when training has diverged.
    """
    with one_line_errors():
        dist = setup(cfg.device, cfg.threads)
    with raise_together(dist), ExitStack() as stack:
        with one_line_errors():
            lock = stack.enter_context(run_lock(cfg.run_dir, dist))
        try:
            yield dist, lock
        except NotFinite as error:
            newest = newest_name(cfg.run_dir) or "none"
            raise SystemExit(
                f"{lock.doing}: {error}. The weights have diverged; the last checkpoint in "
                f"{cfg.run_dir}, {newest}, may have, too: start again in another --run_dir, with a "
                "lower --lr, more --warmup_steps or a smaller --max_grad_norm"
            ) from None
        except KeyboardInterrupt:
            raise SystemExit(
                f"interrupted: the same command continues {cfg.run_dir} from its last checkpoint"
            ) from None


def start_model(cfg: Any, dist: Dist, **sharding: str) -> tuple[nn.Module, Tokenizer | None]:
    """Return the model of --init and its tokenizer.

    A run that has a checkpoint can do without --init: the model is then the checkpoint's own.
    """
    try:
        return load_model(cfg.init, dist, **sharding)[:2]
    except (OSError, ValueError):
        if newest_name(cfg.run_dir) is None:
            raise
        return load_model(cfg.run_dir, dist, **sharding)[:2]


def load_start(cfg: Any, dist: Dist) -> tuple[nn.Module, Tokenizer]:
    """Return start_model, sharded, and its tokenizer with --chat_template set.

    Raises ValueError where the folder holds no tokenizer.
    """
    model, tokenizer = start_model(
        cfg,
        dist,
        activation_checkpointing=cfg.activation_checkpointing,
        compile=cfg.compile,
    )
    if tokenizer is None:
        raise ValueError(f"--init {cfg.init} holds no tokenizer.json: texts cannot be encoded")
    hint = use_template(tokenizer, cfg.chat_template)
    if hint and dist.is_main:
        print(hint)
    return model, tokenizer


class Run:
    """The state every trainer keeps beside its weights: step, seconds, skipped steps, logs."""

    def __init__(
        self,
        cfg: RunConfig,
        dist: Dist,
        lock: RunLock,
        modules: dict[str, nn.Module],  # "model", and what else a checkpoint must hold
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer | None,
        data: Mapping[str, str] | None = None,  # what it trains on: a flag and a sha256 each
    ):
        self.cfg, self.dist, self.lock = cfg, dist, lock
        self.modules, self.optimizer = modules, optimizer
        if dist.is_main:
            lock_config(cfg, cfg.run_dir)  # not before set-up worked: a failed start binds nobody
        barrier(dist)
        self._checkpoints = Checkpoints(cfg.run_dir, modules, optimizer, tokenizer, dist)
        fresh = {"step": 0, "seconds": 0.0, "skipped_in_a_row": 0}
        self.state: dict[str, Any] = self._checkpoints.load_latest() or fresh
        self._check_data(data or {})
        self.signal = StopSignal()
        self._desc, self._saved_step = "", self.state["step"]
        self.failed_saves = 0
        self.ends_with: str | None = None  # once set, the run ends with this line after its step
        self._shown: dict[str, str] = {}
        if dist.is_main:
            first = self.state["step"]
            self._log = RunLog(cfg.run_dir, start_step=first, tensorboard=cfg.tensorboard)

    def _check_data(self, data: Mapping[str, str]) -> None:
        """Refuse to go on with data other than the run began with."""
        before = self.state.setdefault("data", dict(data))
        changed = [name for name in data if before.get(name, data[name]) != data[name]]
        if changed:
            raise SystemExit(
                f"{self.cfg.run_dir} was trained on other contents of {', '.join(changed)} than it "
                "has now: give back the old ones, or another --run_dir"
            )

    def steps(self, num_steps: int, *, desc: str) -> Iterator[int]:
        """Yield the steps still to do.

        When the loop asks for the next step, this one is done: it is then saved, after each
        interval, at the end, and when a signal or `ends_with` asks to stop, on all ranks alike.
        """
        first, self._desc = self.state["step"], desc
        if 0 < first < num_steps:
            self.say(f"{desc}: continuing {self.cfg.run_dir} at step {first} of {num_steps}")
        self.bar = progress(
            total=num_steps, initial=first, desc=desc, unit="step", disable=not self.dist.is_main
        )
        # Warnings, such as those of rewards, go above the bar and not behind it.
        with self.signal as signal, self.bar, logging_redirect_tqdm():
            started = time.monotonic() - self.state["seconds"]
            for step in range(first, num_steps):
                self.lock.doing = f"{desc}, step {step}"
                yield step
                self.bar.update()
                if step == first:
                    set_timeout(self.dist, STEP_TIMEOUT_S)
                self.state.update(step=step + 1, seconds=time.monotonic() - started)
                stop = signal.requested(self.dist) or self.ends_with is not None
                if stop or step + 1 == num_steps or (step + 1) % self.cfg.checkpoint_interval == 0:
                    self._save(must_succeed=stop or step + 1 == num_steps)
                if stop and step + 1 < num_steps:
                    if self.ends_with is not None:
                        raise SystemExit(f"step {step}: {self.ends_with}")
                    self._end()
        self.say(f"{desc}: all {num_steps} steps are done ({self.cfg.run_dir})")

    def leave_step(self) -> NoReturn:
        """End the run before its step has changed anything, when a signal asked for that."""
        if self.state["step"] > self._saved_step:
            self._save(must_succeed=True)
        self._end()

    def _end(self) -> NoReturn:
        done = self.state["step"]
        where = f"after step {done - 1}" if done else "before the first step was done"
        self.say(f"{self._desc}: stopped {where}; the same command continues")
        raise SystemExit(0)

    def log(
        self,
        step: int,
        values: Mapping[str, float],
        shown: tuple[str, ...] = (),
        batch: tuple[str, Sequence[int]] = ("rows", ()),
    ) -> None:
        """Write one row of metrics, show some on the bar, and watch for skipped steps.

        batch: what the step trained on, as a kind and numbers; a skipped step names it. Raises
        SystemExit on all ranks after MAX_SKIPPED_STEPS in a row.
        """
        skipped = 0 if values.get("stepped", 1.0) else self.state["skipped_in_a_row"] + 1
        self.state["skipped_in_a_row"] = skipped
        kind, numbers = batch[0], [int(number) for number in batch[1]]
        if self.dist.is_main:
            self._log.metrics(step, {**values, f"skipped_{kind}": numbers} if skipped else values)
        self._shown |= {k: f"{values[k]:.4g}" for k in shown if k in values}
        self.bar.set_postfix(self._shown, refresh=False)
        if not skipped:
            return
        named = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        text = f"step {step}: the gradient is not finite ({kind} {named})"
        self.say(f"{text}: that update is skipped; all numbers in metrics.jsonl")
        if skipped >= MAX_SKIPPED_STEPS:
            raise SystemExit(f"{text}, {MAX_SKIPPED_STEPS} in a row: the run ends")

    def _save(self, must_succeed: bool) -> None:
        try:
            agree(lambda: self._log.sync(), self.dist, main_only=True)
            self.lock.check(self.dist)
            self._checkpoints.save(self.state["step"], self.state, self.cfg.keep_checkpoints)
            self.failed_saves, self._saved_step = 0, self.state["step"]
        except SaveFailed as error:
            self.failed_saves += 1
            self.say(f"warning: {error}")
            if must_succeed or self.failed_saves >= MAX_FAILED_SAVES:
                raise SystemExit(
                    f"the run cannot be saved ({self.failed_saves} in a row failed): {error}"
                ) from None

    def say(self, text: str) -> None:
        """Print a line above the bar, once."""
        if self.dist.is_main:
            with tqdm.external_write_mode():
                print(text, flush=True)

    def samples(self, step: int, lines: Sequence[str]) -> None:
        """Write whole samples as text, those of the first rank."""
        if self.dist.is_main:
            self._log.samples(step, lines)

    def close(self) -> None:
        if self.dist.is_main:
            self._log.close()


def supervised_update(run: Run, cfg: Any, step: int, batch: TrainBatch) -> dict[str, float]:
    """Take a supervised step of a run at its schedule's rate; return what to log."""
    lr = SCHEDULES[cfg.schedule](
        step, num_steps=cfg.num_steps, peak=cfg.lr, warmup_steps=cfg.warmup_steps
    )
    metrics = supervised_step(
        run.modules["model"],
        run.optimizer,
        batch,
        lr=lr,
        max_grad_norm=cfg.max_grad_norm,
        micro_batch_size=cfg.micro_batch_size,
        dist=run.dist,
    )
    return metrics | {"lr": lr}
