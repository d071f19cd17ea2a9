"""Time the losses over the vocabulary beside the peers': `python bench/kernels.py`.

Three tables, forward and backward unless said: the policy loss from logits, log-probabilities from
logits (forward only), the policy loss from hidden states. A CPU runs the last one; a GPU all.

    python bench/kernels.py                                   this machine's default
    OMP_NUM_THREADS=1 nice python bench/kernels.py --threads 1
    ncu --metrics dram__bytes_read.sum,dram__bytes_write.sum \\
        python bench/kernels.py --tables logits --methods nanomath --repeats 1   bytes as counted

Peers come with the extra [peers] (`pip install -e .[peers]`); what is not installed or does not run
is listed with the reason. Everything runs in one process on the same inputs, the methods take turns
round by round and input sets rotate, so that no cache holds what the next call reads. Times are
medians; ratios are medians over rounds of a method's time to nanomath's in that round, with the
10th and 90th percentile, so that a busy machine slows both sides. The floor is timed in the same
rounds: one copy of the logits (one read and one write), half of it for log-probabilities, the three
matrix products for hidden states. Logits have the entropy a policy has, 1.5 nats, and targets are
drawn from them. Results go to bench/results/kernels-DEVICE.json.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from common import ROOT, record, save
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import kernels
from kernels import Objective, reference

OBJECTIVE = Objective(clip_eps_low=0.2, clip_eps_high=0.2, kl_coef=0.04)
ENTROPY = 1.5  # nats
NUM_INPUTS = 3  # input sets that rotate
CHECKED_ROWS = 256  # rows of float64 at a time


class Inputs(NamedTuple):
    """One set: the leaves are (logits [N, V],) or (hidden [N, D], head [V, D])."""

    leaves: tuple[Tensor, ...]
    targets_N: Tensor
    rows: dict[str, Tensor]  # the keyword arguments of kernels.policy_loss
    sequence: int  # tokens of a sequence; liger takes one advantage a sequence

    def by_sequence(self, name: str) -> Tensor:
        return self.rows[name].view(-1, self.sequence)


def make_inputs(args, table: str, seed: int) -> Inputs:
    """Draw one set of inputs with logits of ENTROPY nats and targets sampled from them."""
    generator = torch.Generator(args.device).manual_seed(seed)
    options = {"device": args.device, "generator": generator}
    hidden_ND = torch.randn(args.rows, args.width, **options)
    head_VD = torch.randn(args.vocab, args.width, **options) / args.width**0.5
    low, high = 0.0, 20.0  # bisect the scale that gives the entropy
    for _ in range(20):
        scale = (low + high) / 2
        entropy = reference.entropy((hidden_ND[:64] @ (scale * head_VD).T).log_softmax(1)).mean()
        low, high = (scale, high) if entropy > ENTROPY else (low, scale)
    hidden_ND, head_VD = hidden_ND.to(args.dtype), (scale * head_VD).to(args.dtype)
    logits_NV = torch.empty(args.rows, args.vocab, dtype=args.dtype, device=args.device)
    targets, logps = [], []
    for rows in torch.arange(args.rows, device=args.device).split(256):
        logits_NV[rows] = hidden_ND[rows] @ head_VD.T
        logp_CV = logits_NV[rows].float().log_softmax(1)
        targets.append(logp_CV.exp().multinomial(1, generator=generator))
        logps.append(logp_CV.gather(1, targets[-1])[:, 0])
    logp_N = torch.cat(logps)
    advantages_N = torch.randn(args.rows // args.sequence, **options)
    rows = {
        "weights_N": torch.full_like(logp_N, 1 / args.rows),
        "advantages_N": advantages_N.repeat_interleave(args.sequence),
        "old_logp_N": logp_N + 0.2 * torch.randn(args.rows, **options),
        "ref_logp_N": logp_N + 0.2 * torch.randn(args.rows, **options),
    }
    leaves = (hidden_ND, head_VD) if table == "hidden" else (logits_NV,)
    return Inputs(leaves, torch.cat(targets)[:, 0], rows, args.sequence)


def loss_from_logp(logp_N: Tensor, rows: dict[str, Tensor]) -> Tensor:
    """The loss as the peers without a fused one compute it, by autograd."""
    ratio_N = (logp_N - rows["old_logp_N"]).exp()
    low, high = 1 - OBJECTIVE.clip_eps_low, 1 + OBJECTIVE.clip_eps_high
    advantages_N = rows["advantages_N"]
    loss_N = -torch.minimum(ratio_N * advantages_N, ratio_N.clamp(low, high) * advantages_N)
    log_ref_N = rows["ref_logp_N"] - logp_N
    loss_N = loss_N + OBJECTIVE.kl_coef * (log_ref_N.exp() - log_ref_N - 1)
    return (loss_N * rows["weights_N"]).sum()


def torch_logp(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return logits_NV.float().log_softmax(1).gather(1, targets_N[:, None])[:, 0]


def torch_loss(logits_NV: Tensor, targets_N: Tensor, rows: dict[str, Tensor]) -> Tensor:
    return loss_from_logp(torch_logp(logits_NV, targets_N), rows)


def torch_linear_loss(hidden_ND, head_VD, targets_N, rows):
    return torch_loss(hidden_ND @ head_VD.T, targets_N, rows)


def logits_nanomath(inputs: Inputs, logits_NV: Tensor) -> Tensor:
    return kernels.policy_loss(logits_NV, inputs.targets_N, **inputs.rows, objective=OBJECTIVE).loss


def logits_trl(inputs: Inputs, logits_NV: Tensor) -> Tensor:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    logp_N, _ = selective_log_softmax_and_entropy(logits_NV, inputs.targets_N)
    return loss_from_logp(logp_N, inputs.rows)


def logits_liger(inputs: Inputs, logits_BTV: Tensor) -> Tensor:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    old_logp_BT, ref_logp_BT = inputs.by_sequence("old_logp_N"), inputs.by_sequence("ref_logp_N")
    return triton_grpo_loss(
        logits_BTV, old_logp_BT, ref_logp_BT, inputs.targets_N.view(-1, inputs.sequence),
        inputs.by_sequence("advantages_N")[:, 0].contiguous(), temperature=1.0,
        beta=OBJECTIVE.kl_coef, eps_low=OBJECTIVE.clip_eps_low,
        eps_high=OBJECTIVE.clip_eps_high, loss_type="grpo", inplace=True, reduce=True,
    )[0]  # fmt: skip


def logprobs_trl(inputs: Inputs, logits_NV: Tensor) -> Tensor:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits_NV, inputs.targets_N)[0]


def logprobs_liger(inputs: Inputs, logits_BTV: Tensor) -> Tensor:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    targets_BT = inputs.targets_N.view(-1, inputs.sequence)
    return fused_selective_log_softmax(logits_BTV, targets_BT, temperature=1.0)


def hidden_nanomath(inputs: Inputs, hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
    return kernels.linear_policy_loss(
        hidden_ND, head_VD, inputs.targets_N, **inputs.rows, objective=OBJECTIVE
    ).loss


def hidden_trl(inputs: Inputs, hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    logp_N, *_ = ChunkedLogProbFunction.apply(  # arguments as its GRPOTrainer passes them
        hidden_ND, head_VD, None, inputs.targets_N, 1.0, 32768, None, 1.0, ("log_probs", "entropy")
    )
    return loss_from_logp(logp_N, inputs.rows)


def hidden_liger(inputs: Inputs, hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=OBJECTIVE.kl_coef, epsilon_low=OBJECTIVE.clip_eps_low,
        epsilon_high=OBJECTIVE.clip_eps_high, loss_type="grpo",
    )  # fmt: skip
    targets_BT = inputs.targets_N.view(-1, inputs.sequence)
    return loss(
        hidden_ND.view(-1, inputs.sequence, hidden_ND.shape[1]), head_VD, targets_BT,
        torch.ones_like(targets_BT), inputs.by_sequence("advantages_N")[:, 0].contiguous(),
        ref_per_token_logps=inputs.by_sequence("ref_logp_N"),
        old_per_token_logps=inputs.by_sequence("old_logp_N"),
    )[0]  # fmt: skip


compiled_loss, compiled_linear_loss = torch.compile(torch_loss), torch.compile(torch_linear_loss)
compiled_logp = torch.compile(torch_logp)
TABLES: dict[str, dict[str, Callable[..., Tensor]]] = {
    "logits": {
        "nanomath": logits_nanomath,
        "torch eager": lambda inputs, x_NV: torch_loss(x_NV, inputs.targets_N, inputs.rows),
        "torch.compile": lambda inputs, x_NV: compiled_loss(x_NV, inputs.targets_N, inputs.rows),
        "trl": logits_trl,
        "liger": logits_liger,
    },
    "logprobs": {
        "nanomath": lambda inputs, x_NV: kernels.token_logprobs(x_NV, inputs.targets_N)[0],
        "torch eager": lambda inputs, x_NV: torch_logp(x_NV, inputs.targets_N),
        "torch.compile": lambda inputs, x_NV: compiled_logp(x_NV, inputs.targets_N),
        "trl": logprobs_trl,
        "liger": logprobs_liger,
    },
    "hidden": {
        "nanomath": hidden_nanomath,
        "torch eager": lambda inputs, *leaves: torch_linear_loss(
            *leaves, inputs.targets_N, inputs.rows
        ),
        "torch.compile": lambda inputs, *leaves: compiled_linear_loss(
            *leaves, inputs.targets_N, inputs.rows
        ),
        "trl": hidden_trl,
        "liger": hidden_liger,
    },
}


def fresh_leaves(table: str, method: str, inputs: Inputs) -> list[Tensor]:
    """Copy the leaves: some methods overwrite them. Not timed."""
    leaves = [leaf.clone() for leaf in inputs.leaves]
    if method == "liger" and table != "hidden":  # one position more than targets a sequence
        leaves = [x.view(-1, inputs.sequence, x.shape[1]) for x in leaves]
        leaves = [torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in leaves]
    return [leaf.requires_grad_(table != "logprobs") for leaf in leaves]


def run(table: str, method: str, inputs: Inputs, leaves: list[Tensor]) -> Tensor:
    """Run a method once; the result of the floor is meaningless."""
    if method != "floor":
        result = TABLES[table][method](inputs, *leaves)
        if table != "logprobs":
            result.backward()
        return result.detach()
    with torch.no_grad():
        if table != "hidden":  # where the copy goes is there already
            return leaves[0].copy_(inputs.leaves[0])
        hidden_ND, head_VD = leaves
        logits_NV = hidden_ND @ head_VD.T
        return (logits_NV @ head_VD, logits_NV.T @ hidden_ND)[0]


def seconds(table: str, method: str, inputs: Inputs) -> float:
    leaves = fresh_leaves(table, method, inputs)
    if leaves[0].is_cuda:
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # a millisecond in which the host queues the launches
        start.record()
        run(table, method, inputs, leaves)
        end.record()
        end.synchronize()
        elapsed = start.elapsed_time(end) / 1e3
    else:
        begin = time.perf_counter()
        run(table, method, inputs, leaves)
        elapsed = time.perf_counter() - begin
    return elapsed / 2 if (table, method) == ("logprobs", "floor") else elapsed


def peak_bytes(table: str, method: str, inputs: Inputs) -> int:
    """Return the most memory a call holds beside its inputs, its gradients included."""
    leaves = fresh_leaves(table, method, inputs)
    if leaves[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(table, method, inputs, leaves)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(table, method, inputs, leaves)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(changes), default=0)


def exact_results(table: str, inputs: Inputs) -> list[Tensor]:
    """Return float64 gradients (or log-probabilities); from logits, of the first rows."""
    rows = {name: field.double() for name, field in inputs.rows.items()}
    count = len(inputs.targets_N) if table == "hidden" else CHECKED_ROWS
    leaves = [leaf.double().requires_grad_() for leaf in inputs.leaves[1:]]
    firsts = []
    for start in range(0, count, CHECKED_ROWS):
        span = slice(start, start + CHECKED_ROWS)
        first = inputs.leaves[0][span].double().requires_grad_()
        arguments = {name: field[span] for name, field in rows.items()}
        if table == "logprobs":
            firsts.append(reference.token_logprobs(first, inputs.targets_N[span])[0])
            continue
        loss = reference.linear_policy_loss if table == "hidden" else reference.policy_loss
        loss(
            first, *leaves, inputs.targets_N[span], **arguments, objective=OBJECTIVE
        ).loss.backward()
        firsts.append(first.grad)
    return [torch.cat(firsts), *(leaf.grad for leaf in leaves)]


def largest_error(table: str, method: str, inputs: Inputs, exact: list[Tensor]) -> float:
    """Return the largest error of a result over the largest value of the exact one."""
    leaves = fresh_leaves(table, method, inputs)
    result = run(table, method, inputs, leaves)
    results = [result.flatten()] if table == "logprobs" else [leaf.grad for leaf in leaves]
    results = [x[:, :-1].flatten(0, 1) if x.dim() == 3 else x for x in results]
    errors = (
        ((x[: len(y)].double() - y).abs().max() / y.abs().max()).item()
        for x, y in zip(results, exact, strict=True)
    )
    return max(errors)


def measure(args: argparse.Namespace, table: str) -> dict[str, dict]:
    """Return the row of each method that runs: times in seconds, bytes, errors."""
    input_sets = [make_inputs(args, table, seed) for seed in range(NUM_INPUTS)]
    exact = exact_results(table, input_sets[0])
    rows = {}
    for method in ["floor", *args.methods]:
        try:
            seconds(table, method, input_sets[0])  # compiles, or is not installed
            rows[method] = {"times": []}
            if method != "floor":
                rows[method]["peak_bytes"] = peak_bytes(table, method, input_sets[1])
                rows[method]["error"] = largest_error(table, method, input_sets[0], exact)
        except Exception as error:
            rows[method] = {"reason": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
    for index in range(args.repeats):
        for method, row in rows.items():
            if "times" in row:
                inputs = input_sets[index % NUM_INPUTS]
                row["times"].append(seconds(table, method, inputs))
    for row in rows.values():
        if "times" in row:
            row["seconds"] = statistics.median(row["times"])
            ours = rows.get("nanomath", {}).get("times", row["times"])
            ratios = sorted(x / y for x, y in zip(row["times"], ours, strict=True))
            row["ratio"] = statistics.median(ratios)
            row["ratio_10_90"] = [ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]]
            row["share_of_floor"] = rows["floor"]["seconds"] / row["seconds"]
    return rows


def show(args: argparse.Namespace, table: str, rows: dict[str, dict]) -> None:
    element = torch.empty((), dtype=args.dtype).element_size()
    if table == "hidden":
        work, unit = 6 * args.rows * args.vocab * args.width / 1e9, "GFLOP/s"
        title = f"policy loss from hidden states, D={args.width}, forward + backward"
    else:
        passes = 2 if table == "logits" else 1
        work, unit = passes * args.rows * args.vocab * element / 1e9, "GB/s"
        what = "policy loss, forward + backward," if passes == 2 else "log-probabilities"
        title = f"{what} from logits ({work:.2f} GB at least)"
    print(f"\n{title}: N={args.rows} V={args.vocab} {args.dtype}, {args.device}")
    print(
        f"{'':14}{'ms':>9}{unit:>9}{'floor':>7}{'x nanomath [10%, 90%]':>24}{'MiB':>8}{'error':>9}"
    )
    for method, row in rows.items():
        if "reason" in row:
            print(f"{method:14} does not run: {row['reason']}")
            continue
        low, high = row["ratio_10_90"]
        ratio = f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]"
        line = f"{method:14}{row['seconds'] * 1e3:9.2f}{work / row['seconds']:9.0f}"
        line += f"{row['share_of_floor']:7.0%}{ratio:>24}"
        if "error" in row:
            line += f"{row['peak_bytes'] / 2**20:8.0f}{row['error']:9.1e}"
        print(line)


def parse_args() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tables", nargs="+", choices=TABLES, help="default: all a device runs")
    parser.add_argument(
        "--methods", nargs="+", choices=TABLES["hidden"], default=[*TABLES["hidden"]]
    )
    parser.add_argument("--rows", type=int, help=f"tokens, a multiple of {CHECKED_ROWS}")
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a sequence, for liger")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--output", type=Path, help="default: bench/results/kernels-DEVICE.json")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.tables = args.tables or (list(TABLES) if on_gpu else ["hidden"])
    args.rows = args.rows or (8192 if on_gpu else 512)
    args.vocab = args.vocab or (102_400 if on_gpu else 32_768)
    args.width = args.width or (2048 if on_gpu else 512)
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    if min(args.rows, args.repeats, args.sequence, args.threads) < 1:
        parser.error("--rows, --repeats, --sequence and --threads must be at least 1")
    if args.rows % CHECKED_ROWS or args.rows % args.sequence:
        parser.error(f"--rows must be a multiple of {CHECKED_ROWS} and of --sequence")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    results = {**record(args.device, "triton", "trl", "liger-kernel"), "threads": args.threads}
    print(results)
    for table in args.tables:
        rows = measure(args, table)
        show(args, table, rows)
        sizes = {name: getattr(args, name) for name in ("rows", "vocab", "width", "sequence")}
        results[table] = {**sizes, "dtype": str(args.dtype), "methods": rows}
    name = "cuda" if args.device == "cuda" else f"cpu-{args.threads}-thread"
    path = args.output or ROOT / "bench" / "results" / f"kernels-{name}.json"
    save(results, path)


if __name__ == "__main__":
    main()
