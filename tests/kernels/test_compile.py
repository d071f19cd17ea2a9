"""The Triton source compiled for sm_90 without a GPU: registers, spills, bytes, recompilation.

In a process of its own: the other tests may have set TRITON_INTERPRET, and Triton reads it when a
function is decorated. There a stand-in for the driver answers only which GPU to compile for, so
that the launchers themselves run, up to the launch.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

PROGRAM = r"""
import json, pathlib, re, subprocess, tempfile
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from kernels import policy_loss_triton as source
from kernels.reference import Objective
from kernels.rows import Rows, RowStats

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_active_torch_device = lambda self: torch.device("cpu")

driver.set_active(Driver())
for kernel in (source.policy_loss_kernel, source.scale_kernel):
    kernel.run = lambda *args, run=kernel.run, **kwargs: run(*args, **kwargs | {"warmup": True})

def launch(kind, num_rows, vocab_size, objective, dtype=torch.bfloat16, stride=None, first=0):
    logits_NV = torch.zeros(num_rows, stride or vocab_size, dtype=dtype)[:, :vocab_size]
    ones_N, ids_N = torch.ones(first + num_rows), torch.zeros(first + num_rows, dtype=torch.int64)
    ones_N, ids_N = ones_N[first:], ids_N[first:]
    rows = {
        "policy_loss": Rows(ids_N, ones_N, ones_N, ones_N, ones_N, ids_N),
        "cross_entropy": Rows(ids_N, ones_N, ids_N=ids_N),
        "token_logprobs": Rows(ids_N, ids_N=ids_N),
    }[kind]
    stats = RowStats.new(logits_NV, first + num_rows, has_loss=rows.weights_N is not None)
    stats = stats.take(slice(first, None))
    grad_NV = None if rows.weights_N is None else logits_NV
    status = torch.zeros(1, dtype=torch.int64)
    source.launch_rows(logits_NV, rows, objective, stats, grad_NV, status)

def compiled(kernel):
    return list(kernel.device_caches[0][0].values())

def report(kernel):
    ptx, ttgir = compiled(kernel)[-1].asm["ptx"], compiled(kernel)[-1].asm["ttgir"]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.ptx")
        path.write_text(ptx)
        arch = re.search(r"\.target (\w+)", ptx)[1]
        # A release may ship several assemblers: the one Triton itself takes for this GPU.
        options = ["-v", f"--gpu-name={arch}", path, "-o", path.with_suffix(".cubin")]
        command = [get_ptxas(90).path, *options]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    wide = lambda verb: re.findall(rf"{verb}\.global[\w.:]*\.v4\.b32", ptx)
    return {
        "warps": int(re.search(r'"ttg.num-warps" = (\d+)', ttgir)[1]),
        "registers": int(re.search(r"Used (\d+) registers", usage)[1]),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", usage))),
        "keeping": sum("L1::evict_last.L2::cache_hint" in x for x in wide("ld")),
        "releasing": sum("L1::evict_first.L2::cache_hint" in x for x in wide("ld")),
        "policies": sorted(set(re.findall(r"createpolicy.fractional.L2::(\w+)", ptx))),
        "wide_stores": len(wide("st")),
        "rounded": len(re.findall(r"cvt\.rn\.bf16x2\.f32", ptx)),
        "target_last": bool(re.search(r"st\.global\.cs.*bar\.sync.*st\.global\.b16", ptx, re.S)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "narrow_offsets": len(re.findall(r"arith.muli %\w+, %logits_stride.* : i32", ttgir)),
    }

rows = []
for kind in ("policy_loss", "cross_entropy", "token_logprobs"):
    for vocab_size in (1024, 102400, 151936):
        source.policy_loss_kernel.device_caches.clear()
        launch(kind, 4, vocab_size, Objective(0.2, 0.2, 0.0))
        rows.append({"kind": kind, "vocab_size": vocab_size, **report(source.policy_loss_kernel)})
for estimator in ("k1", "k2"):
    source.policy_loss_kernel.device_caches.clear()
    launch("policy_loss", 4, 1024, Objective(0.2, 0.2, 0.0, kl_estimator=estimator))
    rows.append({"kind": estimator, "vocab_size": 1024, **report(source.policy_loss_kernel)})
print(json.dumps(rows))

source.policy_loss_kernel.device_caches.clear()
for num_rows in (1, 3, 16, 257):
    for settings in [(0.2, 0.2, 0.0, 1.0), (0.1, 0.28, 0.04, 0.7), (0.0, 1.0, 1.0, 2.0)]:
        launch("policy_loss", num_rows, 102400, Objective(*settings))
launch("policy_loss", 2, 51200, Objective(0.2, 0.2, 0.0))
launch("policy_loss", 2, 51200, Objective(0.2, 0.2, 0.0), stride=51216)
for first in (1, 2, 4, 8):
    launch("policy_loss", 2, 102400, Objective(0.2, 0.2, 0.0), first=first)
for num_rows in (2, 48, 100):
    source.launch_scale(torch.zeros(num_rows, 4096), torch.ones(()))
print(len(compiled(source.policy_loss_kernel)), len(compiled(source.scale_kernel)))
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300,
        env=environment,
    )  # fmt: skip
    if result.returncode:
        error = result.stderr.strip().splitlines()[-1]
        if "driver" in error.lower():
            pytest.skip(f"this Triton cannot compile for sm_90 without a driver: {error}")
        pytest.fail(result.stderr)
    rows, counts = result.stdout.splitlines()
    return json.loads(rows), [int(count) for count in counts.split()]


def test_no_spills_on_sm_90(reports):
    """Every form and block compiles for sm_90 without spilling, its registers fit into an SM and
    row offsets are 64 bits wide; nothing is atomic."""
    assert len(reports[0]) == 11
    for row in reports[0]:
        print(row)
        assert row["spilled_bytes"] == 0, row
        assert row["registers"] * 32 * row["warps"] <= 65536, row
        assert row["atomics"] == row["narrow_offsets"] == 0, row


def test_each_sweep_reads_once_16_bytes_at_a_time(reports):
    """A block of 8 bf16 logits a thread is one load in sweep 1 (kept in the cache) and one in sweep
    2 (released), each there three times (two before the loop, one in it), and one store; without
    gradient there is one sweep, and nothing is kept. A gradient is rounded to bf16, not cut off,
    and a barrier parts the stores of a row from the one over its target's entry."""
    for row in reports[0]:
        print(row)
        has_gradient = row["kind"] != "token_logprobs"
        assert row["keeping"] == 3 * has_gradient and row["releasing"] == 3, row
        assert row["policies"] == ["evict_first", "evict_last"][: 1 + has_gradient], row
        assert (row["wide_stores"] > 0) == has_gradient, row
        assert row["target_last"] == has_gradient, row
        assert row["rounded"] == 4 * has_gradient, row  # two at a time


def test_one_row_of_a_large_vocabulary_fills_an_sm(reports):
    """At V = 102,400 one program takes more than half of an SM's registers and threads: with a
    second one there the rows in flight would not stay in the L2 cache between the sweeps. Scoring,
    of one sweep, runs as many threads, which sum in the same order."""
    for row in reports[0]:
        assert row["warps"] == (32 if row["vocab_size"] > 100_000 else 4), row
        if row["vocab_size"] > 100_000 and row["kind"] != "token_logprobs":
            assert row["registers"] > 32, row


def test_nothing_compiles_again(reports):
    """Other lengths, chunks that begin at any row, vocabularies of the same block, temperatures,
    clips and betas launch the kernel that is there: one entry in its cache."""
    assert reports[1] == [1, 1]
