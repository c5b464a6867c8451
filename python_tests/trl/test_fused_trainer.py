"""FusedGRPOTrainer as a trainer: whole runs, several processes, adapters, what it refuses, other versions of TRL."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("trl", reason="needs TRL")

import transformers
from trl import GRPOTrainer

from grpo_kernels import linear_grpo_loss, linear_token_log_probs
from grpo_kernels.integrations.trl import FusedGRPOTrainer, IncompatibleVersion
from grpo_kernels.integrations.trl.forward import add_head_function, logit_transform
from grpo_kernels.integrations.trl.support import check_trainer, check_trl
from grpo_kernels.testing import assert_as_accurate
from python_tests.trl import tiny
from python_tests.trl.fused_problems import CASES, PlainTrainer, make_inputs, trainer
from python_tests.trl.fused_runs import TRAINERS, assert_same_training, train

pytestmark = [pytest.mark.trl, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
RUNS: dict[str, dict[str, Any]] = {
    "reference_model": {
        "loss_type": "grpo", "beta": 0.05, "num_iterations": 2, "eval_strategy": "steps", "eval_steps": 2,
    },
    "accumulation": {
        "gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4,
        "mask_truncated_completions": True, "entropy_coef": 0.01, "logging_steps": 2, "max_steps": 4, "epsilon": 1e-4,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_trls_trainer(name: str, model_folder: str) -> None:
    fused, exact, stock = (train(kind, model_folder, **RUNS[name]) for kind in TRAINERS)
    assert_same_training(fused, exact, stock)
    assert any("eval_entropy" in logs for logs in fused.history) == (name == "reference_model")
    clipped = [logs["clip_ratio/region_mean"] for logs in fused.history if "clip_ratio/region_mean" in logs]
    assert max(clipped) > 0.0


def test_a_run_with_adapters_is_that_of_trls_trainer(model_folder: str) -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    runs = []
    for kind in TRAINERS:
        torch.manual_seed(0)
        runs.append(train(kind, model_folder, config, beta=0.05, num_iterations=2))
    assert_same_training(*runs)


def test_two_processes_train_as_trls_trainer_does(tmp_path: Path, model_folder: str) -> None:
    """The gradient goes through DDP, the metrics are those of both."""
    options = {"per_device_train_batch_size": 4, "num_iterations": 2, "entropy_coef": 0.01, "max_steps": 2}
    command = [sys.executable, "-m", "python_tests.trl.fused_runs"]
    arguments = ["2", str(tmp_path), model_folder, json.dumps(options)]
    processes = [subprocess.Popen([*command, str(rank), *arguments], cwd=ROOT) for rank in range(2)]
    try:
        assert [process.wait(280) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    first, second = (json.loads((tmp_path / f"history{rank}.json").read_text()) for rank in range(2))
    assert first == second


@pytest.mark.parametrize("name", ["dapo", "luspo-sequence"])
def test_autocast(name: str) -> None:
    inputs = {
        dtype: make_inputs(CASES[name]._replace(options={}), 0, dtype) for dtype in (torch.float32, torch.float64)
    }
    results = []
    for cls, dtype in ((FusedGRPOTrainer, torch.float32), (PlainTrainer, torch.float64), (PlainTrainer, torch.float32)):
        made = trainer(cls, tiny.make_model(), loss_type=name.split("-")[0])
        made.model.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss = made._compute_loss(made.model, inputs[dtype])
        gradient = torch.autograd.grad(loss, list(made.model.parameters()))
        results.append(torch.cat([value.flatten() for value in gradient]))
    assert results[0].dtype == torch.float32
    assert_as_accurate(*results, name="gradient")


@pytest.mark.parametrize(("name", "passes"), [("dapo", 1), ("grpo-sequence", 1), ("vespo", 1), ("quantile", 2)])
def test_passes_over_the_head(name: str, passes: int, monkeypatch: pytest.MonkeyPatch, native_cpu: None) -> None:
    outputs = []

    def recorded(*args: Any, **options: Any) -> Any:
        outputs.append(linear_grpo_loss(*args, **options))
        return outputs[-1]

    monkeypatch.setattr("grpo_kernels.integrations.trl.trainer.linear_grpo_loss", recorded)
    case = CASES[name]
    made = trainer(FusedGRPOTrainer, tiny.make_model(), **{**case.options, "beta": 0.0})
    made._compute_loss(made.model, make_inputs(case, 0, torch.float32)).backward()
    assert [output.metrics.passes for output in outputs] == [passes]


REFUSED = {
    "cast_lm_head_to_fp32": {"cast_lm_head_to_fp32": True},
    "use_adaptive_entropy": {"use_adaptive_entropy": True},
    "delta": {"delta": 1.2},
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_is_not_served_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"FusedGRPOTrainer: {name}=.* is not served: .*patch\(\)"):
        trainer(FusedGRPOTrainer, tiny.make_model(), **REFUSED[name])


def test_a_loss_of_routers_is_refused() -> None:
    config = transformers.MixtralConfig(
        vocab_size=48, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, router_aux_loss_coef=0.01,
    )  # fmt: skip
    with pytest.raises(ValueError, match="FusedGRPOTrainer: router_aux_loss_coef is not served"):
        trainer(FusedGRPOTrainer, transformers.MixtralForCausalLM(config))


class _OtherLinear(nn.Linear):
    pass


def test_what_comes_from_outside_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(FusedGRPOTrainer, tiny.make_model())
    check_trainer(made)

    def refuses(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            check_trainer(made)

    with monkeypatch.context() as patch:
        patch.setattr(made.args, "use_liger_kernel", True)
        refuses("use_liger_kernel=True is not served")
    with monkeypatch.context() as patch:
        patch.setattr(made.args, "torch_compile", True)
        refuses("torch_compile=True is not served")
    with monkeypatch.context() as patch:
        patch.setattr(made, "_is_vlm", True)
        refuses("a processor of images is not served")
    with monkeypatch.context() as patch:
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
        patch.setattr(made, "accelerator", SimpleNamespace(state=state, num_processes=2))
        refuses("ZeRO stage 3 is not served")
        patch.setattr(made.args, "top_entropy_quantile", 0.2)
        refuses("top_entropy_quantile=0.2 is not served")
    with monkeypatch.context() as patch:
        patch.setattr(made.model, "peft_config", {"a": SimpleNamespace(is_prompt_learning=True)}, raising=False)
        refuses("prompt learning is not served")
    made.model.lm_head = _OtherLinear(48, 48)
    refuses("a head of class _OtherLinear is not served")


def test_another_trl_is_refused() -> None:
    check_trl(GRPOTrainer)

    class Newer(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            return super()._compute_loss(model, inputs) * self.args.new_option + inputs["weights"].sum()

    with pytest.raises(IncompatibleVersion, match=r"it reads inputs\.weights, self\.args\.new_option; use"):
        check_trl(Newer)

    class Renamed(GRPOTrainer):
        def _compute_loss(self, model: Any, batch: Any) -> Any:
            return super()._compute_loss(model, batch)

    with pytest.raises(IncompatibleVersion, match=r"GRPOTrainer._compute_loss must take \(self, model, inputs\)"):
        check_trl(Renamed)


SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0),
    "cohere": transformers.CohereConfig(**SIZES, logit_scale=0.3),
    "granite": transformers.GraniteConfig(**SIZES, logits_scaling=4.0),
    "phi": transformers.PhiConfig(**SIZES),  # its head has a bias
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_does_to_its_logits_is_done(family: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    ids = torch.randint(3, 40, (2, 6))
    before = inspect.signature(model.forward)
    logits = model(input_ids=ids).logits
    add_head_function(model)
    assert inspect.signature(model.forward) == before
    assert torch.equal(model(input_ids=ids).logits, logits)

    def score(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        transform = logit_transform(model.config)._asdict()
        return linear_token_log_probs(hidden, weight, ids, bias=bias, **transform).log_probs

    expected = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    actual = model(input_ids=ids, head_function=score)
    assert_as_accurate(actual, expected, expected)
