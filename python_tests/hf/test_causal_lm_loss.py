"""causal_lm_loss: value and gradient of transformers' ForCausalLMLoss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.loss.loss_utils import ForCausalLMLoss

from grpo_kernels.integrations.transformers import causal_lm_loss
from grpo_kernels.testing import assert_as_accurate
from python_tests.hf.tiny import batch, gradients, tiny

pytestmark = [pytest.mark.trl, pytest.mark.slow, pytest.mark.usefixtures("native_cpu")]
B, T, V = 3, 9, 37
CASES: dict[str, dict[str, Any]] = {
    "mean": {},
    "int": {"num_items_in_batch": 41},
    "tensor": {"num_items_in_batch": torch.tensor(41)},
    "float tensor": {"num_items_in_batch": torch.tensor(12.5)},
    "other ignore_index": {"ignore_index": 5},
    "shift_labels": {"shift_labels": torch.arange(B * T).view(B, T) % V, "labels": None},
    "flat shift_labels": {"shift_labels": torch.arange(B * T) % V, "labels": None},
    "unknown options": {"cache_position": 3},
}


def labels() -> Tensor:
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
    ids[0, :4] = -100
    ids[2] = -100
    return ids


def value_and_gradient(function: Any, logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = function(leaf, options.pop("labels", labels()), V, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_transformers(case: str, dtype: torch.dtype) -> None:
    options = dict(CASES[case])
    if case == "other ignore_index":
        options["labels"] = labels().clamp(min=0)
    logits = (torch.randn(B, T, V) * 4).to(dtype)
    ours = value_and_gradient(causal_lm_loss, logits, **options)
    theirs = value_and_gradient(ForCausalLMLoss, logits, **options)
    assert ours[0].dtype == theirs[0].dtype == torch.float32
    assert ours[1].dtype == theirs[1].dtype == dtype
    torch.testing.assert_close(ours[0], theirs[0])
    reference = logits.double().requires_grad_()
    rows = options.get("shift_labels")
    ignore = options.get("ignore_index", -100)
    if rows is None:
        rows = torch.nn.functional.pad(options.get("labels", labels())[:, 1:], (0, 1), value=ignore)
    total = torch.nn.functional.cross_entropy(
        reference.flatten(0, 1), rows.flatten(), ignore_index=ignore, reduction="sum"
    )
    exact = total / options.get("num_items_in_batch", (rows != ignore).sum())
    (gradient,) = torch.autograd.grad(exact, reference)
    eager = value_and_gradient(ForCausalLMLoss, logits.float(), **options)[1]
    if dtype == torch.float64:  # transformers rounds these to float32; this does not
        torch.testing.assert_close(ours[1], gradient, rtol=0.0, atol=1e-13)
    else:
        assert_as_accurate(ours[1], gradient, eager)


def test_rows_without_a_label_reach_nothing() -> None:
    logits = torch.randn(B, T, V)
    logits[2] = torch.nan
    logits[:, -1] = torch.inf
    loss, gradient = value_and_gradient(causal_lm_loss, logits)
    assert loss.isfinite()
    assert (gradient[2] == 0).all()
    assert (gradient[:, -1] == 0).all()
    assert gradient.isfinite().all()


def test_no_label_at_all_gives_zero() -> None:
    loss, gradient = value_and_gradient(causal_lm_loss, torch.randn(B, T, V), labels=torch.full((B, T), -100))
    assert loss == 0
    assert (gradient == 0).all()


def test_as_the_loss_function_of_a_model() -> None:
    results = []
    for function in (None, causal_lm_loss):
        model = tiny("llama")
        if function is not None:
            model.loss_function = function
        output = model(**batch(), num_items_in_batch=torch.tensor(20))
        output.loss.backward()
        results.append((output.loss.detach(), gradients(model)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vocab_size": V + 1}, ValueError, "vocab_size = 38"),
        ({"labels": None}, TypeError, "labels must be a torch.Tensor, got NoneType"),
        ({"labels": torch.zeros(B, T)}, TypeError, "labels must have dtype int64"),
        ({"labels": torch.zeros(B, T - 1, dtype=torch.long)}, ValueError, r"labels must have shape \[3, 9\]"),
        ({"labels": torch.full((B, T), V)}, ValueError, "token_ids"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int"),
    ],
)
def test_faults(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"labels": labels(), "vocab_size": V, **options}
    with pytest.raises(error, match=message):
        causal_lm_loss(torch.randn(B, T, V), **arguments)
