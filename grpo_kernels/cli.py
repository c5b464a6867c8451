"""The command `grpo-kernels`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata

import torch

import grpo_kernels
from grpo_kernels import _dispatch, _extension

Rows = list[tuple[str, ...]]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> Rows:
    return [
        ("grpo_kernels", grpo_kernels.__version__),
        ("Python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, HIP {torch.version.hip or 'none'})"),
        ("Triton", _version("triton")),
        ("platform", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads)"),
    ]


def _extension_rows() -> Rows:
    problem = _extension.cpu_problem()
    if problem:
        return [("extension", f"{problem}: every op runs through the reference backend or Triton")]
    module = _extension.extension()
    cuda = f"CUDA {module.cuda_version} for {module.cuda_archs}" if module.cuda_version else "not built"
    return [
        ("extension", str(module.__file__)),
        ("CPU kernels", f"{module.cpu_isa()}, OpenMP {'on' if module.openmp else 'off'}"),
        ("CUDA kernels", cuda),
    ]


def _devices() -> list[tuple[str, int, str]]:
    """Type, index and description of every device to report on: the CPU and each CUDA device."""
    devices = [("cpu", -1, platform.machine())]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        description = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        devices.append(("cuda", index, description))
    return devices


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
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(title)
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()


def env() -> int:
    """Prints versions, what was built, the devices, and the backend that each op takes on them."""
    _print_table("Versions", _versions())
    _print_table("Build", _extension_rows())
    for device_type, index, description in _devices():
        name = device_type if index < 0 else f"{device_type}:{index}"
        _print_table(f"Backends on {name} ({description})", _backend_rows(device_type, index))
    if torch.cuda.device_count() == 0:
        reason = "torch.cuda sees none" if torch.version.cuda else "this torch is a CPU build"
        print(f"No CUDA device: {reason}.")
    return 0


COMMANDS: dict[str, Callable[[], int]] = {"env": env}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="grpo-kernels", description="Tools of the grpo_kernels package.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        commands.add_parser(name, help=function.__doc__, description=function.__doc__)
    return COMMANDS[parser.parse_args(arguments).command]()


if __name__ == "__main__":
    sys.exit(main())
