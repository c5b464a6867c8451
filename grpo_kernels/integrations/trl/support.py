"""What FusedGRPOTrainer serves exactly, and the TRL that it was written for."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from grpo_kernels.integrations._patch import IncompatibleVersion, check_signature, version_of

_INSTEAD = "use trl.GRPOTrainer with grpo_kernels.integrations.trl.patch(), which serves it"

_SIGNATURES: dict[str, tuple[str, ...]] = {
    "_compute_loss": ("self", "model", "inputs"),
    "_get_per_token_logps_and_entropies": (
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
        "compute_aux_loss", "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes",
        "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
    ),
    "get_gamma_weights": (
        "advantages", "log_ratio_per_token", "mask", "importance_sampling_ratio", "k_pos", "lambda_pos", "k_neg",
        "lambda_neg",
    ),
    "log": ("self", "logs", "start_time"),
}  # fmt: skip

_READ_BY_LOSS: dict[str, str] = {
    "self": """
    _entropy_bonus_enabled _entropy_window_stats _get_per_token_logps_and_entropies _last_world_entropy _metrics
    accelerator args aux_loss_enabled beta current_gradient_accumulation_steps entropy_coef epsilon_high epsilon_low
    get_gamma_weights get_high_entropy_mask get_off_policy_mask importance_sampling_level loss_type
    max_completion_length model off_policy_mask_threshold router_aux_loss_coef top_entropy_quantile
    use_adaptive_entropy use_vllm vllm_importance_sampling_correction""",
    "self.args": """
    delta entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target sapo_temperature_neg
    sapo_temperature_pos steps_per_generation use_bias_correction_kl vespo_k_neg vespo_k_pos vespo_lambda_neg
    vespo_lambda_pos""",
    "inputs": """
    advantages completion_ids completion_mask image_grid_thw image_position_ids image_sizes importance_sampling_ratio
    mm_token_type_ids num_images num_items_in_batch num_tiles old_per_token_logps pixel_attention_mask pixel_values
    prompt_ids prompt_mask ref_per_token_logps sampling_per_token_logps spatial_shapes token_type_ids tool_mask""",
}


def check_trl(trainer: type) -> None:
    """Raises unless the loss that FusedGRPOTrainer replaces is the one that it repeats.

    A signature does not tell whether the loss has learned something since: what its source reads does.

    Raises:
        IncompatibleVersion: a method takes other arguments, or the loss reads other options, inputs or state.
    """
    for name, parameters in _SIGNATURES.items():
        check_signature("trl", f"trl.GRPOTrainer.{name}", getattr(trainer, name), parameters)
    found = names_read(trainer._compute_loss)  # type: ignore[attr-defined]
    known = {f"{owner}.{name}" for owner, names in _READ_BY_LOSS.items() for name in names.split()}
    if found != known:
        new, gone = sorted(found - known), sorted(known - found)
        raise IncompatibleVersion(
            f"trl.GRPOTrainer._compute_loss must read what that of trl 1.16 reads, but in trl "
            f"{version_of('trl')} it {'reads' if new else 'does not read'} "
            f"{', '.join(new or gone)}; {_INSTEAD}"
        )


def names_read(method: Callable[..., Any]) -> set[str]:
    """Attributes of `self` and of `self.args`, and keys of `inputs`, that the source of a method names."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    return {name for node in ast.walk(tree) for name in _names_of(node)}


def _names_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "self.args"):
        yield f"{ast.unparse(node.value)}.{node.attr}"
    key: ast.AST | None = None
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "inputs":
        key = node.slice
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "inputs.get":
        key = node.args[0]
    elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "inputs":
        key = node.left
    if isinstance(key, ast.Constant) and isinstance(key.value, str):
        yield f"inputs.{key.value}"


def check_trainer(trainer: Any) -> None:
    """Raises unless the trainer's loss is served exactly.

    Raises:
        ValueError: it is not; the message names the option, and what to do instead.
    """
    for name, reason in _refusals(trainer):
        raise ValueError(f"FusedGRPOTrainer: {name} is not served: {reason}; {_INSTEAD}")


def _refusals(trainer: Any) -> Iterator[tuple[str, str]]:
    args, model = trainer.args, trainer.model
    if args.use_liger_kernel:
        yield "use_liger_kernel=True", "Liger replaces parts of the model that the fused loss reads"
    if args.torch_compile:
        yield "torch_compile=True", "the forward takes a function that is another one at each call"
    if args.cast_lm_head_to_fp32:
        yield "cast_lm_head_to_fp32=True", "the head's products have the dtype of model and autocast"
    if args.use_adaptive_entropy:
        yield "use_adaptive_entropy=True", "the controller of the coefficient is TRL's own"
    if trainer.aux_loss_enabled:
        yield "router_aux_loss_coef", "the loss of the experts' balance is not computed here; set it to 0.0"
    if trainer._is_vlm:
        yield "a processor of images", "the forward takes text only"
    if args.delta is not None and args.delta <= 1.0 + trainer.epsilon_high:
        bound = f"1 + epsilon_high = {1.0 + trainer.epsilon_high:g}"
        yield f"delta={args.delta}", f"TRL's clip metrics count other tokens unless it exceeds {bound}"
    if args.top_entropy_quantile < 1.0 and trainer.accelerator.num_processes > 1:
        yield f"top_entropy_quantile={args.top_entropy_quantile}", "with several processes its threshold is theirs all"
    yield from _refusals_of_model(trainer, model)


def _refusals_of_model(trainer: Any, model: Any) -> Iterator[tuple[str, str]]:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        yield "ZeRO stage 3", "the gradient of a gathered head is not given back to its shards"
    adapters = getattr(model, "peft_config", {})
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        yield "prompt learning", "it adds positions that the loss would have to skip"
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        yield f"a head of class {type(head).__name__}", "its weight and bias must be those of a plain nn.Linear"
