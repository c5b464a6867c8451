"""grpo-kernels verify finds the Triton kernels on the CPU when the interpreter is switched on."""

from __future__ import annotations

import pytest

from grpo_kernels.cli import main

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


@pytest.mark.parametrize("op", ["token_log_probs", "linear_token_log_probs"])
def test_triton_kernels_are_verified(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--op", op, "--case", "everything, masked", "--dtype", "float32", "--dtype", "bfloat16"]
    assert main(["verify", "--device", "cpu", *options]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    for dtype in ("float32", "bfloat16"):
        (row,) = [row for row in rows if row[:4] == [op, "triton", "cpu", dtype]]
        assert row[7] == "ok"
        assert 0.0 < float(row[5]) <= float(row[6])
