"""Liger 0.8.5's Triton loss beside ours, by Triton's interpreter, where it is installed and right."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels.integrations import liger
from python_tests import liger_problems as problems
from python_tests.liger_problems import LOSS_TYPES, Problem

pytest.importorskip("liger_kernel", reason="needs liger-kernel 0.8.5")
if importlib.metadata.version("liger_kernel") != "0.8.5":
    pytest.skip("needs liger-kernel 0.8.5", allow_module_level=True)

pytestmark = [pytest.mark.interpreter, pytest.mark.slow, pytest.mark.usefixtures("native_cpu")]


def results(function: Any, p: Problem, o: dict[str, Any], reduce: bool) -> list[Tensor]:
    """What it returns, and the gradient of the logits."""
    names = {"epsilon_low": "eps_low", "epsilon_high": "eps_high"}
    options = {names.get(k, k): v for k, v in o.items() if k not in ("ratio", "off_policy")}
    logits = problems.logits_of(p).nan_to_num(posinf=0.0).detach().requires_grad_()
    loss, *others = function(
        logits, p["old"] if o["off_policy"] else None, p["ref"], p["ids"], p["advantages"], p["mask"].float(),
        vllm_is_ratio=None if o["ratio"] is None else p[o["ratio"]], inplace=False, reduce=reduce, **options,
    )  # fmt: skip
    metrics = others[0] if reduce else [other for other in others if other is not None]
    return [loss.detach(), *metrics, torch.autograd.grad(loss, logits, p["token"] if not reduce else None)[0]]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_triton_loss(loss_type: str) -> None:
    """Where a delta within the clip range holds the ratio of A < 0, Liger's kernel drops a gradient: not compared. Nor
    are reduced losses of LUSPO."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    for seed, o in enumerate(problems.cases(loss_type, step=31)):
        if o["delta"] == 1.1:
            continue
        p = problems.problem(seed)
        p["token"] = torch.where(p["mask"], p["token"], 1.0)
        p = {k: v.float() if v.is_floating_point() else v for k, v in p.items()}
        for reduce in (False,) if loss_type == "luspo" else (False, True):
            ours, theirs = (results(f, p, o, reduce) for f in (liger.triton_grpo_loss, triton_grpo_loss))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_log_probs() -> None:
    from liger_kernel.transformers.grpo_loss import fused_selective_log_softmax

    p = problems.problem(0)
    logits = problems.logits_of(p).float().nan_to_num(posinf=0.0)
    ids, mask = (torch.cat([p[name], p[name]], 1) for name in ("ids", "mask"))
    values = [f(logits, ids, 0.8, mask) for f in (liger.fused_selective_log_softmax, fused_selective_log_softmax)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
