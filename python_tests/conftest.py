"""Shared by all tests: reproducible seeds, and skips that name what is missing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from hypothesis import HealthCheck, settings

import grpo_kernels
from grpo_kernels import _extension

# Everywhere: one core tests the parallel code too, and on many the test processes leave each other room.
torch.set_num_threads(2)

settings.register_profile(
    "ci", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """A seed from the test's name: the same in any order and any selection."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(request.node.nodeid.encode()).digest()[:4], "little"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    not_interpreting = pytest.mark.skip(
        reason="needs TRITON_INTERPRET=1 before the first import (make test runs it so)"
    )
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("interpreter") and os.environ.get("TRITON_INTERPRET") != "1":
            item.add_marker(not_interpreting)


@pytest.fixture
def native_cpu() -> None:
    """Skips the test where the extension is not built."""
    problem = _extension.cpu_problem()
    if problem:
        pytest.skip(f"native CPU kernels: {problem}")


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each of the backends of a CPU."""
    if request.param == "native":
        request.getfixturevalue("native_cpu")
    with grpo_kernels.backend(request.param):
        yield request.param
