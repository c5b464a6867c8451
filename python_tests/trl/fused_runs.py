"""The same training by FusedGRPOTrainer, by TRL's, and by TRL's in float64. A program for one process of several."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from trl import GRPOTrainer

from grpo_kernels.integrations.trl import FusedGRPOTrainer
from grpo_kernels.testing import assert_as_accurate
from python_tests.trl.fused_problems import PlainTrainer, trainer

TRAINERS = {"fused": FusedGRPOTrainer, "exact": PlainTrainer, "stock": GRPOTrainer}
_TIMES = ("runtime", "per_second", "step_time")


class Run(NamedTuple):
    history: list[dict[str, float]]  # what is logged at each step, without times
    weights: Tensor


def train(kind: str, model: Any, peft_config: Any = None, **options: Any) -> Run:
    """Three steps of SGD, which does not enlarge the rounding of a gradient as Adam does."""
    defaults = {
        "optim": "sgd",
        "learning_rate": 0.05,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": None,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
    }
    made = trainer(TRAINERS[kind], model, peft_config, **{**defaults, **options})
    if kind == "exact":
        made.model.double()
        if made.ref_model is not None:
            made.ref_model.double()
    with _sampling_in_float32():
        made.train()
    history = [
        {key: value for key, value in logs.items() if not key.endswith(_TIMES)} for logs in made.state.log_history
    ]
    parameters = [value for value in made.model.parameters() if value.requires_grad]
    return Run(history, torch.cat([value.detach().flatten() for value in parameters]))


@contextmanager
def _sampling_in_float32() -> Iterator[None]:
    """Draws of float64 are others."""
    multinomial = torch.multinomial
    with mock.patch.object(torch, "multinomial", lambda probs, *args, **kw: multinomial(probs.float(), *args, **kw)):
        yield


def assert_same_training(fused: Run, exact: Run, stock: Run) -> None:
    """In all that is logged, and in the weights."""
    for one, other, third in zip(fused.history, exact.history, stock.history, strict=True):
        assert set(one) == set(other) == set(third)
    values = [_scaled(run.history, exact.history) for run in (fused, exact, stock)]
    assert values[1].isfinite().all()
    assert_as_accurate(values[0].float(), values[1], values[2].float(), name="logs")
    assert_as_accurate(fused.weights, exact.weights, stock.weights, name="weights")


def _scaled(history: list[dict[str, float]], scale: list[dict[str, float]]) -> Tensor:
    """All logged numbers, each by the largest of its name."""
    largest: dict[str, float] = {}
    for logs in scale:
        for key, value in logs.items():
            largest[key] = max(largest.get(key, 1e-30), abs(value))
    numbers = [logs[key] / largest[key] for logs in history for key in sorted(logs)]
    return torch.tensor(numbers, dtype=torch.float64)


def main(rank: int, world: int, folder: Path, model: str, options: dict[str, Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # accelerate asks for them; the file is what counts
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
    runs = [train(kind, model, **options) for kind in TRAINERS]
    assert runs[0].history[0]["num_tokens"] > 0
    assert_same_training(*runs)
    (folder / f"history{rank}.json").write_text(json.dumps([run.history for run in runs]))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5]))
