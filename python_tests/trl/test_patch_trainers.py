"""TRL's other trainers, patched: what they log and the weights that they leave are those of stock TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("trl", reason="needs TRL")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from grpo_kernels.integrations.trl import logits
from python_tests.trl import tiny
from python_tests.trl.runs import assert_equal_runs, compare, run

pytestmark = [pytest.mark.trl, pytest.mark.slow, pytest.mark.usefixtures("native_cpu")]

SFT: dict[str, dict[str, Any]] = {
    "completions": {"gradient_accumulation_steps": 2},
    "packed": {"packing": True, "max_length": 32, "completion_only_loss": False},
    "dft": {"loss_type": "dft"},
}
DPO: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "weighted": {"use_weighting": True},
    "sft_ipo": {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]},
}


def unpaired() -> Dataset:
    data = tiny.preferences(16)
    texts = [*data["chosen"], *data["rejected"]]
    return Dataset.from_dict(
        {"prompt": [*data["prompt"], *data["prompt"]], "completion": texts, "label": [True] * 16 + [False] * 16}
    )


@pytest.mark.parametrize("name", SFT)
def test_sft(name: str, model_folder: str, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 3, **SFT[name]}
    ours = compare(
        SFTTrainer, SFTConfig, model_folder, tmp_path, data=tiny.completions(), eval_data=tiny.completions(6), **options
    )
    assert {"entropy", "mean_token_accuracy", "grad_norm"} <= ours.history[0].keys()


@pytest.mark.parametrize("name", DPO)
def test_dpo(name: str, model_folder: str, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 4, **DPO[name]}
    ours = compare(DPOTrainer, DPOConfig, model_folder, tmp_path, data=tiny.preferences(), **options)
    assert {"logits/chosen", "entropy", "mean_token_accuracy"} <= ours.history[0].keys()


def test_rloo(model_folder: str, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6, "beta": 0.05}
    data = {"data": tiny.prompts(), "rewards": tiny.digit_reward}
    ours = compare(RLOOTrainer, RLOOConfig, model_folder, tmp_path, **data, **options)
    assert any(step["kl"] > 0 for step in ours.history[:-1])


def test_kto(model_folder: str, tmp_path: Path) -> None:
    compare(KTOTrainer, KTOConfig, model_folder, tmp_path, data=unpaired(), per_device_train_batch_size=4)


@pytest.mark.parametrize(
    ("trainer", "config", "name"),
    [
        (ORPOTrainer, ORPOConfig, "selective_log_softmax"),
        (TPOTrainer, TPOConfig, "selective_log_softmax_and_entropy"),
    ],
)
def test_trainers_on_logits(trainer: type, config: type, name: str, model_folder: str, tmp_path: Path) -> None:
    """They imported the function before the patch."""
    data = tiny.preferences()
    if trainer is TPOTrainer:
        data = data.add_column("reference", data["chosen"])
    options = {"per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.5, "max_steps": 2}

    def make() -> Any:
        return trainer(
            model=model_folder,
            args=tiny.arguments(config, tmp_path, **options),
            train_dataset=data,
            processing_class=tiny.make_tokenizer(),
        )

    stock = run(make, patch=False)
    with mock.patch.object(logits, "token_log_probs", wraps=logits.token_log_probs) as calls:
        ours = run(make, patch=True)
    assert_equal_runs(ours, stock)
    assert calls.call_count > 0
