"""The machine's measured limits: how fast it copies memory and multiplies matrices. Percentages refer to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from .machine import cache_bytes

_GPU_COPY = 2**30  # bytes
_GPU_MATMUL = 8192  # rows and columns: large enough for the library's best rate on the largest GPUs
_CPU_MATMULS = (256, 512, 1024, 2048, 4096)
_CPU_LONG_ENOUGH = 0.01  # seconds


@dataclass
class Limits:
    """The best of every measurement so far: on a machine that others use, a limit moves during a run.

    Attributes:
        device: "cpu" or "cuda".
        dtypes: whose matmul rate is wanted; measuring one takes time, so only those that a case refers to.
        copy: bytes per second, read and written.
        matmul: floating-point operations per second by dtype, such as {"bfloat16": 7.1e14}. On a CPU a dtype's rate is
            at least float32's: where it multiplies narrow numbers slowly, they can be widened first.
        measurements: how often both were measured.
    """

    device: str
    dtypes: tuple[torch.dtype, ...] = ()
    copy: float = 0.0
    matmul: dict[str, float] = field(default_factory=dict)
    measurements: int = 0

    def measure(self) -> None:
        """Measures once more."""
        self.copy = max(self.copy, copy_bandwidth(self.device))
        widest = {torch.float32} if self.device == "cpu" and self.dtypes else set()
        rates = {dtype: matmul_rate(self.device, dtype) for dtype in {*self.dtypes, *widest}}
        for dtype in self.dtypes:
            name = dtype_name(dtype)
            self.matmul[name] = max(self.matmul.get(name, 0.0), rates[dtype], *(rates[wide] for wide in widest))
        self.measurements += 1
        if self.device == "cuda":
            torch.cuda.empty_cache()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def wanted_dtypes(dtypes: Iterable[torch.dtype]) -> tuple[torch.dtype, ...]:
    """Each dtype once, in a fixed order."""
    return tuple(sorted(set(dtypes), key=str))


def fp8_limit(device: str, wide: torch.dtype) -> torch.dtype:
    """The dtype whose matmul rate is the limit of products of FP8: on devices without them what they are widened to."""
    has = device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9)
    return torch.float8_e4m3fn if has else wide


def tf32_is_on() -> bool:
    """Whether PyTorch may round the operands of float32 matrix products to TF32 on a GPU."""
    return torch.get_float32_matmul_precision() != "highest"


def _fastest(work: Callable[[], object], device: str, repetitions: int) -> float:
    """Seconds of the fastest call after one that warms up."""
    times = []
    for _ in range(repetitions + 1):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        else:
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
    return min(times[1:])


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of the fastest of a few large copies."""
    numel = max(2 * cache_bytes(device), _GPU_COPY if device == "cuda" else 0) // 4
    source = torch.rand(numel, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * numel / _fastest(lambda: target.copy_(source), device, 6)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of the fastest of a few large square matrix products, as `torch.mm` does
    them, and `torch._scaled_mm` those of FP8, with one scale: sums in float32, random operands (zeros run faster on a
    GPU, which then draws less power). On a CPU the size grows until a product takes a hundredth of a second.
    """
    rate = 0.0
    for size in (_GPU_MATMUL,) if device == "cuda" else _CPU_MATMULS:
        left, right = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
        if dtype == torch.float8_e4m3fn:
            seconds = _fastest(lambda a=left, b=right: _scaled_product(a, b), device, 5)  # type: ignore[misc]
        else:
            product = torch.empty_like(left)
            seconds = _fastest(lambda a=left, b=right, c=product: torch.mm(a, b, out=c), device, 5)  # type: ignore[misc]
        rate = max(rate, 2 * size**3 / seconds)
        if seconds >= _CPU_LONG_ENOUGH:
            break
    return rate


def _scaled_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    one = torch.ones((), device=left.device)
    return torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
