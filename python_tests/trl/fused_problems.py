"""One loss call of FusedGRPOTrainer, of TRL's trainer on plain logits in float64, and of the same in float32."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from grpo_kernels.integrations.trl import FusedGRPOTrainer
from python_tests.trl import tiny

BATCH, PROMPT, LENGTH = 5, 4, 7
BATCHES = 3
ACCUMULATION = 3

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")
VLLM = ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate")


class Case(NamedTuple):
    """Options of GRPOConfig, and what else the inputs hold."""

    options: dict[str, Any]
    on_policy: bool = False
    token_advantages: bool = False
    tools: bool = False
    sampler: bool = False  # log-probs of the sampler, NaN where it reported none
    vllm: str = ""  # mode of its importance sampling correction
    masked: bool = False  # no token counts
    negative: bool = False  # all advantages
    evaluation: bool = False


def _cases() -> dict[str, Case]:
    cases = {}
    for loss_type in LOSS_TYPES:
        options = {"loss_type": loss_type, "beta": 0.04, "epsilon_high": 1.2 if loss_type == "cispo" else None}
        cases[loss_type] = Case(options, tools=loss_type in ("grpo", "dapo"))
        cases[f"{loss_type}-sequence"] = Case({**options, "importance_sampling_level": "sequence"})
    long = {"delta": 1.4, "epsilon": 0.15, "epsilon_high": 0.28}
    cases |= {
        "on_policy": Case({}, on_policy=True),
        "on_policy-sequence": Case({"loss_type": "grpo", "importance_sampling_level": "sequence"}, on_policy=True),
        "delta": Case(long),
        "delta-grpo": Case({**long, "loss_type": "grpo"}),
        "clipped": Case({"epsilon": 0.001}, negative=True),
        "plain_kl": Case({"beta": 0.1, "use_bias_correction_kl": False}),
        "entropy": Case({"entropy_coef": 0.05}),
        "entropy-grpo": Case({"entropy_coef": 0.05, "loss_type": "grpo", "beta": 0.1}),
        "quantile": Case({"top_entropy_quantile": 0.37, "beta": 0.1}),
        "quantile-entropy": Case({"top_entropy_quantile": 0.37, "entropy_coef": 0.05, "loss_type": "bnpo"}),
        "off_policy_mask": Case({"off_policy_mask_threshold": 0.02}),
        "off_policy_mask-sampler": Case({"off_policy_mask_threshold": 0.02, "loss_type": "grpo"}, sampler=True),
        "token_advantages": Case({"beta": 0.04}, token_advantages=True),
        "token_advantages-sequence": Case({"importance_sampling_level": "sequence"}, token_advantages=True),
        "token_advantages-vespo": Case({"loss_type": "vespo"}, token_advantages=True),
        "masked": Case({"beta": 0.04}, masked=True),
        "masked-sequence": Case({"loss_type": "grpo", "importance_sampling_level": "sequence"}, masked=True),
        "evaluation": Case({}, evaluation=True),
        "evaluation-grpo": Case({"loss_type": "grpo", "entropy_coef": 0.05}, evaluation=True),
        "vllm-vespo-mask": Case({"loss_type": "vespo"}, vllm="token_mask"),
        "vllm-vespo-truncate": Case({"loss_type": "vespo"}, vllm="token_truncate", tools=True),
    }
    return cases | {f"vllm-{mode}": Case({"beta": 0.04}, vllm=mode) for mode in VLLM}


CASES = _cases()


class Found(NamedTuple):
    losses: Tensor  # [BATCHES]
    gradient: Tensor  # of all parameters, summed over the batches
    metrics: dict[str, Tensor]  # [BATCHES] each


class PlainTrainer(GRPOTrainer):
    """TRL's loss of log-probs, on log-probs of plain logits: any dtype."""

    def _get_per_token_logps_and_entropies(  # type: ignore[override]
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **_: Any
    ) -> tuple[Tensor, Tensor, None]:
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1]
        scores = (logits / self.temperature).log_softmax(-1)
        log_probs = scores.gather(-1, input_ids[:, -logits_to_keep:, None])[..., 0]
        return log_probs, -(scores.exp() * scores).sum(-1), None


def trainer(cls: type, model: Any, peft_config: Any = None, **options: Any) -> Any:
    defaults = {
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": LENGTH,
        "temperature": 0.8,
        "steps_per_generation": 6,
        "gradient_accumulation_steps": ACCUMULATION,
    }
    with tempfile.TemporaryDirectory() as folder:
        args = tiny.arguments(GRPOConfig, Path(folder), **{**defaults, **options})
        made = cls(
            model=model,
            reward_funcs=tiny.digit_reward,
            args=args,
            train_dataset=tiny.prompts(8),
            eval_dataset=tiny.prompts(4),
            peft_config=peft_config,
            processing_class=tiny.make_tokenizer(),
        )
    made.current_gradient_accumulation_steps = ACCUMULATION
    return made


@functools.cache
def _shared_trainer(kind: str) -> Any:
    made = trainer(FusedGRPOTrainer if kind == "fused" else PlainTrainer, tiny.make_model(num_hidden_layers=1))
    made.model.to(torch.float64 if kind == "exact" else torch.float32)
    return made


def _configure(made: Any, case: Case) -> None:
    """Sets what the constructor of TRL's trainer would, since making one takes longer than all its losses."""
    loss = {
        "loss_type": "dapo",
        "beta": 0.0,
        "importance_sampling_level": "token",
        "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": None,
        "use_bias_correction_kl": True,
        **case.options,
    }
    for name in ("delta", "use_bias_correction_kl"):
        setattr(made.args, name, loss.pop(name))
    made.epsilon_low, high = loss.pop("epsilon"), loss.pop("epsilon_high")
    made.epsilon_high = made.epsilon_low if high is None else high
    for name, value in loss.items():
        setattr(made, name, value)
    made._entropy_bonus_enabled = made.entropy_coef != 0.0
    made.use_vllm, made.vllm_importance_sampling_mode = bool(case.vllm), case.vllm
    made.model.train(not case.evaluation)


@functools.cache
def evaluate(name: str, kind: str) -> Found:
    """`kind`: "fused", "eager" (float32) or "exact" (float64)."""
    case, made = CASES[name], _shared_trainer(kind)
    _configure(made, case)
    parameters = list(made.model.parameters())
    losses, gradient = [], torch.zeros(())
    for seed in range(BATCHES):
        loss = made._compute_loss(made.model, make_inputs(case, seed, parameters[0].dtype))
        losses.append(loss.detach())
        gradient = gradient + torch.cat([value.flatten() for value in torch.autograd.grad(loss, parameters)])
    if kind == "fused":
        made._read_statistics()
    found = made._metrics["eval" if case.evaluation else "train"]
    metrics = {key: torch.tensor(value) for key, value in found.items()}
    found.clear()
    return Found(torch.stack(losses), gradient, metrics)


def make_inputs(case: Case, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What TRL hands to the loss: prompts padded on the left, completions on the right, one of them empty."""
    random = torch.Generator().manual_seed(seed)

    def noise(scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(*(shape or (BATCH, LENGTH)), generator=random)

    places = torch.arange(LENGTH)
    prompt_mask = (torch.arange(PROMPT) >= torch.tensor([0, 1, 3, 2, 0])[:, None]).long()
    completion_mask = (places < torch.tensor([LENGTH, 3, 0, 5, 1])[:, None]).long() * (not case.masked)
    ids = torch.randint(4, 48, (BATCH, PROMPT + LENGTH), generator=random)
    current = _log_probs(ids)
    old, ref = current + noise(0.25), current + noise(0.3)
    sampler = old + noise(0.2)
    sampler[0, 2] = float("nan")
    advantages = noise(1.0) if case.token_advantages else noise(1.0, BATCH)
    inputs = {
        "prompt_ids": ids[:, :PROMPT] * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, PROMPT:] * completion_mask,
        "completion_mask": completion_mask,
        "advantages": -advantages.abs() if case.negative else advantages,
        "num_items_in_batch": torch.tensor(0 if case.masked else 83),
        "ref_per_token_logps": ref,
    }
    if not case.on_policy:
        inputs["old_per_token_logps"] = old
    if case.tools:
        inputs["tool_mask"] = (places % 3 != 1).long().expand(BATCH, LENGTH)
    if case.sampler or case.vllm:
        inputs["sampling_per_token_logps"] = sampler
    if case.vllm:
        mask = completion_mask * inputs.get("tool_mask", torch.tensor(1))
        inputs["importance_sampling_ratio"] = _correction(case.vllm, ((old - sampler) * mask).nan_to_num(nan=0.0))
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


def _correction(mode: str, gap: Tensor) -> Tensor:
    """TRL's default bounds: none below, 3 above."""
    ratio = (gap.sum(-1, keepdim=True) if mode.startswith("sequence") else gap).exp()
    return ratio.clamp(max=3.0) if mode.endswith("truncate") else ratio.masked_fill(ratio > 3.0, 0.0)


@torch.no_grad()
def _log_probs(ids: Tensor) -> Tensor:
    """About what the policy gives."""
    logits = _shared_trainer("eager").model(input_ids=ids).logits[:, PROMPT - 1 : -1]
    return (logits / 0.8).log_softmax(-1).gather(-1, ids[:, PROMPT:, None])[..., 0]
