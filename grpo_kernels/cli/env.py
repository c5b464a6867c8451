"""Prints versions, what was built, the devices, and the backend that each op takes on them, and why not another."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata

import torch

import grpo_kernels
from grpo_kernels import _build_info, _dispatch, _extension
from grpo_kernels.cli.table import Table

Rows = list[tuple[str, ...]]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> Rows:
    """Names and versions of what decides how fast and how exact the kernels are."""
    return [
        ("grpo_kernels", grpo_kernels.__version__),
        ("Python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, HIP {torch.version.hip or 'none'})"),
        ("Triton", _version("triton")),
        ("platform", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads)"),
    ]


def build_rows() -> Rows:
    """Of which commit the package is, and what its extension was built with and for."""
    info = _build_info.current()
    sources = ("commit", f"{info.commit} ({info.date})")
    problem = _extension.cpu_problem()
    if problem:
        return [sources, ("extension", f"{problem}: every op runs through the reference backend or Triton")]
    module = _extension.extension()
    cuda = f"CUDA {module.cuda_version} for {module.cuda_archs}" if module.cuda_version else "not built"
    return [
        sources,
        ("extension", str(module.__file__)),
        ("compiler", module.compiler),
        ("CPU kernels", f"{module.cpu_isa()}, OpenMP {'on' if module.openmp else 'off'}"),
        ("CUDA kernels", cuda),
    ]


def devices() -> list[tuple[str, int, str]]:
    """Type, index and description of every device to report on: the CPU and each CUDA device."""
    found = [("cpu", -1, platform.machine())]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        description = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        found.append(("cuda", index, description))
    return found


def _backend_rows(device_type: str, index: int) -> Rows:
    """Which backend every op takes on a device, and why not the ones before it."""
    rows: Rows = []
    for op in _dispatch.public_ops():
        reasons: list[str] = []
        for name in _dispatch.candidates(op, device_type):
            reason = _dispatch.problem(op, name, device_type, index, torch.float32)
            if not reason:
                rows.append((op, name, "; ".join(reasons)))
                break
            reasons.append(f"no {name}: {reason}")
    return rows


def _print_table(title: str, rows: Rows) -> None:
    print("\n".join(Table(title, [""] * len(rows[0]), rows).text()), end="\n\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(arguments: argparse.Namespace) -> int:
    """Prints everything; the exit status is 0."""
    _print_table("Versions", versions())
    _print_table("Build", build_rows())
    for device_type, index, description in devices():
        name = device_type if index < 0 else f"{device_type}:{index}"
        _print_table(f"Backends on {name} ({description})", _backend_rows(device_type, index))
    if torch.cuda.device_count() == 0:
        reason = "torch.cuda sees none" if torch.version.cuda else "this torch is a CPU build"
        print(f"No CUDA device: {reason}.")
    return 0
