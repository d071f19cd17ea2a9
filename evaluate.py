"""Evaluate a checkpoint: accuracy, Pass@K and Maj@K (Sec. 5, 6).

    python evaluate.py --preset cpu --checkpoint runs/grpo --out runs/eval-grpo.json
    python evaluate.py --checkpoint runs/grpo --compare runs/eval-sft.json --out runs/eval-grpo.json
    python evaluate.py --checkpoint models/qwen --tasks gsm8k math --data data --num_samples 64
    torchrun --nproc_per_node 8 evaluate.py --preset gpu --checkpoint runs/grpo

Writes the figures to --out (else into the run's folder, or for a Hugging Face folder, which stays
as it is, under runs/evaluation), and beside it whole outputs with their judgements (.samples.txt)
and Pass@K and Maj@K against K (.png); with several tasks, files of each: eval-gsm8k.json for
eval.json.
Finished problems are kept in a folder beside it (.parts): the same command continues an interrupted
evaluation, on any number of processes, and a finished one is only printed. Other weights, another
tokenizer, other problems or settings of sampling start anew.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanomath.base.config import one_line_errors, opt, parse, to_json
from nanomath.base.files import write_json, write_text
from nanomath.base.log import printable, progress
from nanomath.dist import Dist, broadcast_json, setup
from nanomath.measure.evaluation import (
    check_same_problems,
    compare,
    draw_at_k,
    problem_record,
    sample_problems,
    summarise,
)
from nanomath.run import presets
from nanomath.run.guard import raise_together, wait_for_all
from nanomath.run.load import is_hf_folder, load_model
from nanomath.tasks import Problem, benchmarks, countdown, encode_prompt
from nanomath.tasks.registry import TASKS
from nanomath.text.chat import CHOICES, use_template


@dataclass(frozen=True)
class EvalConfig:
    checkpoint: str = opt("runs/speedrun-cpu/grpo", "run folder, checkpoint or Hugging Face folder")
    tasks: tuple[str, ...] = opt(
        ("countdown",), "which problems; jsonl: your own, in --problems", choices=(*TASKS,)
    )
    out: str = opt("", "JSON file of the figures; empty: evaluation-TASK.json, see above")
    compare: str | None = opt(
        None, "figures of another checkpoint on the same problems, to subtract"
    )
    # Problems
    num_problems: int | None = opt(
        None, "problems of each task, at most; none: all of a file, or 1000 generated ones", low=1
    )
    data: str = opt("", "folder of the benchmark files; empty: NANOMATH_DATA, else data")
    few_shot: bool = opt(False, "benchmarks: worked examples first, for base models")
    problems: str | None = opt(
        None,
        'your own JSONL: {"question": .., "answer": ..} for jsonl, {"nums": [..], "target": n} for '
        "countdown; of its rows those that train_grpo.py holds out, one in ten",
    )
    all_rows: bool = opt(False, "all rows of --problems: a file that was not trained on")
    problem_seed: int = opt(0, "seed of the problems; train_grpo.py evaluates on seed 0", low=0)
    num_numbers: tuple[int, ...] = opt((3, 4), "numbers per Countdown problem", low=2, high=5)
    max_number: int = opt(99, "largest given number", low=1)
    max_target: int = opt(100, "largest target", low=1)
    chat_template: str = opt(
        "auto", "layout of a prompt, see chat.py; auto: as trained, else plain", choices=CHOICES
    )
    prompt_style: str = opt("short", "prompt wording", choices=countdown.STYLES)
    # Sampling
    num_samples: int = opt(
        8, "samples per problem n, for Pass@K and Maj@K up to n", low=0, high=1000
    )
    temperature: float = opt(0.7, "sampling temperature, Sec. 5", low=1e-3, high=1e6)
    max_new_tokens: int = opt(1024, "tokens per output at most, Sec. 4.2", low=1)
    seed: int = opt(0, "seed of the samples", low=0, high=2**63 - 1)
    # The run
    max_rows: int = opt(512, "outputs sampled at a time, per process", low=1)
    cache_gb: float = opt(0.0, "GB for keys and values, fewer rows if need be; 0: any", low=0.0)
    shown_problems: int = opt(50, "problems whose outputs are written to the samples file", low=0)
    device: str = opt("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    threads: int = opt(0, "torch threads per process; 0: one per core", low=0, high=1024)


# The settings that outputs depend on, beside those that choose and word the problems.
SAMPLING = ("num_samples", "temperature", "max_new_tokens", "seed")


def load_problems(cfg: EvalConfig, task: str) -> tuple[list[Problem], list[str]]:
    """Return a task's problems, and what is to be said about them."""
    if task == "countdown" and cfg.problems is None:
        problems = countdown.generate(
            cfg.num_problems or 1000,
            countdown.Ranges.of(cfg),
            split="heldout",
            seed=cfg.problem_seed,
            style=cfg.prompt_style,
        )
        return problems, []
    if task not in ("countdown", "jsonl"):
        folder = cfg.data or os.environ.get("NANOMATH_DATA") or "data"
        problems = benchmarks.read_benchmark(task, folder, few_shot=cfg.few_shot)
        problems = spread(problems, cfg.num_problems)
        path = Path(folder) / benchmarks.BENCHMARKS[task].file
        return problems, benchmarks.unreadable_references(problems, path)
    if cfg.problems is None:
        raise ValueError("--tasks jsonl needs --problems: your JSONL of question and answer")
    if task == "countdown":
        found = countdown.read_problems(cfg.problems, style=cfg.prompt_style)
        splits = [countdown.split_of(**problem.payload) for problem in found]
    else:
        found = benchmarks.read_own(cfg.problems, few_shot=cfg.few_shot)
        splits = [problem.payload["split"] for problem in found]
    pairs = zip(found, splits, strict=True)
    problems = [problem for problem, split in pairs if cfg.all_rows or split == "heldout"]
    if not problems:
        raise ValueError(
            f"{cfg.problems}: all {len(found)} problems are of the training split; "
            "--all_rows evaluates on them"
        )
    notes = data_notes(cfg, len(found), len(problems))
    problems = spread(problems, cfg.num_problems)
    if task == "jsonl":
        notes += benchmarks.unreadable_references(problems, cfg.problems)
    return problems, notes


def spread(problems: list[Problem], num: int | None) -> list[Problem]:
    """Return at most num of the problems, evenly through them: MATH is sorted by subject."""
    count = min(num or len(problems), len(problems))
    return [problems[i * len(problems) // count] for i in range(count)]


def data_notes(cfg: EvalConfig, num_found: int, num_kept: int) -> list[str]:
    """Return lines that say which rows of --problems are left out, and why."""
    notes = []
    if num_kept < num_found:
        notes.append(
            f"{cfg.problems}: {num_found - num_kept} of {num_found} problems left out, "
            "of the training split (--all_rows keeps them)"
        )
    return notes


def evaluation_hash(
    cfg: EvalConfig, model: torch.nn.Module, tokenizer: Any, problems: list[Problem]
) -> str:
    """Return a hash of all the outputs depend on: the model with every weight, the tokenizer, the
    problems as they are asked and the settings of sampling."""
    digest = hashlib.blake2b(digest_size=8)

    def add(*parts: Any) -> None:
        digest.update(repr(parts).encode())

    add([getattr(cfg, key) for key in SAMPLING], model.cfg)
    add(tokenizer.file, tokenizer.control, tokenizer.stop_ids, tokenizer.template)
    for problem in problems:
        add(problem.id, problem.task, problem.payload, encode_prompt(tokenizer, problem))
    for name, tensor in model.state_dict().items():
        bits = tensor.flatten().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
        # Their sum is exact in any order, and another one if one weight is changed.
        add(name, tensor.shape, tensor.dtype, bits[:64].tolist(), int(bits.sum(dtype=torch.int64)))
    return digest.hexdigest()


def finished_problems(folder: Path, run_hash: str) -> dict[tuple[str, int], list[dict]]:
    """Return the judged outputs of each (kind, problem) that any process finished, whenever."""
    found = {}
    for path in folder.glob("rank-*.jsonl"):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, TypeError):  # a line that was cut
                of, kind, number, judged = json.loads(line)
                if of == run_hash:
                    found[kind, number] = judged
    return found


def sample_unfinished(
    cfg: EvalConfig, loaded: list, problems: list[Problem], folder: Path, run_hash: str, dist: Dist
) -> None:
    """Sample and judge the problems that are not finished, this rank its share, and write each to
    this rank's file as it ends, its greedy output and its samples apart.

    No outputs depend on who samples what, or beside what. The ranks need one file system.
    """
    with one_line_errors():
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / f"rank-{dist.rank}.jsonl", "a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is in use by another evaluation: wait for it, or give another --out"
            ) from None
    kinds = {"greedy": (1, 0.0), "samples": (cfg.num_samples, cfg.temperature)}
    limits = {"max_rows": cfg.max_rows, "cache_gb": cfg.cache_gb or math.inf}
    settings = {"max_new_tokens": cfg.max_new_tokens, "seed": cfg.seed, **limits}
    known = finished_problems(folder, run_hash) if dist.is_main else {}
    unfinished = [[i for i in range(len(problems)) if (kind, i) not in known] for kind in kinds]
    unfinished = broadcast_json(unfinished, dist)
    with file:
        file.write("\n")  # a line that was cut stays one of its own
        for (kind, (num_samples, temperature)), left in zip(kinds.items(), unfinished):
            if num_samples == 0:
                continue
            mine, hidden = left[dist.rank :: dist.world_size], not dist.is_main
            about = {"desc": f"{problems[0].task}, {kind}", "unit": "problem", "disable": hidden}
            bar = progress(total=len(problems), initial=len(problems) - len(left), **about)
            settings |= {"num_samples": num_samples, "temperature": temperature}
            stream = sample_problems(*loaded[:2], [problems[i] for i in mine], **settings)
            with bar, closing(stream):
                for at, judged in stream:
                    print(json.dumps([run_hash, kind, mine[at], judged]), file=file, flush=True)
                    # The other ranks are about as far.
                    bar.update(min(dist.world_size, len(problems) - bar.n))


def sample_pages(records: list[dict[str, Any]]) -> str:
    """Return whole outputs as text, control characters escaped, each line of a model set off."""
    lines = []
    for record in records:
        lines += [f"problem {record['id']} {record['payload']}", quoted(record["prompt"])]
        outputs = [("greedy", record["greedy"])]
        outputs += [(f"sample {i}", sample) for i, sample in enumerate(record["samples"])]
        for title, output in outputs:
            ending = "finished" if output["finished"] else "truncated"
            lines += [
                f"{title}: correct {int(output['correct'])}, format {int(output['format'])}, "
                f"{output['length']} tokens, {ending}",
                quoted(output["text"]),
            ]
        lines.append("")
    return "\n".join(lines)


def quoted(text: str) -> str:
    return "\n".join(f"    | {line}" for line in printable(text).split("\n"))


def table(result: dict[str, Any]) -> str:
    """Return the figures as text."""
    lines = [
        f"{result['checkpoint']}: {result['num_problems']} {result['task']} problems, "
        f"{result['num_samples']} samples each at temperature {result['settings']['temperature']}",
        f"{'':12}{'value':>8}   95% interval",
    ]
    for name, metric in result["metrics"].items():
        low, high = 100 * metric["low"], 100 * metric["high"]
        lines.append(f"{name:12}{100 * metric['value']:7.1f}%   {low:.1f} to {high:.1f}")
    shares = {"truncated": "truncated", "unreadable": "without a readable answer"}
    if result["task"] == "countdown":  # the one task that asks for a format
        shares["format_failures"] = "without the format"
    else:
        shares["strict"] = "right as a string"
        if result["settings"]["few_shot"]:
            shares["last_math"] = "answered by their last formula alone"
    for kind in ("greedy_outputs", "sampled_outputs"):
        about = result[kind]
        if about["outputs"]:
            shown = [f"{100 * about[name]:.1f}% {words}" for name, words in shares.items()]
            tokens = f"{about['mean_tokens']:.1f} tokens"
            lines.append(f"{kind.split('_')[0]} outputs: {', '.join([tokens, *shown])}")
    for key, groups in result["groups"].items():
        lines += [f"by {key}:"]
        for label, means in groups.items():
            shown = [f"{name} {100 * means[name]:.1f}%" for name in headline(result)]
            lines.append(f"  {label}: {means['problems']} problems, {', '.join(shown)}")
    for name, gain in result.get("difference", {}).items():
        lines.append(
            f"{name} against {result['compared_with']}: {100 * gain['value']:+.1f} points "
            f"({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}), "
            f"better on {gain['wins']} problems, worse on {gain['losses']}"
        )
    return "\n".join(lines)


def headline(result: dict[str, Any]) -> list[str]:
    """Return the metrics that stand for all: greedy, and those of one sample and of all."""
    ks = dict.fromkeys((1, result["num_samples"])) if result["num_samples"] else ()
    return ["greedy", *(f"pass@{k}" for k in ks), *(f"maj@{k}" for k in ks if k > 1)]


def overview(results: dict[str, dict[str, Any]]) -> str:
    """Return one line per task."""
    names = headline(next(iter(results.values())))
    rows = [["", "problems", *names]]
    for task, result in results.items():
        values = [f"{100 * result['metrics'][name]['value']:.1f}%" for name in names]
        rows.append([task, str(result["num_problems"]), *values])
    return "\n".join("".join(f"{cell:>13}" for cell in row) for row in rows)


def beside(path: str | Path, ending: str) -> Path:
    """Return the file beside a JSON file that has another ending, whatever dots its name holds."""
    return Path(path).with_name(Path(path).name.removesuffix(".json") + ending)


def task_path(path: str, task: str, tasks: tuple[str, ...]) -> Path:
    """Return a task's file: the path itself, or with several tasks its own beside it."""
    return Path(path) if len(tasks) == 1 else beside(path, f"-{task}.json")


def out_path(cfg: EvalConfig, task: str) -> Path:
    """Return the file of a task's figures: in the run's folder, but never in a Hugging Face folder,
    which was downloaded or is given to others."""
    folder = model = Path(cfg.checkpoint)
    if is_hf_folder(model):
        parts = Path(os.path.relpath(model)).parts
        folder = Path("runs/evaluation", *(part for part in parts if part != ".."))
    default = folder / f"evaluation-{task}.json"
    out = task_path(cfg.out, task, cfg.tasks) if cfg.out else default
    if folder is not model and out.resolve().is_relative_to(model.resolve()):
        raise ValueError(f"{out} would be in the model's folder: give --out elsewhere")
    return out


def read_result(path: Path) -> dict[str, Any] | None:
    """Return the figures in path, or None where there is no file; ValueError for another file."""
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); remove it or give another --out") from None
    whole = isinstance(result, dict) and {"num_samples", "metrics"} <= result.keys()
    rows = result.get("problems") if whole else None
    if not isinstance(rows, list) or not all(isinstance(r, dict) and "classes" in r for r in rows):
        raise ValueError(f"{path}: not written by evaluate.py; give another file")
    return result


def prepare(
    cfg: EvalConfig, dist: Dist
) -> tuple[torch.nn.Module, Any, dict, dict[str, list[Problem]]]:
    """Load the model, its tokenizer and state, and the problems of each task; raise what the user
    can mend, before anything is sampled."""
    # As the sampler of training: bf16 on a GPU.
    dtype = torch.bfloat16 if dist.device.type == "cuda" else None
    model, tokenizer, state = load_model(cfg.checkpoint, device=dist.device, dtype=dtype)
    if tokenizer is None:
        raise ValueError(f"{cfg.checkpoint} holds no tokenizer.json: its outputs cannot be read")
    hint = use_template(tokenizer, cfg.chat_template)
    if hint and dist.is_main:
        print(hint)
    problems = {}
    for task in dict.fromkeys(cfg.tasks):
        problems[task], notes = load_problems(cfg, task)
        if dist.is_main:
            for note in notes:
                print(f"note: {note}")
        longest = max(len(encode_prompt(tokenizer, problem)) for problem in problems[task])
        if longest >= model.cfg.max_context:
            shorter = "--prompt_style short" if task == "countdown" else "another model"
            raise ValueError(
                f"a prompt of {task} has {longest} tokens and the model's context "
                f"{model.cfg.max_context}: give {shorter}"
            )
    return model, tokenizer, state, problems


def run(cfg: EvalConfig, dist: Dist) -> None:
    """Evaluate, or continue, or show what is finished; one task after the other."""
    with one_line_errors():
        if cfg.problems and not {"jsonl", "countdown"} & {*cfg.tasks}:
            raise ValueError("--problems is read by --tasks jsonl and countdown")
        if cfg.all_rows and not cfg.problems:
            raise ValueError("--all_rows is about the rows of --problems: give that too")
        files, others = {}, {}
        for task in cfg.tasks:
            files[task] = out_path(cfg, task)
            read_result(files[task])  # another file there is refused before anything is sampled
            if cfg.compare:
                path = task_path(cfg.compare, task, cfg.tasks)
                if path.resolve() == files[task].resolve():
                    raise ValueError(f"{path}: --compare and --out are one file")
                if (other := read_result(path)) is None:
                    raise FileNotFoundError(f"--compare {path}: no such file")
                others[task] = {**other, "file": str(path)}
        *loaded, problems = prepare(cfg, dist)
        for task, other in others.items():
            asked = [{"id": problem.id, **problem.payload} for problem in problems[task]]
            check_same_problems(other["problems"], asked)
    results = {}
    for task, out in files.items():
        result = run_task(cfg, loaded, problems[task], out, dist)
        if result is not None:
            results[task] = show(cfg, result, others.get(task), out)
        wait_for_all(dist, f"{out}: shown")
    if len(results) > 1:
        print(overview(results))


def run_task(
    cfg: EvalConfig, loaded: list, problems: list[Problem], out: Path, dist: Dist
) -> dict[str, Any] | None:
    """Return one task's figures, evaluated now or read from its file; None on the other ranks."""
    with one_line_errors():
        result = read_result(out)
    model, tokenizer, state = loaded
    run_hash = evaluation_hash(cfg, model, tokenizer, problems)
    is_done = result is not None and result.get("config_hash") == run_hash
    run_hash, is_done = broadcast_json([run_hash, is_done], dist)  # rank 0 decides
    if not is_done:
        folder = out.with_name(out.name + ".parts")
        sample_unfinished(cfg, loaded, problems, folder, run_hash, dist)
        wait_for_all(dist, f"{out}: sampled")
    if not dist.is_main:
        return None
    if not is_done:
        found = finished_problems(folder, run_hash)
        greedy = [found.get(("greedy", i)) for i in range(len(problems))]
        none = None if cfg.num_samples else []
        samples = [found.get(("samples", i), none) for i in range(len(problems))]
        if None in greedy + samples:
            raise SystemExit(f"error: {folder}: a process wrote to another file system's")
        records = [problem_record(*row) for row in zip(problems, greedy, samples, strict=True)]
        write_text(beside(out, ".samples.txt"), sample_pages(records[: cfg.shown_problems]))
        about = {"checkpoint": cfg.checkpoint, "step": state.get("step")}
        result = {**about, "config_hash": run_hash, "settings": to_json(cfg), **summarise(records)}
        result["examples"] = [
            {"prompt": record["prompt"], **record["greedy"]}
            for record in records[: cfg.shown_problems]
        ]
        write_json(out, result)
        shutil.rmtree(folder, ignore_errors=True)  # last: until here a kill loses nothing
    return result


def show(
    cfg: EvalConfig, result: dict[str, Any], other: dict[str, Any] | None, out: Path
) -> dict[str, Any]:
    """Print one task's figures, with the difference to another checkpoint's, and draw them."""
    drawn = {result["checkpoint"]: result}
    if other is not None:
        with one_line_errors():
            difference = compare(other, result)
        result |= {"difference": difference, "compared_with": other["file"]}
        drawn = {other["file"]: other, **drawn}
        write_json(out, result)
    if result["num_samples"]:
        draw_at_k(drawn, beside(out, ".png"))
    print(table(result))
    print(f"figures: {out}")
    return result


def main() -> None:
    cfg = parse(EvalConfig, presets.EVALUATION, description=__doc__)
    with one_line_errors():
        dist = setup(cfg.device, cfg.threads)
    with raise_together(dist):
        try:
            run(cfg, dist)
        except KeyboardInterrupt:
            raise SystemExit("interrupted: the same command continues this evaluation") from None


if __name__ == "__main__":
    main()
