"""What routed experts keep for their backward, measured: the growth of the resident set of a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.machine import RETURNING, environment
from grpo_kernels import _extension
from python_tests.moe_peaks import MODEL, TOKENS

ROOT = Path(__file__).parents[1]
BYTES = {"float32": 4, "bfloat16": 2}
SLACK = 2**18  # bytes: pages, and what the allocator keeps of small blocks

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/clear_refs: only Linux has it"),
    pytest.mark.skipif(bool(_extension.cpu_problem()), reason=f"native CPU kernels: {_extension.cpu_problem()}"),
]


def maps(tokens: int, top_k: int) -> int:
    """Two maps of int32: 64 bytes a token with eight slots."""
    return 8 * tokens * top_k


def kept(save: str, tokens: int, top_k: int, width: int, size: int) -> int:
    """Bytes above the inputs: the maps, and the pre-activations."""
    return maps(tokens, top_k) + (2 * tokens * top_k * width * size if save == "preact" else 0)


def naive(tokens: int, top_k: int, hidden: int, width: int, size: int) -> int:
    """Rows of the experts, pre-activations, activations and what the experts return."""
    return tokens * top_k * (2 * hidden + 3 * width) * size


@pytest.fixture(scope="module")
def bytes_of() -> dict[str, int]:
    """Bytes above inputs and results, by name."""
    command = [sys.executable, "-m", "python_tests.moe_peaks"]
    done = subprocess.run(command, env=environment(RETURNING), cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("save", ["preact", "input"])
def test_a_layer_keeps_what_the_table_says(save: str, dtype: str, bytes_of: dict[str, int]) -> None:
    expected = kept(save, TOKENS, MODEL.top_k, MODEL.width, BYTES[dtype])
    assert abs(bytes_of[f"{save} {dtype}, held"] - expected) <= SLACK


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("save", ["preact", "input"])
def test_in_fp8_it_keeps_a_byte_for_each_number_and_scales(save: str, dtype: str, bytes_of: dict[str, int]) -> None:
    """Whatever the dtype of the inputs; the tokens, too. The copies of the weights are there from the run before."""
    widths = (TOKENS, MODEL.hidden), (TOKENS * MODEL.top_k, 2 * MODEL.width if save == "preact" else 0)
    tiles = sum(rows * (width + 4 * -(-width // 128)) for rows, width in widths)
    assert abs(bytes_of[f"{save} fp8 {dtype}, held"] - maps(TOKENS, MODEL.top_k) - tiles) <= SLACK


@pytest.mark.parametrize("dtype", BYTES)
def test_eager_keeps_every_intermediate(dtype: str, bytes_of: dict[str, int]) -> None:
    expected = naive(TOKENS, MODEL.top_k, MODEL.hidden, MODEL.width, BYTES[dtype])
    assert expected - SLACK <= bytes_of[f"eager {dtype}, held"] <= 1.3 * expected


@pytest.mark.parametrize("dtype", BYTES)
def test_forward_and_backward_peak_below_eager(dtype: str, bytes_of: dict[str, int]) -> None:
    """To compute pre-activations again takes no more memory than to keep them, and that three quarters of eager's."""
    peaks = {name: bytes_of[f"{name} {dtype}, peak"] for name in ("preact", "input", "eager")}
    assert peaks["input"] <= peaks["preact"] + SLACK
    assert peaks["preact"] <= peaks["eager"] * 3 / 4


@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "gigabytes"),
    [
        (8192, 7168, 2048, (0.12, 0.65, 2.80)),
        (32768, 7168, 2048, (0.47, 2.62, 11.2)),
        (32768, 2048, 768, (0.13, 0.94, 3.49)),
    ],
    ids=["DeepSeek-V3, 8192 tokens", "DeepSeek-V3", "Qwen3-30B"],
)
def test_at_full_size(tokens: int, hidden: int, width: int, gigabytes: tuple[float, float, float]) -> None:
    """The published sizes of a layer in bf16, which hold the tokens and not the maps, follow from the same formulas."""
    states = 2 * tokens * hidden
    sizes = [kept(save, tokens, 8, width, 2) - maps(tokens, 8) for save in ("input", "preact")]
    for size, expected in zip((*sizes, naive(tokens, 8, hidden, width, 2)), gigabytes, strict=True):
        assert (states + size) / 1e9 == pytest.approx(expected, rel=0.005, abs=0.005)
