"""The Triton source compiled for sm_90 without a GPU: registers, spills, what is compiled in.

In a process of its own: the other tests may have set TRITON_INTERPRET, and Triton reads it when a
function is decorated.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

PROGRAM = r"""
import json, pathlib, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from kernels import policy_loss_triton as source

FLOATS = {"exponent_scale": "fp32", "temperature": "fp64", "clip_eps_low": "fp64",
          "clip_eps_high": "fp64", "kl_coef": "fp64"}
POINTERS = {"logits_ptr": "*bf16", "grad_ptr": "*bf16", "targets_ptr": "*i64", "ids_ptr": "*i64",
            "clipped_ptr": "*i8", "status_ptr": "*i64", "upstream_ptr": "*fp32"}
DIVISIBLE = ["logits_ptr", "grad_ptr", "logits_stride", "grad_stride", "vocab_size"]

def ptxas(ptx):
    binary = get_ptxas(90).path  # a release may ship several: the one Triton itself takes
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.ptx")
        path.write_text(ptx)
        arch = re.search(r"\.target (\w+)", ptx)[1]
        command = [binary, "-v", f"--gpu-name={arch}", path, "-o", path.with_suffix(".cubin")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr

def compile(kernel, constants, num_warps):
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*fp32")
        else:
            signature[name] = FLOATS.get(name, "i32")
        if name in DIVISIBLE:
            attributes[(index,)] = [["tt.divisibility", 16]]
    ast = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(ast, target=target, options={"num_warps": num_warps}).asm["ptx"]

flags = [p.name for p in source.policy_loss_kernel.params if p.is_constexpr]
print(json.dumps({"constexpr": flags}))
for vocab_size in (1024, 4096, 102400):
    block, warps = source.block_and_warps(vocab_size)
    constants = dict.fromkeys(flags, True) | {"BLOCK": block}
    ptx = compile(source.policy_loss_kernel, constants, warps)
    report = ptxas(ptx)
    print(json.dumps({
        "vocab_size": vocab_size, "block": block, "warps": warps,
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "wide_loads": len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", ptx)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
    }))
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
    constexpr, *rows = map(json.loads, result.stdout.splitlines())
    return constexpr["constexpr"], rows


def test_no_spills_on_sm_90(reports):
    """Every block size compiles for sm_90 without spilling, fits a program's registers into an SM
    and loads 16 bytes at a time; nothing is atomic."""
    for row in reports[1]:
        print(row)
        assert row["spilled_bytes"] == 0, row
        assert row["registers"] * 32 * row["warps"] <= 65536, row
        assert row["wide_loads"] >= 2 and row["atomics"] == 0, row


def test_run_time_numbers_are_not_compiled_in(reports):
    """Only switches and the block are compile-time: other lengths, temperatures, beta and eps
    never compile again."""
    switches = {"HAS_LOSS", "HAS_ADVANTAGES", "HAS_OLD", "HAS_REF", "HAS_IDS", "HAS_STATUS"}
    assert set(reports[0]) == switches | {"WRITE_GRAD", "BLOCK"}
