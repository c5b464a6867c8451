"""Metrics of grpo_loss over ranks."""

from __future__ import annotations

import torch

import grpo_kernels
from python_tests.distributed import launch
from python_tests.samples.grpo_loss import batch, call, config_of


def _metrics(rows: slice) -> grpo_kernels.GRPOMetrics:
    inputs = {name: None if value is None else value[rows] for name, value in batch("off_policy").items()}
    with grpo_kernels.backend("reference"):
        return call(inputs, config_of("off_policy", "token_mean")).metrics


def _reduced(rank: int, world: int) -> torch.Tensor:
    return _metrics((slice(0, 3), slice(3, 5))[rank]).all_reduce().values


def test_reduced_metrics_are_those_of_the_whole_batch() -> None:
    for values in launch.run(2, _reduced):
        torch.testing.assert_close(values, _metrics(slice(None)).values)
