"""Ops go past torch.library where nobody would see it, and nowhere else; what was checked once is checked again."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_kernels
from grpo_kernels import _direct, _dispatch, _extension
from grpo_kernels._direct import is_direct, signature
from python_tests import samples
from python_tests.samples import Call, results_and_gradients, tensors

_SAMPLES = ("group_advantages", "token_log_probs", "grpo_loss", "moe_router", "moe_permute")
_CALLS = [pytest.param(call, id=f"{op}-{call.name}") for op in _SAMPLES for call in samples.modules()[op].CALLS]

pytestmark = pytest.mark.skipif(
    bool(_extension.cpu_problem()), reason=f"native CPU kernels: {_extension.cpu_problem()}"
)


class _Seen(TorchDispatchMode):
    """Names of the operators that ran in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


class _Function(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


class _Unhandled(Tensor):
    """Handles operators, not functions."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("not called")


def _loss(log_probs: Tensor, **changes: Any) -> Tensor:
    inputs: dict[str, Any] = {
        "old_log_probs": torch.linspace(-2.0, -0.5, 12).view(3, 4),
        "advantages": torch.tensor([1.0, -1.0, 0.5]),
        "mask": torch.ones(3, 4, dtype=torch.bool),
    }
    return grpo_kernels.grpo_loss(log_probs, **{**inputs, **changes}).loss


def _permutation() -> grpo_kernels.Permutation:
    """Of three tokens with an expert each."""
    return grpo_kernels.build_permutation(torch.tensor([[1], [0], [1]]), 2)


_ONE_CALL: dict[str, Callable[[Tensor], Any]] = {
    "group_advantages": lambda x: grpo_kernels.group_advantages(x.flatten(), group_size=4),
    "token_log_probs": lambda x: grpo_kernels.token_log_probs(x, torch.tensor([0, 3, 1]), outputs=("entropy",)),
    "grpo_loss": _loss,
    "moe_router": lambda x: grpo_kernels.moe_router(x, 2),
    "build_permutation": lambda x: grpo_kernels.build_permutation(x.abs().int(), 4),
    "moe_permute": lambda x: grpo_kernels.moe_permute(x, _permutation()),
    "moe_unpermute": lambda x: grpo_kernels.moe_unpermute(x, _permutation()),
}
_OPS = tuple(_ONE_CALL)


def test_plain_tensors_are_called_directly() -> None:
    plain = torch.ones(3, 4)
    parameter = torch.nn.Parameter(plain)
    assert is_direct((plain, None, plain.t(), plain.int()))
    assert not is_direct((plain, parameter))
    with torch.no_grad():
        assert is_direct((plain, parameter))
        with torch.autocast("cpu", torch.bfloat16):
            assert is_direct((plain, parameter))
    with torch.inference_mode():
        inference = torch.ones(2)
        assert is_direct((plain, parameter, inference))
    assert is_direct((plain, inference))


def test_a_signature_tells_apart_what_checks_tell_apart() -> None:
    plain = torch.ones(2, 3)
    others: list[tuple[Tensor | None, ...]] = [
        (plain,),
        (plain, None),
        (None, plain),
        (plain, plain),
        (torch.ones(3, 2),),
        (torch.ones(6),),
        (torch.ones(2, 3, 1),),
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2, 3, requires_grad=True),),
        *((torch.ones(2, 3, dtype=dtype),) for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.bool)),
        *((torch.ones(2, 3, dtype=dtype),) for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32)),
    ]
    assert len({signature(tensors) for tensors in others} - {None}) == len(others)
    assert signature((torch.zeros(3, 2).t(),)) == signature((plain,))
    assert signature((torch.ones(0, 3),)) is None


def test_few_calls_are_remembered() -> None:
    known: dict[int, int] = {}
    for call in range(2 * _direct._MOST + 3):
        _direct.remember(known, call, -call)
        assert known[call] == -call
        assert len(known) <= _direct._MOST
    assert _direct.recall(known, []) is None


def test_nothing_is_direct_where_pytorch_lacks_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runpy.run_path(_direct.__file__)["is_direct"]((torch.zeros(2),))
    monkeypatch.delattr(torch._C, "_dispatch_keys")
    assert not runpy.run_path(_direct.__file__)["is_direct"]((torch.zeros(2),))


@pytest.mark.parametrize("reduction", ["none", "token_mean"])
def test_a_second_derivative_is_refused(reduction: str) -> None:
    log_probs = torch.zeros(3, 4, requires_grad=True)
    loss = _loss(log_probs, config=grpo_kernels.GRPOLossConfig(reduction=reduction))
    (first,) = torch.autograd.grad(loss.square().sum(), log_probs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    "unusual",
    [
        torch._neg_view(torch.ones(2)),
        torch._efficientzerotensor((2,)),
        torch.ones(2, device="meta"),
        torch.eye(2).to_sparse(),
        torch.ones(2).as_subclass(_Subclass),
        torch.ones(2).as_subclass(_Unhandled),
        torch._to_functional_tensor(torch.ones(2)),
    ],
    ids=["negated", "zero", "meta", "sparse", "subclass", "dispatching", "functional"],
)
def test_other_tensors_are_not(unusual: Tensor) -> None:
    assert not is_direct((torch.ones(2), unusual))
    with torch.no_grad():
        assert not is_direct((torch.ones(2), unusual))
    assert signature((torch.ones(2), None, torch.ones(2))) is not None
    assert signature((torch.ones(2), None, unusual)) is None


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_nothing_is_direct_where_somebody_watches() -> None:
    plain, found = torch.ones(2), []

    def ask(tensor: Tensor) -> Tensor:
        found.append(is_direct((plain,)) or signature((plain,)) is not None)
        return tensor.sum()

    for mode in (
        FakeTensorMode(),
        _Seen(),
        _Function(),
        torch.device("cpu"),
        profile(activities=[ProfilerActivity.CPU]),
    ):
        with mode:
            found.append(is_direct((plain,)) or signature((plain,)) is not None)
    torch.func.grad(ask)(plain)
    torch.func.vmap(ask)(torch.ones(2, 3))
    torch.func.functionalize(ask)(plain)
    torch.jit.trace(ask, plain, check_trace=False)
    assert found == [False] * 9
    assert torch.compile(lambda x: x + (signature((x,)) is None), backend="eager")(plain).tolist() == [2.0, 2.0]
    assert is_direct((plain,))


@pytest.mark.parametrize("op", _OPS)
def test_modes_and_the_profiler_see_the_op(op: str) -> None:
    values = torch.linspace(-1.0, 1.0, 12).view(3, 4).requires_grad_()
    with _Seen() as seen:
        _ONE_CALL[op](values)
    assert seen.names.count(f"grpo_kernels::{op}") == 1
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        _ONE_CALL[op](values)
    assert [event.name for event in recorded.events()].count(f"grpo_kernels::{op}") == 1


@pytest.mark.parametrize("op", _OPS)
def test_negated_tensors_keep_their_sign(op: str) -> None:
    values = torch.linspace(-1.0, 1.0, 12).view(3, 4)
    negated = torch._neg_view(values)
    for found, expected in zip(tensors(_ONE_CALL[op](negated)), tensors(_ONE_CALL[op](-values)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("call", _CALLS)
def test_direct_calls_give_what_the_library_gives(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    results_and_gradients(call)
    direct = results_and_gradients(call)  # whose checks have been made
    monkeypatch.setattr(_dispatch, "is_direct", lambda _: False)
    monkeypatch.setattr(_direct, "signature", lambda _: None)
    for found, expected in zip(direct, results_and_gradients(call), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


_IDS = torch.tensor([0, 3, 1])
_WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: grpo_kernels.group_advantages(torch.ones(8), group_size=3), ValueError, "whole groups"),
    (lambda: grpo_kernels.group_advantages(torch.ones(8), group_size=4, correction=True), TypeError, "got bool"),
    (lambda: grpo_kernels.group_advantages(torch.ones(8), group_size=4, correction=1.0), TypeError, "got float"),
    (lambda: grpo_kernels.group_advantages(torch.ones(8), group_size=4, eps=[1e-4]), TypeError, "eps must be a number"),
    (lambda: grpo_kernels.group_advantages(torch.ones(8), group_size=4, eps=float("nan")), ValueError, "finite"),
    (lambda: grpo_kernels.group_advantages(torch.ones(8).int(), group_size=4), TypeError, "dtype"),
    (lambda: grpo_kernels.token_log_probs(torch.ones(3, 4), torch.tensor([0, 4, 1])), ValueError, "< V = 4"),
    (lambda: grpo_kernels.token_log_probs(torch.ones(3, 4), torch.ones(3)), TypeError, "token_ids must have dtype"),
    (lambda: grpo_kernels.token_log_probs(torch.ones(3, 4), torch.zeros(2).long()), ValueError, "token_ids must have"),
    (lambda: grpo_kernels.token_log_probs(torch.ones(3, 4), _IDS, temperature=True), TypeError, "temperature must be"),
    (lambda: grpo_kernels.token_log_probs(torch.ones(3, 4), _IDS, softcap=[1.0]), TypeError, "softcap must be"),
    (lambda: grpo_kernels.token_log_probs(torch.ones(3, 4), _IDS, outputs=([],)), ValueError, "outputs must be"),
    (lambda: grpo_kernels.token_log_probs(torch.ones(3, 4), _IDS, inplace_backward=0), TypeError, "inplace_backward"),
    (lambda: grpo_kernels.moe_permute(torch.ones(4, 2), _permutation()), ValueError, "x must have shape"),
    (lambda: grpo_kernels.moe_permute(torch.ones(3, 4).int(), _permutation()), TypeError, "x must have dtype"),
    (lambda: grpo_kernels.moe_permute(torch.ones(3, 4), tuple(_permutation())), TypeError, "must be a Permutation"),
    (lambda: grpo_kernels.moe_unpermute(torch.ones(3, 4), _permutation(), torch.ones(3)), ValueError, "topk_weights"),
    (lambda: _loss(torch.zeros(3, 4), config=None), TypeError, "config must be"),
    (lambda: _loss(torch.zeros(3, 4), config=grpo_kernels.GRPOLossConfig(kl_coef=0.1)), ValueError, "ref_log_probs"),
    (lambda: _loss(torch.zeros(3, 4), max_length=3), ValueError, "max_length must be None"),
    (lambda: _loss(torch.zeros(3, 4), old_log_probs=torch.zeros(3, 4).int()), TypeError, "old_log_probs must have"),
    (lambda: _loss(torch.zeros(3, 4), advantages=torch.zeros(3, 1)), ValueError, "advantages must have shape"),
    (lambda: _loss(torch.zeros(3, 4), mask=torch.ones(4, 3)), ValueError, "mask must have shape"),
    (lambda: _loss(torch.zeros(3, 4), kl_coef=0.1), ValueError, "ref_log_probs must be given"),
    (lambda: _loss(torch.zeros(3, 4), ref_log_probs=[0.0]), TypeError, "ref_log_probs must be a torch.Tensor"),
    (lambda: grpo_kernels.moe_router(torch.ones(3, 4), 5), ValueError, "top_k must be <="),
    (lambda: grpo_kernels.moe_router(torch.ones(3, 4), 2.0), TypeError, "top_k must be an int"),
    (lambda: grpo_kernels.moe_router(torch.ones(3, 4), True), TypeError, "top_k must be an int"),
    (lambda: grpo_kernels.moe_router(torch.ones(3, 4), 2, norm_topk_prob=1), TypeError, "norm_topk_prob must be"),
    (lambda: grpo_kernels.moe_router(torch.ones(3, 4), 2, replay_ids=torch.zeros(3, 2).int()), ValueError, "distinct"),
]


@pytest.mark.parametrize(("wrong", "error", "says"), _WRONG, ids=[f"{number}" for number in range(len(_WRONG))])
def test_a_wrong_call_raises_after_right_ones_of_the_same_shape(
    wrong: Callable[[], Any], error: type[Exception], says: str
) -> None:
    for _ in range(2):
        grpo_kernels.group_advantages(torch.ones(8), group_size=4, correction=1)
        grpo_kernels.token_log_probs(torch.ones(3, 4), torch.tensor([0, 3, 1]))
        grpo_kernels.moe_permute(torch.ones(3, 4), _permutation())
        grpo_kernels.moe_unpermute(torch.ones(3, 4), _permutation())
        _loss(torch.zeros(3, 4))
        grpo_kernels.moe_router(torch.ones(3, 4), 2)
        grpo_kernels.moe_router(torch.ones(3, 4), 1)
        with pytest.raises(error, match=says):
            wrong()
