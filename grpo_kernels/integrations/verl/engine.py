"""verl's FSDP engine with fused kernels: temperatures of each sample, and the sum of squared probs, which it refuses.

Both refusals are about what verl's own `linear_cross_entropy` can do. The engine's methods are wrapped: what they
refuse is asked of them without fused kernels, or without the sum, and the rest is added as they do it in the other
cases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.integrations._patch import Replacement, attribute_of, check_signature
from grpo_kernels.integrations.verl.head import collect_sum_pi_squared, collected_sum_pi_squared

SIGNATURES = {
    "prepare_model_inputs": ("self", "micro_batch"),
    "prepare_model_outputs": ("self", "output", "output_args", "micro_batch", "logits_processor_func"),
    "forward_step": ("self", "micro_batch", "loss_function", "forward_only"),
}


def replacements() -> list[Replacement]:
    """Those for the FSDP engine; none where it cannot be imported.

    Raises:
        IncompatibleVersion: its methods are not those that this was written for.
    """
    try:
        from verl.workers.engine.fsdp import transformer_impl
    except ImportError:
        return []
    engine = attribute_of("verl", transformer_impl.__name__, transformer_impl, "FSDPEngineWithLMHead")
    wrappers: dict[str, Callable[..., Any]] = {
        "prepare_model_inputs": _prepare_model_inputs,
        "prepare_model_outputs": _prepare_model_outputs,
        "forward_step": _forward_step,
    }
    made = []
    for name, wrapper in wrappers.items():
        original = attribute_of("verl", "FSDPEngineWithLMHead", engine, name)
        check_signature("verl", f"FSDPEngineWithLMHead.{name}", original, SIGNATURES[name])
        made.append(Replacement(engine, name, _wrapped(wrapper, original, engine)))
    return made


def _wrapped(wrapper: Callable[..., Any], original: Callable[..., Any], engine: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # An engine that adds to these methods (VeOmni) has a forward that never calls linear_cross_entropy.
        inherited = all(getattr(type(self), name) is getattr(engine, name) for name in SIGNATURES)
        if not inherited or getattr(self.module, "_verl_fused_kernels_backend", None) != "triton":
            return original(self, *args, **kwargs)
        return wrapper(original, self, *args, **kwargs)

    return method


def _option(micro_batch: Any, key: str, default: bool = False) -> bool:
    from verl.utils import tensordict_utils

    return bool(tensordict_utils.get_non_tensor_data(data=micro_batch, key=key, default=default))


def _without(micro_batch: Any, key: str) -> Any:
    """A shallow copy in which the option is off."""
    from verl.utils import tensordict_utils

    copy = micro_batch.copy()
    tensordict_utils.assign_non_tensor(copy, **{key: False})
    return copy


def _prepare_model_inputs(original: Callable[..., Any], self: Any, micro_batch: Any) -> Any:
    if not _option(micro_batch, "use_fused_kernels") or not isinstance(micro_batch["temperature"], Tensor):
        return original(self, micro_batch)
    model_inputs, output_args = original(self, _without(micro_batch, "use_fused_kernels"))
    model_inputs["return_dict"] = True
    if _option(micro_batch, "use_remove_padding", True):  # both padded and cut as the tokens are
        model_inputs["temperature"] = output_args["temperature_rmpad"].unsqueeze(0)
        model_inputs["shift_labels"] = output_args["input_ids_rmpad_rolled"].unsqueeze(0)
    else:
        model_inputs["temperature"] = output_args["temperature"]
    return model_inputs, output_args


def _forward_step(original: Callable[..., Any], self: Any, micro_batch: Any, *args: Any, **kwargs: Any) -> Any:
    if not (_option(micro_batch, "use_fused_kernels") and _option(micro_batch, "calculate_sum_pi_squared")):
        return original(self, micro_batch, *args, **kwargs)
    with collect_sum_pi_squared():
        return original(self, micro_batch, *args, **kwargs)


def _prepare_model_outputs(
    original: Callable[..., Any],
    self: Any,
    output: Any,
    output_args: dict[str, Any],
    micro_batch: Any,
    logits_processor_func: Any,
) -> Any:
    collected = collected_sum_pi_squared()
    if collected is None:
        return original(self, output, output_args, micro_batch, logits_processor_func)
    values = collected.value
    if values is None:
        raise RuntimeError("FSDPEngineWithLMHead: the model's forward did not call linear_cross_entropy")
    without = _without(micro_batch, "calculate_sum_pi_squared")
    model_output = original(self, output, output_args, without, logits_processor_func)
    offsets = micro_batch["input_ids"].offsets()
    if _option(micro_batch, "use_remove_padding", True):
        values = self._gather_and_unpad_packed(values.reshape(-1), output_args["pad_size"])
    else:
        values = values[torch.arange(values.shape[1], device=values.device) < offsets.diff().unsqueeze(1)]
    model_output["sum_pi_squared"] = torch.nested.nested_tensor_from_jagged(values, offsets)
    return model_output
