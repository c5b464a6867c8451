"""One way of training, in a process of its own: what it took and what it logged, as JSON."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import psutil
import torch
from trl import GRPOConfig, GRPOTrainer

from examples.trl import task
from examples.trl.settings import Settings
from grpo_kernels.integrations.trl import FusedGRPOTrainer, patch

_ITERATIONS = 2  # steps on the samples of one generation
_MEGABYTE = 1 << 20


def _timed(trainer_class: type) -> type:
    """The trainer, with the seconds of each step's loss and gradients beside those of the whole step."""

    class Timed(trainer_class):  # type: ignore[misc]
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.seconds: list[tuple[float, float]] = []

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            start = perf_counter()
            self.prepared = start
            result = super().training_step(model, inputs, num_items_in_batch)
            end = perf_counter()
            self.seconds.append((end - start, end - self.prepared))
            return result

        def _prepare_inputs(self, generation_batch: Any) -> Any:
            result = super()._prepare_inputs(generation_batch)
            self.prepared = perf_counter()
            return result

    return Timed


def _train(way: str, model: Any, vocab: int, reward: Callable[..., list[float]], **options: Any) -> Any:
    trainer_class = _timed(FusedGRPOTrainer if way == "fused" else GRPOTrainer)
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1, seed=1,
            disable_tqdm=True, num_generations=8, lr_scheduler_type="constant", **options,
        )  # fmt: skip
        trainer = trainer_class(
            model=model, reward_funcs=reward, args=arguments, train_dataset=task.make_prompts(),
            processing_class=task.make_tokenizer(vocab),
        )  # fmt: skip
        trainer.train()
    return trainer


def time_steps(way: str, settings: Settings) -> dict[str, Any]:
    """A few steps of a model with a large vocabulary: seconds, memory, losses."""
    model = task.make_model(settings.vocab, settings.width)
    before = psutil.Process().memory_info().rss
    trainer = _train(
        way, model, settings.vocab, task.early_word_reward, max_steps=settings.steps, num_iterations=_ITERATIONS,
        per_device_train_batch_size=settings.samples, max_completion_length=settings.tokens, learning_rate=1.0,
        optim="sgd",
    )  # fmt: skip
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": fmean(whole for whole, _ in trainer.seconds[1:]),
        "loss_seconds": fmean(loss for _, loss in trainer.seconds[1:]),
        "megabytes": (_highest_memory() - before) / _MEGABYTE,
        "losses": [entry["loss"] for entry in logs],
        "gradient_norms": [entry["grad_norm"] for entry in logs],
    }


def learn(way: str, settings: Settings) -> list[float]:
    """Mean reward of the samples of each step, while a small model learns to write digits."""
    vocab = 64
    trainer = _train(
        way, task.make_model(vocab, 48), vocab, task.digit_reward, max_steps=settings.learning_steps,
        per_device_train_batch_size=64, max_completion_length=8, learning_rate=5e-3,
    )  # fmt: skip
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


def _highest_memory() -> int:
    """Bytes of the resident set at its largest."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run(way: str, settings: Settings) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    if way == "patched":
        patch()
    return {**time_steps(way, settings), "rewards": learn(way, settings)}


def main() -> None:
    way, settings, result = sys.argv[1:]
    Path(result).write_text(json.dumps(run(way, Settings(**json.loads(settings)))))


if __name__ == "__main__":
    main()
