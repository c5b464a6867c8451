"""The emulated kernels are built once a session; where that cannot be, their tests are skipped with the reason."""

from __future__ import annotations

import pytest

from python_tests.emulator import build


@pytest.fixture(scope="session", autouse=True)
def emulator() -> None:
    problem = build.problem()
    if problem:
        pytest.skip(problem)
    build.built()
