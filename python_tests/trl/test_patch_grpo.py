"""TRL's GRPOTrainer, patched: loss, KL, gradient norm, metrics and weights are those of stock TRL, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs TRL")

from trl import GRPOConfig, GRPOTrainer

from python_tests.trl import tiny
from python_tests.trl.runs import compare

pytestmark = [pytest.mark.trl, pytest.mark.slow]

KL = {"beta": 0.05, "use_bias_correction_kl": True}
PLAIN_KL = {"beta": 0.05, "use_bias_correction_kl": False}
RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", **KL},
    "bnpo": {"loss_type": "bnpo", "mask_truncated_completions": True, "max_completion_length": 20, **PLAIN_KL},
    "dr_grpo": {"loss_type": "dr_grpo", "importance_sampling_level": "sequence", "scale_rewards": "none", **KL},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "top_entropy_quantile": 0.4, **PLAIN_KL},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "entropy_coef": 0.02},
    "sapo": {"loss_type": "sapo", "temperature": 0.7, **KL},
    "vespo": {"loss_type": "vespo", "entropy_coef": 0.01, "top_entropy_quantile": 0.5},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", **PLAIN_KL},
    "luspo_token": {"loss_type": "luspo", "mask_truncated_completions": True, "max_completion_length": 20},
    "two_sided": {"loss_type": "grpo", "delta": 1.5, "epsilon": 0.02, "num_iterations": 3},
    "gspo_masked": {"importance_sampling_level": "sequence", "epsilon": 3e-3, "off_policy_mask_threshold": 0.01},
    "adaptive_entropy": {"use_adaptive_entropy": True, "entropy_target": 3.85, "entropy_coef": 0.01},
    "fp32_head": {"cast_lm_head_to_fp32": True, "temperature": 1.3, **KL},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "num_iterations": 1},
}


@pytest.mark.parametrize("name", RUNS)
def test_step_by_step_as_stock(name: str, model_folder: str, tmp_path: Path, native_cpu: None) -> None:
    defaults = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "num_iterations": 2,
        "max_completion_length": 6,
    }
    options = {**defaults, **RUNS[name]}
    data = {"data": tiny.prompts(), "rewards": tiny.digit_reward}
    ours = compare(GRPOTrainer, GRPOConfig, model_folder, tmp_path, **data, **options)
    steps = ours.history[:-1]
    assert any(step["grad_norm"] > 0 for step in steps)
    assert any(abs(step["loss"]) > 1e-3 for step in steps)
    assert "beta" not in options or any(step["kl"] > 0 for step in steps)
