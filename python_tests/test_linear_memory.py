"""Peak memory of the linear ops, measured: the growth of the resident set of a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.machine import RETURNING, environment
from grpo_kernels import _extension
from python_tests.linear_peaks import ROWS, VOCAB, WIDTH

ROOT = Path(__file__).parents[1]
LOGITS, WEIGHT = 4 * ROWS * VOCAB, 4 * WIDTH * VOCAB  # bytes in float32

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/clear_refs: only Linux has it"),
    pytest.mark.skipif(bool(_extension.cpu_problem()), reason=f"native CPU kernels: {_extension.cpu_problem()}"),
]


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """Bytes above inputs and results, by name."""
    command = [sys.executable, "-m", "python_tests.linear_peaks"]
    done = subprocess.run(command, env=environment(RETURNING), cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_the_measurement_sees_the_logits_of_eager(peaks: dict[str, int]) -> None:
    """Logits, their log-softmax and the gradient of one of them exist at a time."""
    assert 2 * LOGITS < peaks["eager log-probs"] < 4 * LOGITS
    assert 2 * LOGITS < peaks["eager loss"] < 4 * LOGITS


@pytest.mark.parametrize("name", ["log-probs", "log-probs, bf16", "log-probs, frozen weight", "log-probs, accumulator"])
def test_log_probs_take_a_fifth_of_eager(name: str, peaks: dict[str, int]) -> None:
    assert peaks[name] <= peaks["eager log-probs"] / 5


@pytest.mark.parametrize("name", ["loss", "cross-entropy"])
def test_losses_take_an_eighth_of_eager(name: str, peaks: dict[str, int]) -> None:
    assert peaks[name] <= peaks["eager loss"] / 8


def test_the_forward_never_holds_the_logits(peaks: dict[str, int]) -> None:
    """Twice the rows take no more than the rows themselves."""
    once, twice = peaks["log-probs, forward"], peaks["log-probs, forward, twice the rows"]
    assert once < LOGITS / 4
    assert twice - once < LOGITS / 32


def test_an_accumulator_is_instead_of_a_gradient(peaks: dict[str, int]) -> None:
    """The gradient of the weight is among the results of the other, and neither here nor there a second time."""
    assert peaks["log-probs, accumulator"] < peaks["log-probs"] + WEIGHT / 2
