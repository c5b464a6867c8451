"""Planted mistakes: each is noticed, and the same kernel without it is right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from python_tests.emulator import ORDERS, build
from python_tests.emulator.run_fault import run

WRONG = "wrong result"
BARRIER = "divergent barrier in block (0, 0, 0): "
COLLECTIVE = "divergent warp collective in block (0, 0, 0): "
FULL = "mask 0xffffffff)"

NOTICED = {
    "missing_barrier": WRONG,
    "missing_second_barrier": WRONG,
    "missing_syncwarp": WRONG,
    "barrier_in_a_branch": BARRIER + "threads 0 to 39 wait in __syncthreads (kernels/faults.cu:L); "
    "threads 40 to 95 wait in __syncthreads (kernels/faults.cu:L)",
    "exit_before_a_barrier": BARRIER + "threads 0 to 6 wait in __syncthreads (kernels/faults.cu:L); "
    "threads 7 to 7 left the kernel; threads 8 to 95 wait in __syncthreads (kernels/faults.cu:L)",
    "store_after_the_counter": WRONG,
    "shuffle_in_a_branch": COLLECTIVE + f"threads 0 to 15 wait in __shfl_xor_sync (kernels/faults.cu:L, {FULL}; "
    f"threads 16 to 31 wait in __syncwarp (kernels/faults.cu:L, {FULL}",
    "shuffle_from_a_lane_that_left": WRONG,
    "mask_without_the_caller": "__shfl_xor_sync: the mask 0x0000ffff leaves out the calling lane (kernels/faults.cu:L",
    "masks_that_differ": COLLECTIVE + f"threads 0 to 15 wait in __shfl_xor_sync (kernels/faults.cu:L, {FULL}; "
    "threads 16 to 31 wait in __shfl_xor_sync (kernels/faults.cu:L, mask 0xfffffff0)",
    "uninitialised_shared": WRONG,
    "unwritten_output": WRONG,
}
SANITIZED = {
    "read_past_the_input": "heap-buffer-overflow",
    "write_past_the_output": "heap-buffer-overflow",
    "static_shared_past_its_end": "global-buffer-overflow",
    "index_past_an_axis": "index 32 out of bounds",
    "dynamic_shared_past_its_end": "heap-buffer-overflow",
    "misaligned_vector": "misaligned address",
}
SOMETIMES = {"store_after_the_counter"}  # in some orders only: why there are several


def without_lines(text: str) -> str:
    """Line numbers replaced by L."""
    parts = text.split("faults.cu:")
    return "faults.cu:".join([parts[0], *("L" + part.lstrip("0123456789") for part in parts[1:])])


@pytest.mark.parametrize("name", NOTICED)
def test_a_mistake_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.test_kernels()
    noticed = []
    for order in ORDERS:
        monkeypatch.setenv("GK_EMULATOR_ORDER", str(order))
        assert run(library, name, faulty=False) == ""
        noticed.append(without_lines(run(library, name, faulty=True)))
    reports = [text for text in noticed if text]
    assert all(text.startswith(NOTICED[name]) for text in reports)
    assert len(reports) >= (1 if name in SOMETIMES else len(ORDERS))


def sanitized(name: str, faulty: bool) -> subprocess.CompletedProcess[str]:
    script, library = Path(__file__).with_name("run_fault.py"), build.built(True) / "test_kernels.so"
    return subprocess.run(
        [sys.executable, str(script), str(library), name, str(int(faulty))],
        env=build.sanitizer_environment(),
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", SANITIZED)
def test_a_sanitizer_notices(name: str) -> None:
    fine = sanitized(name, faulty=False)
    assert (fine.returncode, fine.stdout, fine.stderr) == (0, "\n", "")
    wrong = sanitized(name, faulty=True)
    assert wrong.returncode != 0
    assert SANITIZED[name] in wrong.stderr
    assert "kernels/faults.cu" in wrong.stderr  # the place in the source


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("atomicAdd(data, 1.0f)", "deleted function"),
        ("*data = float(__activemask())", "the emulator has no __activemask"),
        ('asm volatile("bar.sync 0;")', ""),
        ("__shfl_sync(1u, float4{}, 0)", "shuffles take numbers"),
    ],
)
def test_what_the_emulator_lacks_does_not_compile(statement: str, says: str, tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    text = "#include <cuda_runtime.h>\nvoid kernel(float* data) { STATEMENT; }\n"
    include = Path(__file__).with_name("include")
    for body, works in (("*data = __ldg(data)", True), (statement, False)):
        source.write_text(text.replace("STATEMENT", body))
        done = subprocess.run(
            [
                build.COMPILER,
                "-std=c++17",
                "-x",
                "c++",
                "-c",
                f"-I{include}",
                str(source),
                "-o",
                str(tmp_path / "kernel.o"),
            ],
            capture_output=True,
            text=True,
        )
        assert (done.returncode == 0) == works, done.stderr
        assert works or says in done.stderr
