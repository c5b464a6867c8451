"""Records what verl's own functions give for `problems`: `python -m python_tests.verl.record`, where verl is installed.

The tests compare ours with the recording where verl is missing, and the recording with verl where it is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo_kernels.integrations._patch import parameter_names
from python_tests.verl import problems

PATH = Path(__file__).parent / "recorded.json"
PLUGS = {
    "verl.trainer.ppo.core_algos": (
        "register_policy_loss", "register_adv_est", "compute_policy_loss_vanilla", "compute_grpo_outcome_advantage",
        "compute_rloo_outcome_advantage", "compute_gdpo_outcome_advantage", "agg_loss",
    ),
    "verl.utils.kernel.linear_cross_entropy": ("LinearCrossEntropy.forward",),
    "verl.workers.engine.fsdp.transformer_impl": (
        "FSDPEngineWithLMHead.prepare_model_inputs", "FSDPEngineWithLMHead.prepare_model_outputs",
        "FSDPEngineWithLMHead.forward_step",
    ),
    "verl.models.transformers.dense_common": ("forward_with_triton_backend",),
}  # fmt: skip


def signatures() -> dict[str, dict[str, list[str]]]:
    """Of the places where the adapter is plugged in."""
    found: dict[str, dict[str, list[str]]] = {}
    for module_name, names in PLUGS.items():
        module = __import__(module_name, fromlist=["_"])
        found[module_name] = {}
        for name in names:
            value: Any = module
            for part in name.split("."):
                value = getattr(value, part)
            found[module_name][name] = parameter_names(value)
    return found


def actor_config(case: problems.LossCase) -> Any:
    """verl's own config of the actor."""
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    options = problems.actor_options(case)
    options["policy_loss"] = PolicyLossConfig(**options["policy_loss"])
    return FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)


def losses() -> dict[str, Any]:
    """Loss, gradient and metrics of verl's functions, in float64."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    found = {}
    for case in problems.LOSS_CASES:
        old, log_prob, advantages, mask, weights = problems.loss_inputs()
        log_prob.requires_grad_()
        loss, metrics = get_policy_loss_fn(case.mode)(
            old_log_prob=old,
            log_prob=log_prob,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode=case.loss_agg_mode,
            config=actor_config(case),
            rollout_is_weights=weights if case.weighted else None,
        )
        (gradient,) = torch.autograd.grad(loss, log_prob)
        found[case.name] = {"loss": loss.item(), "gradient": gradient.tolist(), "metrics": metrics}
    return found


def advantages() -> dict[str, Any]:
    """verl's advantages, in float64 ("gdpo": float32, as verl makes its rewards)."""
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    found = {}
    for case, (name, options) in problems.ESTIMATOR_CASES.items():
        arguments: dict[str, Any] = {"config": AlgoConfig(**options)}
        if name == "grpo":
            arguments.update(options)
        if name == "gdpo":
            arguments.update(gdpo_batch())
        values, returns = get_adv_estimator_fn(name)(
            token_level_rewards=problems.token_level_rewards(),
            response_mask=problems.response_mask().double(),
            index=np.array(problems.uids(name), dtype=object),
            **arguments,
        )
        assert torch.equal(values, returns)
        found[case] = values.tolist()
    return found


def gdpo_batch() -> dict[str, Any]:
    """The arguments that verl passes to the estimator of this name alone."""
    ends = torch.tensor(problems.LENGTHS).clamp(min=1)
    attention = torch.arange(problems.TOKENS + 2) < ends[:, None] + 2
    batch = {"prompts": torch.zeros(problems.BATCH, 2), "attention_mask": attention.long()}
    components = {name: np.array(values, dtype=object) for name, values in problems.reward_components().items()}
    return {"non_tensor_batch": components, "batch": batch}


def main() -> None:
    import verl

    recorded = {"verl": verl.__version__, "signatures": signatures(), "losses": losses(), "advantages": advantages()}
    PATH.write_text(json.dumps(recorded, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
