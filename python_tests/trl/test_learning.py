"""A policy learns to write digits: TRL's GRPOTrainer on the kernels, and FusedGRPOTrainer."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL")

from trl import GRPOConfig, GRPOTrainer

from grpo_kernels.integrations.trl import FusedGRPOTrainer, patched
from python_tests.trl import tiny

pytestmark = [pytest.mark.trl, pytest.mark.slow]


@pytest.mark.parametrize("fused", [False, True], ids=["patched", "fused"])
def test_the_reward_rises(fused: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    arguments = tiny.arguments(
        GRPOConfig,
        tmp_path,
        max_steps=40,
        learning_rate=5e-3,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=8,
    )
    with contextlib.nullcontext() if fused else patched():
        trainer = (FusedGRPOTrainer if fused else GRPOTrainer)(
            model=tiny.make_model(),
            reward_funcs=tiny.digit_reward,
            args=arguments,
            train_dataset=tiny.prompts(),
            processing_class=tiny.make_tokenizer(),
        )
        trainer.train()
    rewards = [logs["reward"] for logs in trainer.state.log_history if "reward" in logs]
    assert rewards[0] < 0.4
    assert rewards[-1] > 0.9
