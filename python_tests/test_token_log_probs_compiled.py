"""The Triton kernels of token_log_probs, compiled for GPUs that are not here: registers, spills, wide memory access."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from grpo_kernels.token_log_probs._kernels_triton import backward_kernel, forward_kernel, launch_config  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="with TRITON_INTERPRET=1 nothing can be compiled"
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ELEMENT_SIZE = {"*bf16": 2, "*fp16": 2, "*fp32": 4}
POINTERS = {"token_ids": "*i64", "top1_ids": "*i64", "mask": "*i1"}
NUMBERS = {"in_factor": "fp32", "in_low": "fp32", "out_factor": "fp32", "rows": "i32", "inner": "i32", "vocab": "i32"}
TRAINING = {"HAS_MASK": True, "TEMPERATURE": 0, "CAPPED": False, "ENTROPY": True}
EVERYTHING = {"HAS_MASK": True, "TEMPERATURE": 2, "CAPPED": True, "ENTROPY": True}
FORWARD = {"SQUARED": False, "TOP1": False, "STATISTICS": True}


def compile_kernel(kernel: Any, dtype: str, capability: int, vocab: int, **flags: Any) -> Any:
    """The kernel as a launch with 16-byte aligned, contiguous tensors would compile it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config = launch_config(vocab, ELEMENT_SIZE[dtype])
    constants = {**flags, "SLOTS": config.slots, "WIDTH": config.width}
    if kernel is backward_kernel:
        constants["BLOCKS"] = config.blocks_per_program
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("logits", "grad_logits"):
            signature[name] = dtype
        elif name.endswith("stride"):
            signature[name] = "i64"
        else:
            signature[name] = NUMBERS.get(name) or POINTERS.get(name, "*fp32")
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind[0] == "*" or (vocab % 16 == 0 and (name.endswith("stride") or name == "vocab"))
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": config.num_warps})


def inspect(compiled: Any, folder: Path) -> tuple[int, int, str]:
    """Registers, bytes of stack, and the machine code."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    code = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack), code


@pytest.mark.parametrize(("capability", "dtype"), [(80, "*bf16"), (90, "*bf16"), (100, "*bf16"), (90, "*fp32")])
def test_training_kernels_are_lean(dtype: str, capability: int, tmp_path: Path) -> None:
    registers, stack, code = inspect(
        compile_kernel(forward_kernel, dtype, capability, 32000, **TRAINING, **FORWARD), tmp_path
    )
    assert stack == 0
    assert registers <= 64  # four programs of 256 threads a multiprocessor
    assert "LDG.E.128" in code
    assert len(re.findall(r"\bBAR\.SYNC", code)) <= 8  # the merge after the loop; none in it
    registers, stack, code = inspect(compile_kernel(backward_kernel, dtype, capability, 32000, **TRAINING), tmp_path)
    assert stack == 0
    assert registers <= 48
    assert "LDG.E.128" in code
    assert "STG.E.128" in code
    assert "BAR.SYNC" not in code


@pytest.mark.parametrize("capability", [80, 90])
def test_every_option_and_a_ragged_vocabulary_do_not_spill(capability: int, tmp_path: Path) -> None:
    for vocab, options in ((32000, EVERYTHING), (50257, TRAINING)):
        forward = compile_kernel(
            forward_kernel, "*bf16", capability, vocab, **options, SQUARED=True, TOP1=True, STATISTICS=True
        )
        backward = compile_kernel(backward_kernel, "*bf16", capability, vocab, **options)
        for compiled in (forward, backward):
            registers, stack, code = inspect(compiled, tmp_path)
            assert stack == 0
            assert registers <= 255
            assert vocab % 16 or "LDG.E.128" in code  # rows of a ragged vocabulary are not aligned


def test_the_triton_that_was_asked_for_is_the_one_that_compiles() -> None:
    """`make test-slow` runs this file once more with the oldest supported release."""
    assert triton.__version__ == os.environ.get("GK_EXPECTED_TRITON", triton.__version__)
    assert tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)


def test_launch_config_depends_on_the_row_alone() -> None:
    assert launch_config(32000, 2) == (512, 8, 8, 4)
    assert launch_config(32000, 4) == (512, 4, 8, 4)
    assert launch_config(1, 2) == (32, 8, 1, 4)
    for vocab in (1, 100, 1000, 5000, 200000):
        for size in (2, 4):
            config = launch_config(vocab, size)
            assert config.width * size == 16
            assert config.slots & (config.slots - 1) == 0
            assert config.slots * config.width <= 4096
