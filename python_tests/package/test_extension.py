"""The compiled module: what it exports, what it shares with torch, and that no instruction set leaks into another."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_kernels
from grpo_kernels import _extension
from python_tests.package.test_imports import USE, run

ROOT = Path(__file__).parents[2]
STUB = Path(grpo_kernels.__file__).with_name("_C.pyi")

pytestmark = pytest.mark.usefixtures("native_cpu")


def test_stub_names_everything_in_the_module() -> None:
    module = _extension.extension()
    public = {name for name in vars(module) if not name.startswith("_")}
    declared: dict[str, ast.AST] = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            declared[node.name] = node
        elif isinstance(node, ast.AnnAssign):
            declared[node.target.id] = node
    assert set(declared) == public
    for name, node in declared.items():
        if isinstance(node, ast.FunctionDef):
            signature = getattr(module, name).__doc__.splitlines()[0]
            assert len(re.findall(r"\barg\d+:", signature)) == len(node.args.posonlyargs) + len(node.args.args), name


def test_torch_and_the_extension_share_one_openmp() -> None:
    loaded = run(
        USE + "print({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'iomp' in l or 'libomp' in l})"
    )
    libraries = ast.literal_eval(loaded.splitlines()[-1])
    assert len(libraries) == 1
    assert "torch" in libraries.pop()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_can_be_chosen(isa: str) -> None:
    order = ["baseline", "avx2", "avx512"]
    best = run("from grpo_kernels import _extension; print(_extension.extension().cpu_isa())")
    chosen = run("from grpo_kernels import _extension; print(_extension.extension().cpu_isa())", GRPO_KERNELS_ISA=isa)
    assert chosen == order[min(order.index(isa), order.index(best))]
    assert run(USE, GRPO_KERNELS_ISA=isa) == "True"


def test_no_weak_symbol_outside_the_namespace_of_its_instruction_set() -> None:
    """The linker keeps one copy of a weak symbol: an AVX-512 copy under the baseline kernels would crash older CPUs."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeFiles"
    objects = [path for isa in ("baseline", "avx2", "avx512") for path in build.glob(f"cpu_{isa}.dir/**/*.o")]
    if not objects:
        pytest.skip("no build tree beside the sources")
    leaks = []
    for path in objects:
        isa = re.search(r"cpu_(\w+)\.dir", str(path)).group(1)
        for line in subprocess.run(
            ["nm", "-C", str(path)], capture_output=True, text=True, check=True
        ).stdout.splitlines():
            symbol = re.match(r"[0-9a-f]* +([WVuwv]) (.*)", line)
            if symbol and symbol.group(1) in "WVu" and f"grpo_kernels::isa_{isa}::" not in symbol.group(2):
                leaks.append(f"{path.parent.name}: {symbol.group(2)}")
    assert leaks == []


def test_the_module_hides_its_symbols() -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", _extension.extension().__file__], capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[-1] for line in listing.splitlines()] == ["PyInit__C"]


def test_the_module_needs_neither_torch_nor_cuda_libraries() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    listing = subprocess.run(
        ["readelf", "-d", _extension.extension().__file__], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", listing)
    assert not [name for name in needed if re.search("torch|cuda|cudart|python", name)]
    assert "RPATH" not in listing
    assert "RUNPATH" not in listing
