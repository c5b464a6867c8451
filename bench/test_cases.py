"""Every provider of every case as a test of pytest-benchmark's; see pytest_rows.py."""

from __future__ import annotations

import pytest

from .case import Case
from .pytest_rows import Play, parameters


@pytest.mark.parametrize(("case", "provider"), parameters())
def test_case(case: Case, provider: str, play: Play) -> None:
    play(case, provider)
