"""What the numbers belong to: the machine in general words, its measured limits, and how its memory is set up."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

import torch

# Fresh pages of large tensors can cost more than the work on them, and far more on one machine than on another. glibc
# keeps and reuses them under these settings; they hold for every provider alike.
RECYCLING = "glibc.malloc.mmap_threshold=8000000000:glibc.malloc.trim_threshold=16000000000"
# Every large block comes from the operating system and goes back to it: what a measurement of memory wants to see.
RETURNING = "glibc.malloc.mmap_threshold=65536:glibc.malloc.trim_threshold=65536"

_PEERS = (
    "triton", "trl", "liger-kernel", "transformers", "cut-cross-entropy", "flash-linear-attention", "torchao",
    "deep-gemm", "scattermoe", "grouped-gemm", "transformer-engine", "flashinfer-python",
)  # fmt: skip

_MAXIMUM_CACHE = 512 * 2**20


def environment(tunables: str) -> dict[str, str]:
    """The environment for a process with these allocator settings, and without OpenMP threads that spin."""
    return {**os.environ, "GLIBC_TUNABLES": tunables, "OMP_WAIT_POLICY": "passive"}


def pages_are_recycled() -> bool:
    """Whether this process runs under `RECYCLING`."""
    return os.environ.get("GLIBC_TUNABLES") == RECYCLING


def recycle_pages(device: str, line: list[str]) -> None:
    """Restarts a process that measures a CPU under other settings: the allocator reads them when it starts.

    Args:
        line: the command line that does what this process shall do, its program first.
    """
    if device == "cpu" and sys.platform == "linux" and not pages_are_recycled():
        sys.stdout.flush()
        os.execve(line[0], line, environment(RECYCLING))


def default_device() -> str:
    """The CUDA device if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _cpu_flags() -> set[str]:
    match = re.search(r"^flags\s*:(.*)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return set(match.group(1).split()) if match else set()


def _instruction_set() -> str:
    flags = _cpu_flags()
    for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")):
        if flag in flags:
            return name
    return ""


def multiplies_slowly(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions for products of bf16: PyTorch's are then some 50 times as slow."""
    return dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")


def packages() -> dict[str, str]:
    """Versions of the packages whose functions compete, as far as they are installed."""
    found = {}
    for name in _PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def describe(device: str) -> dict[str, object]:
    """Hardware in general words, and the versions that matter."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = [platform.machine().replace("_", "-"), f"{cores} cores", _instruction_set()]
    description: dict[str, object] = {
        "device": " ".join(word for word in words if word),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "packages": packages(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        description["host"] = description["device"]
        description["device"] = properties.name
        description["capability"] = f"{properties.major}.{properties.minor}"
        description["multiprocessors"] = properties.multi_processor_count
        description["cuda"] = torch.version.cuda
        try:
            import triton

            description["triton"] = triton.__version__
        except ImportError:
            description["triton"] = None
    else:
        description["pages"] = "recycled" if pages_are_recycled() else "fresh from the operating system"
    return description


def slug(device: str) -> str:
    """Name of the machine's file of results, such as "cpu-2core-avx512" or "nvidia-h100-80gb-hbm3"."""
    if device == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    words = ["cpu", f"{describe(device)['threads']}core", _instruction_set().lower().replace("-", "")]
    return "-".join(word for word in words if word)


def cache_bytes(device: str) -> int:
    """Size of the last-level cache as the machine reports it, at most 512 MiB."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return int(properties.L2_cache_size)
    sizes = [2**25]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if match:
            sizes.append(int(match.group(1)) * {"K": 2**10, "M": 2**20}[match.group(2)])
    return min(max(sizes), _MAXIMUM_CACHE)


def free_bytes(device: str) -> int:
    """Memory that new tensors can take: on a GPU what the driver has free and what PyTorch keeps without using it."""
    if device == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0] + unused)
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE)
    return int(match.group(1)) * 2**10 if match else 2**32
