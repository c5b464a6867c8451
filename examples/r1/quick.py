"""A shorter run: the same stages in less than a minute, with fewer steps and smaller batches."""

from __future__ import annotations

from typing import Any

QUICK: dict[str, Any] = {
    "cold_start_steps": 110,
    "reward_model_steps": 50,
    "rejection_sampling_steps": 120,
    "reasoning_rl_steps": 45,
    "diverse_rl_steps": 12,
    "prompts": 16,
    "dynamic_sampling": 1,
    "rejection_prompts": 300,
    "evaluate_every": 40,
    "evaluation_prompts": 128,
}
"""Defaults that `--quick` changes."""
