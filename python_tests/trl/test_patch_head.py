"""TRL's fused head on the kernels: values and gradients against float64, what stays with TRL's own function."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("trl", reason="needs TRL")

from grpo_kernels import backend
from grpo_kernels.integrations.trl import head
from grpo_kernels.testing import assert_as_accurate
from python_tests.trl.head_problems import (
    PLAIN,
    ROWS,
    VOCAB,
    Leaves,
    Stock,
    Transform,
    definition,
    gradients,
    make,
)

pytestmark = [pytest.mark.trl, pytest.mark.slow]

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NO_MEAN = ("entropy", "log_sum_sq_probs", "is_top1")
OPTIONS: dict[str, tuple[Transform, bool, tuple[str, ...]]] = {
    "plain": (PLAIN, False, head.OUTPUTS),
    "bias": (PLAIN, True, head.OUTPUTS),
    "temperature": (Transform(temperature=0.7), False, ("log_probs", "entropy")),
    "integer_temperature": (Transform(temperature=2), False, ("log_probs",)),
    "scaled": (Transform(temperature=1.7, logit_scale=0.3), True, head.OUTPUTS),
    "negative_scale": (Transform(logit_scale=-1.5), False, ("mean_logits", "is_top1")),
    "softcap": (Transform(0.9, softcap=5.0, logit_scale=1.5), True, NO_MEAN),
}
# hidden, weight, autocast, what the products' operands are rounded to
DTYPES = {
    "float32": (F32, F32, None, F32),
    "bfloat16": (BF16, BF16, None, BF16),
    "float16": (F16, F16, None, F16),
    "narrow_hidden": (BF16, F32, None, BF16),
    "narrow_weight": (F32, BF16, None, F32),
    "mixed_halves": (F16, BF16, None, F16),
    "autocast": (F32, F32, BF16, BF16),
    "autocast_of_halves": (F16, F32, BF16, BF16),
}


@pytest.fixture(autouse=True)
def _count_from_zero(native_cpu: None) -> None:
    Stock.calls = 0


FUSED = head.fused_head(Stock)


def apply(leaves: Leaves, targets: Tensor, transform: Transform = PLAIN, outputs: Any = head.OUTPUTS) -> Any:
    temperature, softcap, logit_scale = transform
    return FUSED.apply(*leaves, targets, temperature, 32, softcap, logit_scale, outputs)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients_are_those_of_the_formulas(options: str, dtypes: str) -> None:
    hidden, weight, autocast, operands = DTYPES[dtypes]
    transform, bias, outputs = OPTIONS[options]
    leaves, targets = make(hidden, weight, bias, transform)
    with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
        results = apply(leaves, targets, transform, outputs)
    grads = gradients(*results[:2], leaves)
    assert Stock.calls == 0
    exact_leaves, eager_leaves = leaves.cast(operands, F64), leaves.cast(operands, F32)
    exact, eager = (definition(cast, targets, transform) for cast in (exact_leaves, eager_leaves))
    # No logit is formed for their mean, whose operands keep their dtype.
    exact["mean_logits"] = definition(leaves.cast(F64), targets, transform)["mean_logits"]
    eager["mean_logits"] = definition(leaves.cast(F32), targets, transform)["mean_logits"]
    for (name, expected), actual in zip(exact.items(), results, strict=True):
        if name not in ("log_probs", *outputs):
            assert actual is None, name
        elif name == "is_top1":
            assert torch.equal(actual, expected)
            assert actual.any()
        else:
            assert actual.dtype == F32
            assert actual.requires_grad == (name in ("log_probs", "entropy"))
            assert_as_accurate(actual.detach(), expected.detach(), eager[name].detach(), name=name)
    wanted = "entropy" in outputs
    expected_grads = gradients(exact["log_probs"], exact["entropy"] if wanted else None, exact_leaves)
    eager_grads = gradients(eager["log_probs"], eager["entropy"] if wanted else None, eager_leaves)
    for leaf, actual, expected, plain in zip(leaves.trained(), grads, expected_grads, eager_grads, strict=True):
        assert actual.dtype == leaf.dtype
        assert_as_accurate(actual, expected, plain, name="gradient")


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()])
def test_only_what_requires_a_gradient_gets_one(trained: tuple[str, ...]) -> None:
    leaves, targets = make(bias=True)
    for name, leaf in leaves._asdict().items():
        leaf.requires_grad_(name in trained)
    log_probs, entropy, *_ = apply(leaves, targets)
    assert log_probs.requires_grad == entropy.requires_grad == bool(trained)
    if trained:
        expected = definition(leaves, targets, PLAIN)
        stock = gradients(expected["log_probs"], expected["entropy"], leaves)
        exact_leaves = Leaves(
            *(None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in leaves)
        )
        exact = definition(exact_leaves, targets, PLAIN)
        pairs = zip(
            gradients(log_probs, entropy, leaves),
            gradients(exact["log_probs"], exact["entropy"], exact_leaves),
            stock,
            strict=True,
        )
        for actual, wanted, plain in pairs:
            assert_as_accurate(actual, wanted, plain)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_is_differentiated(used: int) -> None:
    """An entropy that is only logged, and log-probs that are only logged."""
    leaves, targets = make()
    results, expected = apply(leaves, targets), list(definition(leaves, targets, PLAIN).values())
    for actual, wanted in zip(
        torch.autograd.grad(results[used].sum(), leaves.trained()),
        torch.autograd.grad(expected[used].sum(), leaves.trained()),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


def test_without_gradients_nothing_is_recorded() -> None:
    leaves, targets = make()
    with torch.no_grad():
        results = apply(leaves, targets)
    assert not any(result.requires_grad for result in results)
    assert all(torch.equal(a, b) for a, b in zip(results, apply(leaves, targets), strict=True))


def test_checkpointed() -> None:
    leaves, targets = make(bias=True)
    outputs = checkpoint(lambda *x: apply(Leaves(*x), targets)[:2], *leaves, use_reentrant=False)
    direct = apply(leaves, targets)[:2]
    for a, b in zip(gradients(*outputs, leaves), gradients(*direct, leaves), strict=True):
        assert torch.equal(a, b)


def test_compiled_without_a_graph_break() -> None:
    leaves, targets = make(bias=True)
    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")(leaves, targets)
    direct = apply(leaves, targets)
    assert all(torch.equal(a, b) for a, b in zip(compiled, direct, strict=True))
    for a, b in zip(gradients(*compiled[:2], leaves), gradients(*direct[:2], leaves), strict=True):
        assert torch.equal(a, b)


def test_rows_of_huge_logits_and_rows_of_nan() -> None:
    leaves, targets = make()
    with torch.no_grad():
        leaves.hidden[1] *= 1e30
        leaves.hidden[2] = float("nan")
    log_probs, entropy, _, _, is_top1 = apply(leaves, targets)
    assert log_probs[2].isnan()
    assert entropy[2].isnan()
    assert not is_top1[2]
    others = torch.arange(ROWS) != 2
    assert log_probs[others].isfinite().all()
    assert entropy[others].isfinite().all()


def test_a_target_that_is_no_token_raises() -> None:
    leaves, targets = make()
    for wrong in (-1, -100, VOCAB):
        targets[3] = wrong
        with pytest.raises(ValueError, match="token_ids"):
            apply(leaves, targets)


def test_no_rows() -> None:
    leaves, targets = make()
    results = apply(leaves._replace(hidden=leaves.hidden[:0]), targets[:0])
    assert [result.shape for result in results] == [(0,)] * 5
    assert not torch.autograd.grad(results[0].sum(), leaves.weight)[0].any()


class Quantized(torch.Tensor):
    """A weight that is not what it looks like."""


def sharded(leaves: Leaves) -> Leaves:
    weight = torch.nn.Parameter(leaves.weight.detach())
    weight.ds_id = 0  # ZeRO-3's mark
    return leaves._replace(weight=weight)


def quantized(leaves: Leaves) -> Leaves:
    return leaves._replace(weight=leaves.weight.detach().as_subclass(Quantized))


STAYS: dict[str, tuple[Any, Transform, tuple[str, ...]]] = {
    "float64": (lambda leaves: leaves.cast(F64), PLAIN, head.OUTPUTS),
    "zero_3": (sharded, PLAIN, head.OUTPUTS),
    "quantized": (quantized, PLAIN, head.OUTPUTS),
    "mean_of_capped_logits": (Leaves, Transform(softcap=4.0), ("mean_logits",)),
    "softcap_0": (Leaves, Transform(softcap=0.0), NO_MEAN),
    "scale_0": (Leaves, Transform(logit_scale=0.0), head.OUTPUTS),
    "negative_temperature": (Leaves, Transform(temperature=-1.0), head.OUTPUTS),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_the_kernels_do_not_compute_as_trl_does_stays_with_trl(case: str) -> None:
    change, transform, outputs = STAYS[case]
    leaves, targets = make()
    leaves = leaves if change is Leaves else change(leaves)
    results = apply(leaves, targets, transform, outputs)
    assert Stock.calls == 1
    temperature, softcap, logit_scale = transform
    expected = Stock.apply(*leaves, targets, temperature, 32, softcap, logit_scale, outputs)
    for actual, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_a_temperature_of_zero_raises_as_in_trl() -> None:
    leaves, targets = make()
    with pytest.raises(ZeroDivisionError):
        apply(leaves, targets, Transform(temperature=0.0))


def test_without_kernels_trl_computes() -> None:
    leaves, targets = make()
    with backend("reference"):
        apply(leaves, targets)
    assert Stock.calls == 1
