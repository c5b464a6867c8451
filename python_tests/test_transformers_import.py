"""grpo_kernels.integrations.transformers without transformers, and with another version of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

MISSING = """
import sys
sys.modules["transformers"] = None
"""
OLD = """
import sys, types
for name in ("transformers", "transformers.loss", "transformers.models", "transformers.integrations"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
sys.modules["transformers"].__version__ = "4.57.0"
"""
IMPORT = """
try:
    import grpo_kernels.integrations.transformers
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (MISSING, "ImportError grpo_kernels.integrations.transformers needs transformers 5.23: pip install"),
        pytest.param(
            OLD,
            "IncompatibleVersion grpo_kernels.integrations.transformers needs transformers 5.23, got 4.57.0",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_says_what_is_missing(installed: str, message: str) -> None:
    result = subprocess.run([sys.executable, "-c", installed + IMPORT], capture_output=True, text=True, check=True)
    assert message in result.stdout
