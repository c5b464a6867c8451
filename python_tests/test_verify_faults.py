"""grpo-kernels verify finds faults that are planted in the kernels, and says what is wrong."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import _dispatch
from grpo_kernels.testing import verification
from python_tests.test_verify import call

Outputs = Tensor | tuple[Tensor, ...]
Fault = Callable[[int, tuple[Any, ...], Outputs], Outputs]


def no_gradient_in_the_last_row(call: int, arguments: tuple[Any, ...], grad: Tensor) -> Tensor:
    grad[-1] = 0
    return grad


def one_gradient_off(call: int, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    outputs[1].view(-1)[outputs[1].abs().argmax()] *= 1.001
    return outputs


def off(call: int, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs[0] * 1.001, *outputs[1:])


def unwritten(call: int, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The last element is left as it was allocated: right by luck, unless the memory is poisoned."""
    memory = torch.empty_like(outputs[0])
    lucky = not memory.isnan().all()
    memory[: None if lucky else -1] = outputs[0][: None if lucky else -1]
    return (memory, *outputs[1:])


def unstable(call: int, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One unit in the last place of one element, another one in every call."""
    place = call % outputs[0].numel()
    outputs[0][place] = torch.nextafter(outputs[0][place], torch.tensor(10.0))
    return outputs


def writes_to_its_input(call: int, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    arguments[0][0] = 0.25
    return outputs


def one_code_off(call: int, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As where a tie is rounded the wrong way."""
    outputs[0].view(torch.uint8)[5, 200] ^= 1
    return outputs


def rounds_to_bfloat16(call: int, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs[0].bfloat16(), *outputs[1:])


def leaks_the_mask(call: int, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    outputs[1].masked_fill_(arguments[3] == 0, float("nan"))
    return outputs


def raises(call: int, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    raise RuntimeError("illegal memory access\nand more")


def forgets_nan(call: int, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(output.nan_to_num() if output.is_floating_point() else output for output in outputs)


def forgets_the_last_column(call: int, arguments: tuple[Any, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    grads[1][-1] = 0
    return grads


def rounds_logits(call: int, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs[0].bfloat16().float(), *outputs[1:])


def forgets_a_row(call: int, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """In the gradient of the hidden states, the row where it is largest."""
    outputs[4][outputs[4].abs().amax(1).argmax()] = 0
    return outputs


def wrong_flag(call: int, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    output[3] = ~output[3]
    return output


def another_expert(call: int, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Two slots of a token in the wrong order, ids and weights alike."""
    for output in outputs[:2]:
        output[5, :2] = output[5, :2].flip(0)
    return outputs


def unstable_order(call: int, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Two neighbours of the last expert in the wrong order."""
    outputs[1][-2:] = outputs[1][-2:].flip(0)
    return outputs


def padding_left_as_it_was(call: int, arguments: tuple[Any, ...], rows: Tensor) -> Tensor:
    rows[arguments[2] < 0] = rows[0]
    return rows


def sums_in_bfloat16(call: int, arguments: tuple[Any, ...], out: Tensor) -> Tensor:
    return out.bfloat16().float()


def forgets_an_expert(call: int, arguments: tuple[Any, ...], grad: Tensor) -> Tensor:
    """In the gradient of the weights, the last one."""
    grad[-1] = 0
    return grad


def router_learns_less(call: int, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    outputs[2].mul_(1.00001)
    return outputs


FAULTS = [
    (
        "token_log_probs",
        "token_log_probs_backward",
        no_gradient_in_the_last_row,
        "V=5003",
        "gradient of logits: error ",
    ),
    ("token_log_probs", "token_log_probs", rounds_to_bfloat16, "V=1024", "log_probs: must be torch.float32 [128], got"),
    ("token_log_probs", "token_log_probs", forgets_nan, "infinite rows", "log_probs: NaN, infinity or a value that"),
    ("group_advantages", "group_advantages", off, "default", "advantages: error 1.00e-03 exceeds the budget "),
    ("group_advantages", "group_advantages", unwritten, "default", "advantages: depends on memory that nothing wrote"),
    ("group_advantages", "group_advantages", unstable, "default", "advantages: differs from run to run"),
    (
        "group_advantages",
        "group_advantages",
        writes_to_its_input,
        "default",
        "ValueError: it modified its input rewards",
    ),
    ("group_advantages", "group_advantages", raises, "default", "groups: RuntimeError: illegal memory access"),
    ("informative_groups", "informative_groups", wrong_flag, "default", "informative: differs"),
    ("grpo_loss", "grpo_loss", leaks_the_mask, "gspo, token_mean", "gradient of log_probs: NaN, infinity"),
    ("grpo_loss", "grpo_loss", one_gradient_off, "gspo, token_mean", "gradient of log_probs: error 1."),
    (
        "linear_token_log_probs",
        "linear_token_log_probs_backward",
        forgets_the_last_column,
        "log-probs alone",
        "gradient of weight: error ",
    ),
    ("linear_token_log_probs", "linear_token_log_probs", rounds_logits, "log-probs alone", "log_probs: error "),
    ("linear_cross_entropy", "linear_cross_entropy", off, "plain, mean", "loss: error "),
    ("linear_grpo_loss", "linear_grpo_loss", forgets_a_row, "preset dapo", "gradient of hidden: error "),
    ("moe_router", "moe_router", another_expert, "Qwen3", "topk_ids: differs"),
    ("build_permutation", "build_permutation", unstable_order, "uneven", "inv_map: differs"),
    ("moe_permute", "moe_permute", padding_left_as_it_was, "aligned", "rows of x: error "),
    ("moe_unpermute", "moe_unpermute", sums_in_bfloat16, "uneven", "rows of tokens: error "),
    ("fp8_quantize", "fp8_quantize", one_code_off, "rows, tails", "codes: differs"),
    ("grouped_gemm", "grouped_gemm_wgrad", forgets_an_expert, "tiles", "gradient of weight: error "),
    ("moe_experts", "moe_glu_backward", router_learns_less, "recomputed", "gradient of weights: error "),
]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch, native_cpu: None) -> Iterator[Callable[[str, str, Fault], None]]:
    """Puts a fault behind a native function: it sees the number of the call, the arguments and the results."""

    def put(package: str, function: str, fault: Fault) -> None:
        module = importlib.import_module(f"grpo_kernels.{package}._native")
        sound, calls = getattr(module, function), [0]

        def faulty(*arguments: Any) -> Outputs:
            calls[0] += 1
            return fault(calls[0], arguments, sound(*arguments))

        monkeypatch.setattr(module, function, faulty)
        _dispatch._implementation.cache_clear()

    yield put
    monkeypatch.undo()
    _dispatch._implementation.cache_clear()


@pytest.mark.parametrize(("op", "function", "fault", "case", "says"), FAULTS, ids=[row[2].__name__ for row in FAULTS])
def test_a_planted_fault_is_found(
    op: str,
    function: str,
    fault: Fault,
    case: str,
    says: str,
    plant: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    path = tmp_path / "results.json"
    options = ("--op", op, "--dtype", "float32", "--case", case, "--json", str(path))
    assert call(capsys, *options)[0] == 0
    plant(_dispatch.registered_ops()[function].rpartition(".")[2], function, fault)
    status, out, _ = call(capsys, *options)
    assert status == 1
    assert out.splitlines()[-1].startswith("FAILED: ")
    failures = [line for line in out.splitlines() if line.startswith(f"FAILED {op}; native on cpu; float32; ")]
    assert any(says in line for line in failures), out
    (reference,) = [line.split() for line in out.splitlines() if line.split()[:2] == [op, "reference"]]
    assert reference[7] == "ok"
    results = json.loads(path.read_text())
    assert results["verified"] is False
    assert len(results["failures"]) == len(failures)


def test_a_definition_that_raises_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(importlib.import_module("grpo_kernels.group_advantages.reference"), "group_rank", broken)
    status, out, _ = call(capsys, "--op", "best_of_group", "--case", "valid")
    assert status == 1
    assert "valid, equal groups: the definition in float64: ZeroDivisionError: no message" in out


def test_a_long_list_of_failures_is_cut(plant: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plant("group_advantages", "group_advantages", raises)
    options = ("--op", "group_advantages", "--dtype", "float32", "--backend", "native")
    status, out, _ = call(capsys, *options)
    count = len(verification.cases()["group_advantages"])
    assert (status, out.count("\nFAILED group_advantages")) == (1, 20)
    assert f"... and {count - 20} more failures: --verbose shows them" in out
    status, out, _ = call(capsys, *options, "--verbose")
    assert (status, out.count("\nFAILED group_advantages")) == (1, count)
