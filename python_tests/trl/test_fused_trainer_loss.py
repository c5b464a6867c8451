"""FusedGRPOTrainer: losses, gradients and logged metrics of single calls against TRL's own loss in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="needs TRL")

from grpo_kernels.testing import assert_as_accurate
from python_tests.trl.fused_problems import CASES, Found, evaluate

pytestmark = [pytest.mark.trl, pytest.mark.slow]


def three(name: str) -> tuple[Found, Found, Found]:
    return evaluate(name, "fused"), evaluate(name, "exact"), evaluate(name, "eager")


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_trls_loss(name: str) -> None:
    actual, exact, eager = three(name)
    if CASES[name].masked:
        assert torch.count_nonzero(exact.gradient) == 0
    else:
        assert exact.gradient.abs().max() > 1e-3
    assert_as_accurate(actual.gradient, exact.gradient, eager.gradient)


def test_losses_and_metrics_are_those_of_trls_loss() -> None:
    """All cases together, each on its own scale: few numbers have no stable error of their own."""
    columns: dict[str, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
    for name in CASES:
        found = three(name)
        assert len({frozenset(one.metrics) for one in found}) == 1, name
        for key in ("loss", *found[0].metrics):
            values = [(one.losses if key == "loss" else one.metrics[key]).double() for one in found]
            scale = values[1].nan_to_num(nan=0.0).abs().max().clamp(min=1e-30)
            for column, value in zip(columns.setdefault(key, ([], [], [])), values, strict=True):
                column.append(value / scale)
    assert set(columns) == {
        "loss", "entropy", "kl", "policy_loss", "entropy_coef", "clip_ratio/low_mean", "clip_ratio/high_mean",
        "clip_ratio/region_mean", "clip_ratio/low_min", "clip_ratio/high_max", "cispo_clip_ratio",
        "vespo/phi_seq_mean",
    }  # fmt: skip
    for key, column in columns.items():
        actual, exact, eager = (torch.cat(values) for values in column)
        assert exact.nan_to_num(nan=0.0).abs().max() == 1.0, key
        assert_as_accurate(actual.float(), exact, eager.float(), name=key)
