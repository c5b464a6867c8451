"""Short runs of TRL's trainers, as they are and patched, compared step by step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from grpo_kernels.integrations.trl import head, patched
from python_tests.trl import tiny

TIMES = ("step_time", "_runtime", "_per_second")


class Run(NamedTuple):
    """What a run leaves."""

    history: list[dict[str, Any]]  # everything that was logged, step by step, but times
    weights: dict[str, Tensor]
    kernel_calls: int
    stock_calls: int


def run(make: Callable[[], Any], patch: bool) -> Run:
    """Trains what `make` builds, under the patch or without it."""
    kernels = mock.patch.object(head, "linear_token_log_probs", wraps=head.linear_token_log_probs)
    stock = mock.patch.object(ChunkedLogProbFunction, "apply", wraps=ChunkedLogProbFunction.apply)
    with kernels as kernel_calls, stock as stock_calls, patched() if patch else nullcontext():
        trainer = make()
        trainer.train()
    history = [{k: v for k, v in step.items() if not k.endswith(TIMES)} for step in trainer.state.log_history]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return Run(history, weights, kernel_calls.call_count, stock_calls.call_count)


def assert_equal_runs(ours: Run, stock: Run) -> None:
    """Equal within float32's rounding, step by step, in all that was logged, and in the weights at the end."""
    assert len(ours.history) == len(stock.history)
    for step, (own, expected) in enumerate(zip(ours.history, stock.history, strict=True)):
        assert own.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                torch.tensor(own[name]), torch.tensor(value), msg=lambda text, n=name, s=step: f"step {s}, {n}: {text}"
            )
    for name, weight in stock.weights.items():
        torch.testing.assert_close(ours.weights[name], weight, msg=lambda text, n=name: f"{n}: {text}")


def compare(trainer: type, config: type, model: str, folder: Path, **options: Any) -> Run:
    """Runs a trainer both ways from the same start. `options` are those of its configuration; `data`, `rewards`,
    and `eval_data` go to the trainer. Returns the patched run."""
    extra: dict[str, Any] = {"train_dataset": options.pop("data")}
    if "eval_data" in options:
        extra["eval_dataset"] = options.pop("eval_data")
    if "rewards" in options:
        extra["reward_funcs"] = options.pop("rewards")
    defaults = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant"}
    arguments = tiny.arguments(config, folder, **{**defaults, **options})

    def make() -> Any:
        return trainer(model=model, args=arguments, processing_class=tiny.make_tokenizer(), **extra)

    stock, ours = run(make, patch=False), run(make, patch=True)
    assert_equal_runs(ours, stock)
    assert (stock.kernel_calls, ours.stock_calls) == (0, 0)
    assert ours.kernel_calls == stock.stock_calls > 0
    return ours
