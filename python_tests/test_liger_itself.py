"""Liger 0.8.5's own losses beside ours, where it is installed and right: its chunked torch path runs on a CPU."""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels.integrations import liger
from python_tests import liger_problems as problems
from python_tests.liger_problems import LOSS_TYPES, TEMPERATURE, Problem

pytest.importorskip("liger_kernel", reason="needs liger-kernel 0.8.5")
if importlib.metadata.version("liger_kernel") != "0.8.5":
    pytest.skip("needs liger-kernel 0.8.5", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("native_cpu")]


def results(loss_class: Any, p: Problem, o: dict[str, Any]) -> list[Tensor]:
    """Loss, metrics and gradients."""
    options = {k: v for k, v in o.items() if k not in ("ratio", "off_policy", "num_items_in_batch")}
    loss_fn = loss_class(temperature=TEMPERATURE, compiled=False, use_ref_model=o["beta"] != 0, **options)
    leaves = [p[name].detach().clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    loss, metrics = loss_fn(
        leaves[0], leaves[1], p["ids"], p["mask"].float(), p["advantages"], leaves[2], p["ref"],
        p["old"] if o["off_policy"] else None, vllm_is_ratio=None if o["ratio"] is None else p[o["ratio"]],
        num_items_in_batch=o["num_items_in_batch"],
    )  # fmt: skip
    return [loss.detach(), *metrics, *torch.autograd.grad(loss, leaves, torch.full_like(loss, -1.7))]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_chunked_loss(loss_type: str) -> None:
    """Without padding for LUSPO, whose mean Liger takes over padded positions; elsewhere ratios of masked tokens are
    1, which VESPO's weight counts there."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    for seed, o in enumerate(problems.cases(loss_type, step=5)):
        p = problems.problem(seed, (6, 6, 6) if loss_type == "luspo" else problems.LENGTHS)
        p["token"] = torch.where(p["mask"], p["token"], 1.0)
        p = {k: v.float() if v.is_floating_point() else v for k, v in p.items()}
        ours, theirs = (results(kind, p, o) for kind in (liger.LigerFusedLinearGRPOLoss, LigerFusedLinearGRPOLoss))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)


def test_scaled_cross_entropy() -> None:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    hidden, weight = torch.randn(9, 8), torch.randn(17, 8)
    target, upstream = torch.tensor([3, -100, 0, 16, 4, 3, 1, 11, 7]), tuple(torch.randn(2, 9))
    values = []
    for function in (liger.LigerFusedLinearScaledCrossEntropyFunction, LigerFusedLinearScaledCrossEntropyFunction):
        leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
        outputs = function.apply(*leaves, target, 0.7, return_entropy=True)
        values.append([*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, upstream)])
    torch.testing.assert_close(*values, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("liger_kernel.chunked_loss", ["LigerFusedLinearGRPOLoss", "LigerFusedLinearGRPOLoss.forward"]),
        ("liger_kernel.transformers.grpo_loss", ["triton_grpo_loss", "fused_selective_log_softmax"]),
        (
            "liger_kernel.transformers.fused_linear_cross_entropy",
            ["LigerFusedLinearCrossEntropyLoss", "LigerFusedLinearCrossEntropyLoss.forward"],
        ),
        (
            "liger_kernel.ops.fused_linear_scaled_cross_entropy",
            ["LigerFusedLinearScaledCrossEntropyFunction.apply", "LigerFusedLinearScaledCrossEntropyTPFunction.apply"],
        ),
    ],
)
def test_signatures(module: str, names: list[str]) -> None:
    """Parameters and defaults, in order."""
    theirs = importlib.import_module(module)
    for name in names:
        signatures = []
        for owner in (liger, theirs):
            value: Any = owner
            for part in name.split("."):
                value = getattr(value, part)
            signatures.append([(p.name, p.default) for p in inspect.signature(value).parameters.values()])
        assert signatures[0] == signatures[1], name
