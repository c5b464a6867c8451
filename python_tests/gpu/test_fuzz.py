"""Random problems of the kernels of FP8, on a GPU in a process of their own, which no hanging kernel outlives."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import torch

from bench.gpu_check import processes
from grpo_kernels.moe_experts import glu_reference
from python_tests.gpu.devices import DEVICES, placed, run_op
from python_tests.gpu.fuzz import __main__ as fuzz
from python_tests.gpu.fuzz.checks import CHECKS
from python_tests.gpu.fuzz.problems import PROBLEMS, Dice, OpCall

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_random_problems(kind: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if device == "cpu":
        assert fuzz.run(kind, device, seconds=60.0, most=2, first=0) == 0, capsys.readouterr().out
        return
    log = tmp_path / "log"
    command = [sys.executable, "-m", "python_tests.gpu.fuzz", "--op", kind, "--device", device, "--seconds", "5"]
    result = processes.run(command, 100.0, log, None, ROOT, session=False)
    assert (result.status, result.stopped) == (0, ""), log.read_text()[-3000:]


# --- what the comparison sees ----------------------------------------------------------------------------------------


def _case(kind: str, wanted: str) -> OpCall:
    """The first problem of this op that has rows and columns."""
    for seed in range(100):
        torch.manual_seed(seed)
        found = PROBLEMS[kind](Dice(seed))
        if found.op == wanted and found.arguments[0].numel() > 1000:
            return found
    raise AssertionError(f"no problem of {wanted}")


@pytest.mark.parametrize(
    ("kind", "op"),
    [("product", "fp8_grouped_gemm"), ("wgrad", "fp8_grouped_gemm_wgrad"), ("wgrad", "fp8_grouped_gemm_wgrad_add_"),
     ("quantize", "fp8_quantize"), ("move", "moe_permute_quantize")],
)  # fmt: skip
def test_a_wrong_result_is_seen(kind: str, op: str) -> None:
    call = _case(kind, op)
    found = run_op(op, call.arguments, "cpu")
    CHECKS[op](call.arguments, found)
    for result in (result for result in found if result.numel()):
        first = (0,) * result.dim()
        kept = result[first].clone()
        if result.element_size() == 1:
            result.view(torch.uint8)[first] ^= 1
        else:
            result[first] += result[result.isfinite()].abs().max() + 1e-3
        with pytest.raises(AssertionError):
            CHECKS[op](call.arguments, found)
        result[first] = kept


def _glu_results(call: OpCall) -> list[torch.Tensor]:
    return list(getattr(glu_reference, call.op)(*call.arguments))


@pytest.mark.parametrize("kind", ["glu", "glu_backward"])
def test_the_definition_of_the_activation_lies_within_its_bounds_and_a_neighbour_does_not(kind: str) -> None:
    """Nearly every code is the only one that the bounds allow."""
    seen = 0
    for seed in range(30):
        torch.manual_seed(seed)
        call = PROBLEMS[kind](Dice(seed))
        found = _glu_results(call)
        CHECKS[call.op](call.arguments, found)
        codes = next((part.view(torch.uint8) for part in found if part.element_size() == 1 and part.numel()), None)
        if codes is None:
            continue
        finite = ((codes & 0x7F) < 0x7E) & ((codes & 0x7F) > 0)
        for place in finite.nonzero()[:3].tolist():
            codes[tuple(place)] += 1
            with pytest.raises(AssertionError, match="codes of"):
                CHECKS[call.op](call.arguments, found)
            codes[tuple(place)] -= 1
            seen += 1
    assert seen > 30


def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(device: str) -> None:
        raise AssertionError(f"a bit on {device}")

    monkeypatch.setattr(fuzz, "problem", lambda kind, seed: ("[3, 4]", wrong))
    assert fuzz.run("glu", "cpu", 5.0, 9, 7) == 1
    assert capsys.readouterr().out == "--op glu --seed 7: [3, 4]\nwrong: a bit on cpu\n"


def test_what_hangs_is_ended_and_named(tmp_path: Path) -> None:
    code = """
        import time
        from python_tests.gpu.fuzz import __main__ as fuzz
        fuzz.problem = lambda kind, seed: ("[3, 4]", lambda device: time.sleep(60))
        fuzz.run("glu", "cpu", 5.0, 9, 7, 0.5)
    """
    log = tmp_path / "log"
    result = processes.run([sys.executable, "-c", textwrap.dedent(code)], 50.0, log, None, ROOT)
    assert (result.status, result.stopped) == (1, "")
    assert log.read_text().startswith("--op glu --seed 7: [3, 4]\nTimeout (0:00:00.500000)!")


def test_placed_keeps_strides_and_puts_nan_between_rows() -> None:
    memory = torch.arange(12.0).view(3, 4)
    found = placed(memory[:, :3], "cpu")
    assert torch.equal(found, memory[:, :3])
    assert found.stride() == (4, 1)
    assert found.as_strided((11,), (1,))[[3, 7]].isnan().all()
