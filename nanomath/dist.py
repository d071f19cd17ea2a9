"""Processes and sharding: one process group, FSDP2 applied from outside the model, reductions.

Every collective of the project is here or inside FSDP2, so that ranks can be reasoned about in
one place. Control messages (flags, JSON, sums of metrics) travel as CPU tensors over gloo,
gradients and weights over NCCL on GPUs and gloo on CPUs. Nothing is pickled. World size 1 on a CPU
has no process group and an unwrapped model (FSDP2 costs 25-60% at small sizes); the same code runs
on both.

Weights of tokens are global (1/(P G |o|) with P and G of all ranks), so gradients are summed over
ranks, never averaged: FSDP2's division by the world size is switched off in `shard`.

Left to others: what is trained (train_*.py), how state is kept (checkpoint.py), how all ranks end
when one fails (guard.py). Next: kernels/policy_loss_triton.py.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from nanomath.activations import wrap_blocks
from nanomath.base.processes import agree_on_life, default_threads

# A rank may wait this long for another one: sampling and judging are uneven between ranks, and the
# first step compiles. `set_timeout` shortens it once the first step is done.
START_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Dist:
    """Who this process is. `mesh` is None without a process group."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None = field(default=None, repr=False, compare=False)
    store: td.Store | None = field(default=None, repr=False, compare=False)  # what they share

    @property
    def is_main(self) -> bool:
        return self.rank == 0


# ---------------------------------------------------------------------------- start and end


def setup(device: str = "auto", threads: int = 0, timeout_s: float = START_TIMEOUT_S) -> Dist:
    """Join the ranks torchrun started, or run alone; choose the device and the number of threads.

    device: auto (a GPU if there is one), cpu or cuda. threads: torch threads of this process, 0 =
    the physical cores it may use divided by the processes on this machine.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    # Processes that each spin as many threads as there are cores slow one another down many times.
    torch.set_num_threads(threads or default_threads(local_world_size))
    chosen = _choose_device(device, local_rank)
    if chosen.type == "cpu" and world_size == 1:
        return Dist(0, 0, 1, chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    timeout, store = timedelta(seconds=timeout_s), td.HashStore()
    if world_size > 1:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
        life = agree_on_life(store, rank, world_size, timeout_s)
        store = td.PrefixStore(life, store)
    # Both on GPUs: control messages travel as CPU tensors, and never wait in NCCL's queue.
    backend = "gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl"
    td.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    mesh = init_device_mesh(chosen.type, (world_size,))
    return Dist(rank, local_rank, world_size, chosen, mesh, store)


def cleanup(dist: Dist) -> None:
    """Leave the process group after every rank has finished. Not for use after an error."""
    if dist.mesh is None or not td.is_initialized():
        return
    barrier(dist)  # the store may live in rank 0: nobody leaves while another still reads it
    td.destroy_process_group()
    # gloo's threads free the last messages under the GIL; an interpreter that is shutting down
    # aborts on that (pytorch#190489), and FSDP2 keeps the group from being joined. Let them finish.
    time.sleep(0.2)


def set_timeout(dist: Dist, seconds: float) -> None:
    """Let collectives wait at most this long from now on; call it after the first step."""
    if dist.mesh is not None:
        td.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"--device {device}: process {local_rank} of this machine needs a GPU of its own, and "
            f"torch sees {torch.cuda.device_count()}; start fewer processes, or use --device cpu"
        )
    return torch.device("cuda", local_rank)


# ---------------------------------------------------------------------------- sharding


def shard(
    model: nn.Module, dist: Dist, activation_checkpointing: str = "none", compile: str = "auto"
) -> nn.Module:
    """Shard the rows of all weights over the ranks, in place, and return the model.

    One FSDP2 group per entry of `model.blocks`, one for the rest (embedding, final norm, head).
    activation_checkpointing: none, selective or full; compile: on, off or auto, on a GPU (both
    activations.py's). Gradients are sums over ranks. GPUs compute in bf16 and reduce gradients in
    fp32; CPUs stay in the model's dtype. World size 1 on a CPU returns the model unwrapped.
    """
    is_cpu = dist.device.type == "cpu"
    compiled = compile == "on" or (compile == "auto" and not is_cpu)
    wrap_blocks(model, activation_checkpointing, compiled)
    if dist.mesh is None:
        return model.to(dist.device)
    precision = MixedPrecisionPolicy()
    if not is_cpu:
        # Inputs are token ids at the root and bf16 already at the blocks: casting would only
        # round the rotary tables.
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # A block's weights are gathered when it runs and let go after it: what is whole at any moment
    # is one block, and the next one on its way. The root keeps embedding and head, which both ends
    # of a pass need, and in whose forward the loss runs (head_fn).
    for block in model.blocks:
        fully_shard(block, mesh=dist.mesh, mp_policy=precision)
    fully_shard(model, mesh=dist.mesh, mp_policy=precision)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Without this a factor becomes a PREMUL_SUM reduction, which gloo does not have.
            module.set_force_sum_reduction_for_comms(True)
    return model


def microbatch_sync(model: nn.Module, is_last: bool) -> None:
    """Reduce gradients over ranks in the coming backward only if it is the step's last one.

    Call it before the forward. Every rank must run the same number of micro-batches, and each one's
    loss must reach every weight, be it with weight 0: FSDP2 reduces only gradients that exist.
    In between a GPU holds whole fp32 gradients (plan.py): 28 GB for 7B, which fit beside the rest.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)


def reshard(model: nn.Module) -> None:
    """Put every FSDP2 group back to its sharded weights.

    A forward without backward leaves the root gathered; reading or writing `parameters()` then
    would meet a copy that the next forward goes on using.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def make_replica(model: nn.Module, dist: Dist) -> nn.Module:
    """Return an unsharded copy to sample from, without gradients: bf16 on a GPU, else as the model.

    An unwrapped model is its own replica. Refresh with `refresh_replica` after each update.
    """
    if not isinstance(model, FSDPModule):
        return model
    # FSDP2 puts a class of its own in front of the model's.
    plain = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    is_gpu = dist.device.type == "cuda"
    with torch.random.fork_rng([dist.device] if is_gpu else []), dist.device:
        replica = plain(model.cfg)
    replica.to(torch.bfloat16 if is_gpu else next(model.parameters()).dtype)
    replica.requires_grad_(False).train(model.training)
    refresh_replica(replica, model, dist)
    return replica


@torch.no_grad()
def refresh_replica(replica: nn.Module, model: nn.Module, dist: Dist) -> None:
    """Gather the sharded weights block by block into the replica, in place: addresses never change.

    Costs one all-gather per block in the compute dtype, and the memory of one block above the
    replica's.
    """
    if replica is model:
        return
    # A copy into the replica's own tensors: CUDA graphs that sample have their addresses.
    reshard(model)
    targets = dict(replica.named_parameters())
    for prefix, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        module.unshard()  # this group only: the weights of nested groups stay DTensors
        for name, weight in module.named_parameters(prefix=prefix):
            if not isinstance(weight, DTensor):
                targets[name].copy_(weight)
        module.reshard()


@torch.no_grad()
def copy_weights(dst: nn.Module, src: nn.Module) -> None:
    """Copy all weights of src into dst in place; both unwrapped, or both sharded alike.

    The reference model of GRPO is refreshed this way (Alg. 1 l.3). No communication.
    """
    reshard(dst)
    reshard(src)
    # Both were sharded alike, so every rank holds the same rows of both.
    for mine, theirs in zip(dst.parameters(), src.parameters(), strict=True):
        local(mine).copy_(local(theirs))


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a sharded tensor, or the tensor itself; the memory is shared."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float | None, dist: Dist) -> float:
    """Scale all gradients so that their joint 2-norm is at most max_norm; return the norm before.

    max_norm None: scale nothing. All of them are sharded over dist's ranks. Rows are summed in
    float64; equal on all ranks. A norm that is not finite is returned and nothing is scaled: the
    caller skips the step.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # Within a row in fp32, 30 times as fast on a CPU as float64 copies of everything (one fp32 sum
    # over 8M numbers is wrong by 4e-4, this by 1e-10); in float64 only where squares overflow.
    for dtype in (None, torch.float64):
        squares = torch.zeros((), dtype=torch.float64, device=dist.device)
        for grad in grads:
            norms = torch.linalg.vector_norm(local(grad), dim=-1, dtype=dtype)
            squares += norms.double().square().sum()
        norm = math.sqrt(all_reduce_sum({"squares": squares.item()}, dist)["squares"])
        if math.isfinite(norm):
            break
    # The norm is the same number on all ranks, so all of them scale, or none does.
    if max_norm is not None and math.isfinite(norm) and norm > max_norm:
        for grad in grads:
            local(grad).mul_(max_norm / norm)
    return norm


# ---------------------------------------------------------------------------- messages


def all_reduce_sum(values: dict[str, float], dist: Dist) -> dict[str, float]:
    """Sum each value over ranks, in float64; the keys must be the same on all ranks."""
    # All in one message: a collective costs its round trip, not its few numbers.
    sums = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
    if dist.mesh is not None and len(values):
        td.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def all_reduce_max(value: float, dist: Dist) -> float:
    """Return the largest value of any rank."""
    largest = torch.tensor(value, dtype=torch.float64)
    if dist.mesh is not None:
        td.all_reduce(largest, td.ReduceOp.MAX)
    return largest.item()


def all_ok(ok: bool, dist: Dist) -> bool:
    """Return True on every rank if ok is true on all of them."""
    return all_reduce_sum({"failed": float(not ok)}, dist)["failed"] == 0.0


def barrier(dist: Dist) -> None:
    """Wait until every rank is here."""
    all_ok(True, dist)


def broadcast_json(obj: object, dist: Dist) -> object:
    """Return rank 0's obj, as read back from strict JSON, on every rank."""
    return gather_json(obj if dist.is_main else None, dist)[0]


def gather_json(obj: object, dist: Dist) -> list:
    """Return every rank's obj in the order of ranks, as read back from strict JSON."""
    # JSON on one process, too, so that what would not survive the journey is found there.
    text = json.dumps(obj, allow_nan=False).encode()
    if dist.mesh is None:
        return [json.loads(text)]
    # gloo gathers tensors of one size: the sizes travel first, then texts padded to the longest.
    sizes = torch.zeros(dist.world_size, dtype=torch.int64)
    sizes[dist.rank] = len(text)
    td.all_reduce(sizes)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    parts = [torch.empty_like(padded) for _ in range(dist.world_size)]
    td.all_gather(parts, padded)
    return [json.loads(bytes(part[:n].numpy())) for part, n in zip(parts, sizes.tolist())]
