"""Wheels and sdists: built as users build them, installed into fresh environments, and used there."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

import grpo_kernels
from grpo_kernels import _dispatch
from python_tests.package.test_imports import USE

ROOT = Path(__file__).parents[2]
PLAIN_PATH = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
NVCC = shutil.which("nvcc")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree"),
]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
needs_path_without_nvcc = pytest.mark.skipif(
    shutil.which("nvcc", path=PLAIN_PATH) is not None or shutil.which("c++", path=PLAIN_PATH) is None,
    reason="no PATH here has a C++ compiler and no nvcc",
)


def command(*arguments: object, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("GRPO_KERNELS_", "CUDAARCHS", "TORCH_CUDA"))}
    result = subprocess.run(
        [str(a) for a in arguments],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The builds here are of the same sources: what the compiler would make again of the same text, it makes once."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    launcher = [sys.executable, Path(__file__).with_name("compile_once.py"), folder / "objects"]
    with mock.patch.dict(os.environ, CMAKE_CXX_COMPILER_LAUNCHER=";".join(map(str, launcher))):
        yield


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what is under version control: what a user's clone holds."""
    files = command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / "src" / name)
    return tmp_path / "src"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A fresh environment that sees this one's torch and build tools, but not this one's grpo_kernels."""
    venv.create(tmp_path / "venv", with_pip=True)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    for bundled in site.glob("setuptools*"):  # what comes with the environment is older than what the build needs
        shutil.rmtree(bundled)
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return tmp_path / "venv" / "bin" / "python"


def build_wheel(sources: Path, **environment: str) -> Path:
    command(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", "dist", ".",
        cwd=sources, **environment,
    )  # fmt: skip
    (wheel,) = (sources / "dist").glob("*.whl")
    return wheel


def install_and_use(python: Path, package: Path, cwd: Path, *selection: str) -> str:
    """Installs the package, runs an op and the commands, and returns what `grpo-kernels env` prints.

    `selection`: options of `grpo-kernels verify` that leave ops out.
    """
    command(python, "-m", "pip", "install", "-q", "--no-deps", package, cwd=cwd)
    assert command(python, "-c", USE, cwd=cwd).stdout.strip() == "True"
    where = command(python, "-c", "import grpo_kernels; print(grpo_kernels.__file__)", cwd=cwd).stdout
    assert str(python.parents[1]) in where
    program = python.with_name("grpo-kernels")
    verified = command(program, "verify", "--dtype", "float32", *selection, cwd=cwd).stdout
    count = selection.count("--op") or len(_dispatch.public_ops())
    assert re.match(rf"verified: {count} ops?\b", verified.splitlines()[-1])
    assert "grpo_loss" in command(program, "bench", "--list", cwd=cwd).stdout
    return command(program, "env", cwd=cwd).stdout


@needs_nvcc
def test_wheel_with_cuda(sources: Path, python: Path, tmp_path: Path) -> None:
    wheel = build_wheel(sources, GRPO_KERNELS_CUDA="1", CUDAARCHS="90-real")
    assert re.search(r"-cp\d+-cp\d+-linux", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.startswith("grpo_kernels/_C.") and name.endswith(".so")]
    assert {"grpo_kernels/py.typed", "grpo_kernels/_C.pyi"} <= set(names)
    assert not [name for name in names if name.startswith(("python_tests", "bench", "examples", "csrc"))]
    report = install_and_use(python, wheel, tmp_path, "--op", "grpo_loss")  # on a CPU: the kernels of every other wheel
    assert re.search(r"CUDA kernels +CUDA \d+\.\d+\.\d+ for 90-real", report)
    assert re.search(r"compiler +(GCC|Clang) \d+", report)


@needs_path_without_nvcc
def test_cuda_that_is_demanded_but_missing_fails_loudly(sources: Path) -> None:
    result = command(
        sys.executable, "setup.py", "build_ext", cwd=sources, check=False, PATH=PLAIN_PATH, GRPO_KERNELS_CUDA="1"
    )
    assert result.returncode != 0
    assert "GRPO_KERNELS_CUDA=1, but no CUDA compiler was found" in result.stdout + result.stderr


def test_pure_wheel_without_a_compiler(sources: Path, python: Path, tmp_path: Path) -> None:
    label = {"GRPO_KERNELS_LOCAL_VERSION": "cu128.test"}
    wheel = build_wheel(sources, GRPO_KERNELS_CUDA="0", CXX="/nonexistent/c++", **label)
    assert wheel.name == f"grpo_kernels-{grpo_kernels.__version__}+cu128.test-py3-none-any.whl"
    report = install_and_use(python, wheel, tmp_path)
    assert re.search(rf"grpo_kernels +{re.escape(grpo_kernels.__version__)}\+cu128\.test\n", report)
    code = "import importlib.metadata as m, grpo_kernels as g; print(m.version('grpo-kernels') == g.__version__)"
    assert command(python, "-c", code, cwd=tmp_path).stdout.strip() == "True"
    assert "every op runs through the reference backend" in report
    assert re.search(r"group_advantages +reference +no native: the extension is not built", report)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GRPO_KERNELS_CUDA": "yes"}, "GRPO_KERNELS_CUDA must be auto, 1 or 0, got 'yes'"),
        ({"GRPO_KERNELS_NATIVE": "1", "CXX": "/nonexistent/c++"}, "no C++ compiler was found"),
        ({"GRPO_KERNELS_NATIVE": "0", "GRPO_KERNELS_CUDA": "1"}, "GRPO_KERNELS_CUDA=1 needs the extension"),
    ],
)
def test_bad_switches_say_what_is_wrong(sources: Path, environment: dict[str, str], message: str) -> None:
    result = command(sys.executable, "setup.py", "--version", cwd=sources, check=False, **environment)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr


@needs_path_without_nvcc
def test_sdist_and_its_wheel_build_in_isolation(sources: Path, python: Path, tmp_path: Path) -> None:
    """`python -m build` makes the wheel from the sdist, in an environment that has neither torch nor these sources.
    Without nvcc it has CPU kernels. The commit of the sources is known at the end."""
    author = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    for line in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "sources"]):
        command("git", *line, cwd=sources)
    commit = command("git", "rev-parse", "HEAD", cwd=sources).stdout.strip()
    command(sys.executable, "-m", "build", "--outdir", "dist", ".", cwd=sources, PATH=PLAIN_PATH)
    (sdist,) = (sources / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CMakeLists.txt", "cmake/cuda.cmake", "csrc/bindings/module.cpp", "setup.py", "LICENSE"} <= names
    assert {f"csrc/{path.relative_to(sources / 'csrc')}" for path in (sources / "csrc").rglob("*.*")} <= names
    (wheel,) = (sources / "dist").glob("*.whl")
    report = install_and_use(python, wheel, tmp_path)
    assert re.search(r"CUDA kernels +not built", report)
    assert re.search(rf"commit +{commit} \(\d{{4}}-\d\d-\d\d\)", report)
    assert re.search(r"group_advantages +native", report)


@needs_path_without_nvcc
def test_editable_installation(sources: Path, python: Path, tmp_path: Path) -> None:
    """In isolation: without it, `make` does the same before any test."""
    command(python, "-m", "pip", "install", "-q", "--no-deps", "-e", sources, cwd=tmp_path, PATH=PLAIN_PATH)
    code = "import grpo_kernels, grpo_kernels._C as c; print(grpo_kernels.__file__, c.__file__)"
    package, module = command(python, "-c", code, cwd=tmp_path).stdout.split()
    assert package == str(sources / "grpo_kernels" / "__init__.py")
    assert module.startswith(str(sources / "grpo_kernels" / "_C."))
    assert command(python, "-c", USE, cwd=tmp_path).stdout.strip() == "True"


RELEASE_ARCHS = "80-real;86-real;89-real;90-real;100-real;120"
Configure = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Configure:
    """Configures the sources in one tree, where compilers are looked at once; takes the environment's variables."""
    import pybind11

    build = tmp_path_factory.mktemp("configure")
    cmake = shutil.which("cmake", path=PLAIN_PATH) or "cmake"
    definitions = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    return functools.partial(command, cmake, "-S", ROOT, "-B", build, *definitions, cwd=build)


@needs_nvcc
@pytest.mark.parametrize(
    ("environment", "archs"),
    [
        ({}, RELEASE_ARCHS),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 9.0a+PTX"}, "80-real;90a-real;90a-virtual"),
        ({"TORCH_CUDA_ARCH_LIST": "8.6;12.0"}, "86-real;120-real"),
        ({"CUDAARCHS": "90-real", "TORCH_CUDA_ARCH_LIST": "8.0"}, "90-real"),
        ({"GRPO_KERNELS_ARCHS": "8.0; 9.0a+PTX ", "CUDAARCHS": "90-real"}, "80-real;90a-real;90a-virtual"),
        ({"GRPO_KERNELS_ARCHS": "release", "CUDAARCHS": "90-real"}, RELEASE_ARCHS),
        ({"GRPO_KERNELS_ARCHS": "", "CUDAARCHS": "90-real"}, "90-real"),
    ],
)
def test_cuda_architectures(configure: Configure, environment: dict[str, str], archs: str) -> None:
    configured = configure(**environment)
    found = re.search(r"grpo_kernels: CUDA (\S+) for (\S+)", configured.stdout)
    assert found
    if tuple(map(int, found.group(1).split(".")[:2])) >= (12, 8):
        assert found.group(2) == archs


@needs_nvcc
@pytest.mark.parametrize(
    ("archs", "message"),
    [
        ("90", "GRPO_KERNELS_ARCHS: cannot read '90'; expected .* such as '8.0 9.0\\+PTX', release or native"),
        ("8.0 everything", "GRPO_KERNELS_ARCHS: cannot read 'everything'"),
        ("3.5", r"nvcc \S+ has no architecture 35; it has \d+"),
    ],
)
def test_architectures_that_make_no_sense_are_named(configure: Configure, archs: str, message: str) -> None:
    configured = configure(check=False, GRPO_KERNELS_ARCHS=archs)
    assert configured.returncode != 0
    assert re.search(message, " ".join(configured.stderr.split()))


AARCH64 = shutil.which("aarch64-linux-gnu-g++")


@pytest.mark.skipif(AARCH64 is None, reason="aarch64-linux-gnu-g++ is not installed")
def test_cpu_sources_compile_for_aarch64(tmp_path: Path) -> None:
    flags = ["-std=c++17", "-O2", "-fPIC", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Icsrc"]
    for source in ROOT.glob("csrc/*/cpu*.cpp"):
        command(AARCH64, *flags, "-DGK_ISA=isa_baseline", "-c", source, "-o", tmp_path / "object.o", cwd=ROOT)
