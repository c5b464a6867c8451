"""Bridge from setuptools to CMake: builds the one extension module, ``grpo_kernels._C``.

It never imports torch and never looks for a GPU, so a wheel can be built anywhere. Environment:

GRPO_KERNELS_CUDA=auto|1|0
    CUDA kernels: build them when nvcc is found (auto, the default), require nvcc (1), or leave them out (0).
GRPO_KERNELS_NATIVE=auto|1|0
    The extension itself: build it when a C++ compiler is found (auto), require one (1), or make a pure Python package
    that runs through the reference backend (0).
GRPO_KERNELS_ARCHS
    The CUDA architectures; cmake/cuda.cmake has the notation, the default, and the variables that count without it:
    CMAKE_CUDA_ARCHITECTURES, CUDAARCHS, TORCH_CUDA_ARCH_LIST.
GRPO_KERNELS_LOCAL_VERSION
    A label for wheels that differ from the published one: cu128 makes 0.1.0+cu128.
GRPO_KERNELS_BUILD_DIR
    CMake's build tree. Builds for several interpreters, one after another, may share one: they then compile the kernels
    once, and only what knows Python each time.
MAX_JOBS
    Number of parallel compiler processes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
VERSION_FILE = ROOT / "grpo_kernels" / "_version.py"


def switch(name: str) -> str:
    value = os.environ.get(name, "auto").lower()
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 1 or 0, got {value!r}")
    return value


def version() -> str:
    """The version of the sources, with the label that the environment asks for."""
    label = os.environ.get("GRPO_KERNELS_LOCAL_VERSION", "")
    if label and not re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", label):
        raise SystemExit(
            f"GRPO_KERNELS_LOCAL_VERSION must be letters and digits such as cu128 or cu128.test, got {label!r}"
        )
    plain: str = runpy.run_path(str(VERSION_FILE))["__version__"]
    return f"{plain}+{label}" if label else plain


def build_info() -> ModuleType:
    """grpo_kernels/_build_info.py, without the package around it."""
    spec = importlib.util.spec_from_file_location("_build_info", ROOT / "grpo_kernels" / "_build_info.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiler_found() -> bool:
    """Whether CMake will find a C++ compiler, by its own order: $CXX first, then the usual names."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return any(shutil.which(name) for name in names)


def wants_extension() -> bool:
    native, cuda = switch("GRPO_KERNELS_NATIVE"), switch("GRPO_KERNELS_CUDA")
    if native == "0":
        if cuda == "1":
            raise SystemExit("GRPO_KERNELS_CUDA=1 needs the extension, but GRPO_KERNELS_NATIVE=0 leaves it out")
        return False
    if compiler_found():
        return True
    if native == "1" or cuda == "1":
        raise SystemExit(
            "no C++ compiler was found (tried $CXX, c++, g++, clang++), and the environment asks for native kernels"
        )
    print(
        "grpo_kernels: no C++ compiler was found; building a pure Python package (reference backend only)",
        file=sys.stderr,
    )
    return False


def tool(name: str) -> str:
    """The CMake or ninja that the build environment's packages bring, else the one on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        raise SystemExit(f"{name} was not found; install it or build with isolation (pip install .)")
    return found


class BuildPackages(build_py):
    """Ships bench/ as grpo_kernels._bench, for `grpo-kernels bench`, the version with its label, and the commit;
    editable installations use the sources themselves."""

    BENCH = "grpo_kernels._bench"
    NOT_SHIPPED = ("conftest", "docs", "gates", "gpu_check", "pytest_rows", "row_file", "targets", "test_")

    def finalize_options(self) -> None:
        super().finalize_options()
        if not self.editable_mode:
            self.packages = [*(self.packages or []), self.BENCH]
            self.package_dir = {**(self.package_dir or {}), self.BENCH: "bench"}

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        return [found for found in modules if package != self.BENCH or not found[1].startswith(self.NOT_SHIPPED)]

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        built, module = Path(self.build_lib) / "grpo_kernels", build_info()
        module.of_sources(ROOT).write(built / module.RECORD)
        text = re.sub('^__version__ = ".*"$', f'__version__ = "{version()}"', VERSION_FILE.read_text(), flags=re.M)
        (built / VERSION_FILE.name).write_text(text)


class SourceArchive(sdist):
    """Carries the commit, which git cannot tell where there is no clone."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        if os.environ.get("GRPO_KERNELS_LOCAL_VERSION"):
            raise SystemExit("GRPO_KERNELS_LOCAL_VERSION is for wheels: one sdist serves all of them (build --wheel)")
        module = build_info()
        info = module.of_sources(ROOT)  # before the tree, which is made among the sources and would count as a change
        super().make_release_tree(base_dir, files)
        info.write(Path(base_dir) / "grpo_kernels" / module.RECORD)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Beside the sources, not in setuptools' temporary folder: an editable installation then rebuilds what changed.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        if os.environ.get("GRPO_KERNELS_BUILD_DIR"):
            build = Path(os.environ["GRPO_KERNELS_BUILD_DIR"]).resolve()
            (build / "CMakeCache.txt").unlink(missing_ok=True)  # of another interpreter; the objects stay
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DGRPO_KERNELS_OUTPUT_DIR={target.parent}",
            f"-DGRPO_KERNELS_CUDA={switch('GRPO_KERNELS_CUDA')}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([tool("cmake"), "--build", str(build), *(["-j", jobs] if jobs else [])], check=True)


setup(
    version=version(),
    ext_modules=[Extension("grpo_kernels._C", sources=[])] if wants_extension() else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPackages, "sdist": SourceArchive},
)
