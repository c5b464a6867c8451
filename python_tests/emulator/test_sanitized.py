"""The tests of the emulated kernels once more, in the build with address and undefined-behaviour sanitizer.

In a process of its own, which the sanitizer ends at the first fault. Tensors have their exact size there, so that one
element too far is seen.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from python_tests.emulator import build

HERE = Path(__file__).parent
FILES = [
    "test_features.py",
    "test_group_advantages.py",
    "test_grpo_loss.py",
    "test_moe_permute.py",
    "test_moe_router.py",
    "test_samples.py",
]
QUICK = " or ".join(
    [
        "(test_features and (4-32 or (2- and (atomics or vector or index))))",
        "(test_group_sizes and (1- or 33- or 100-)) or test_an_empty_batch or test_nothing_is_scored",
        "(test_informative_groups_and_ranks and 66-33)",
        "test_empty_batches or test_bounds or test_second or (test_forms and everything)",
        "(test_rows_around_a_segment and everything-token_mean)",
        "test_nothing_has_a_row or (test_slots_around_a_tile and 1025)",
        "test_bounds_that_make_no_sense or test_faulty_replay or (test_tokens_around_a_chunk and (1- or 17-))",
        "(test_every_gate and (33-5-11-4-deepseek_v3 or 160-6-8-3-olmoe or 100-6-50-7-sqrtsoftplus_groups))",
    ]
)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("files", "selection"),
    [
        pytest.param(FILES, QUICK, id="quick"),
        *(pytest.param([name], "test", id=name.removesuffix(".py"), marks=pytest.mark.slow) for name in FILES),
    ],
)
def test_nothing_is_touched_out_of_bounds(files: list[str], selection: str) -> None:
    build.built(True)
    pytest_arguments = ["-qsx", "-m", "not slow", "-k", selection, *(str(HERE / name) for name in files)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *pytest_arguments],
        env=build.sanitizer_environment(),
        cwd=build.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert " passed" in done.stdout
