"""A shorter run: the same stages in less than a minute, with fewer steps and smaller batches."""

from __future__ import annotations

from typing import Any

QUICK: dict[str, Any] = {
    "cold_start_steps": 120,
    "reward_model_steps": 60,
    "rejection_sampling_steps": 140,
    "reasoning_rl_steps": 50,
    "diverse_rl_steps": 20,
    "prompts": 16,
    "dynamic_sampling": 1,
    "rejection_prompts": 400,
    "evaluate_every": 20,
    "evaluation_prompts": 128,
}
"""Defaults that `--quick` changes."""
