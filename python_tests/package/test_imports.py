"""What importing costs and needs, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCK = "import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
USE = """
import torch, grpo_kernels
out = grpo_kernels.group_advantages(torch.tensor([0.0, 1.0]), group_size=2)
print(out.advantages.tolist() == (-out.advantages.flip(0)).tolist() and out.advantages[1].item() > 0.7)
"""


def run(code: str, **environment: str) -> str:
    import os

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_loads_neither_triton_nor_the_extension() -> None:
    code = "import sys, torch; before = set(sys.modules); import grpo_kernels; print(sorted(set(sys.modules) - before))"
    loaded = run(code)
    assert "grpo_kernels._C" not in loaded
    assert "triton" not in loaded


@pytest.mark.parametrize("blocked", [("triton",), ("grpo_kernels._C",), ("triton", "grpo_kernels._C")])
def test_works_without_optional_parts(blocked: tuple[str, ...]) -> None:
    assert run(BLOCK.format(blocked=blocked) + USE) == "True"


def test_without_the_extension_env_says_so_and_native_raises() -> None:
    code = BLOCK.format(blocked=("grpo_kernels._C",)) + (
        "from grpo_kernels.cli import main; main(['env'])\n"
        "import torch, grpo_kernels\n"
        "try:\n    with grpo_kernels.backend('native'): grpo_kernels.group_advantages(torch.ones(2), group_size=2)\n"
        "except grpo_kernels.BackendUnavailable as error: print('RAISED', error)\n"
    )
    output = run(code)
    assert "the extension is not built" in output
    assert "every op runs through the reference backend" in output
    assert "RAISED group_advantages: backend 'native' cannot be used on cpu: the extension is not built" in output


def test_env_names_a_backend_for_every_op() -> None:
    output = run("from grpo_kernels.cli import main; main(['env'])")
    from grpo_kernels import _dispatch

    for op in _dispatch.public_ops():
        assert any(line.split()[:1] == [op] and len(line.split()) >= 2 for line in output.splitlines())
