"""An op is finished when it stands in every room of the house."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import grpo_kernels
from grpo_kernels import _dispatch

ROOT = Path(__file__).parents[2]
PACKAGES = sorted({package.rpartition(".")[2] for package in _dispatch.registered_ops().values()})


@pytest.mark.parametrize("package", PACKAGES)
def test_every_op_has_its_files(package: str) -> None:
    wanted = [
        *(f"grpo_kernels/{package}/{name}.py" for name in ("__init__", "api", "ops", "reference")),
        f"python_tests/samples/{package}.py",
        f"bench/bench_{package}.py",
        f"bench/gates/ops/{package}.py",
        f"bench/floors/ops/{package}.py",
        f"grpo_kernels/testing/verification/{package}.py",
        f"docs/{package}.md",
    ]
    assert [path for path in wanted if not (ROOT / path).is_file()] == []
    assert list((ROOT / "python_tests").glob(f"test_{package}*.py"))
    folder = ROOT / "grpo_kernels" / package
    native = folder / "_native.py"
    if native.is_file() and "_extension" in native.read_text():  # else it is made of other ops' kernels
        source = ROOT / "csrc" / package
        assert (source / f"{package}.h").is_file()
        assert (source / "formula.h").is_file()
        assert (source / "cpu.cpp").is_file()
        assert package in (ROOT / "CMakeLists.txt").read_text()
        assert (ROOT / "csrc" / "bindings" / f"{package}.cpp").is_file()
        if (source / "cuda.cu").is_file():
            assert (ROOT / "python_tests" / "emulator" / f"test_{package}.py").is_file()
    if (folder / "_triton.py").is_file():
        assert list((ROOT / "python_tests" / "interpreter").glob(f"test_{package}*.py"))
    assert f"`{package}`" in (ROOT / "CHANGELOG.md").read_text()
    assert f"](docs/{package}.md)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(set(grpo_kernels.__all__) - {"__version__"}))
def test_every_public_name_is_documented(name: str) -> None:
    item = getattr(grpo_kernels, name)
    assert inspect.getdoc(item)
    assert name in "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    assert re.search(rf"\b{name}\b", (ROOT / "CHANGELOG.md").read_text())


@pytest.mark.parametrize("op", sorted(_dispatch.public_ops()))
def test_docstrings_have_every_part(op: str) -> None:
    text = inspect.getdoc(getattr(grpo_kernels, op)) or ""
    for part in ("Args:", "Returns:", "Raises:", "Numerics:", "Source:"):
        assert part in text, part


def test_files_stay_short() -> None:
    folders = ("grpo_kernels", "examples", "python_tests", "bench", "docs/hooks")
    sources = [*(ROOT / "csrc").rglob("*.*"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    assert [str(path) for path in sources if len(path.read_text().splitlines()) > 400] == []


def test_functions_stay_short() -> None:
    """Lines below the signature and the docstring; a Triton kernel is one function, however long."""
    long = []
    for path in (path for folder in ("grpo_kernels", "examples", "bench") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.endswith("_kernel"):
                body = node.body[ast.get_docstring(node) is not None :]
                if body and node.end_lineno - body[0].lineno >= 60:
                    long.append(f"{path}: {node.name}")
    assert long == []


def test_the_dependency_direction_is_kept() -> None:
    """ops.py and reference.py import no backend; only _native.py touches addresses."""
    for package in PACKAGES:
        module = importlib.import_module(f"grpo_kernels.{package}.reference")
        assert "_native" not in inspect.getsource(module)
        assert "import triton" not in inspect.getsource(importlib.import_module(f"grpo_kernels.{package}.ops"))
    for path in (ROOT / "grpo_kernels").rglob("*.py"):
        if "data_ptr()" in path.read_text():
            assert path.name in ("_native.py", "_extension.py"), path
