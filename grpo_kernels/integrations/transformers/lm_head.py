"""fuse_lm_head: the training loss of a causal language model without its logits."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from grpo_kernels.integrations._patch import check_signature
from grpo_kernels.integrations.transformers.loss import causal_lm_loss, divided, shifted
from grpo_kernels.linear_log_probs import linear_cross_entropy

_OP = "fuse_lm_head"
_LOSS_ARGUMENTS = ("logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels", "**kwargs")
_Transform = Callable[[Any], tuple[float, float | None]]


def _plain(model: Any) -> tuple[float, float | None]:
    return 1.0, None


def _softcap(model: Any) -> tuple[float, float | None]:
    return 1.0, model.config.final_logit_softcapping


def _logit_scale(model: Any) -> tuple[float, float | None]:
    return float(model.logit_scale), None


def _logits_scaling(model: Any) -> tuple[float, float | None]:
    return 1.0 / model.config.logits_scaling, None


# What each model does between its head and its loss: the factor of the logits and their softcap.
_SERVED: dict[str, _Transform] = {
    **dict.fromkeys(("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma", "Olmo2", "SmolLM3"), _plain),
    **dict.fromkeys(("DeepseekV3", "GptOss", "Mixtral", "Qwen3Moe"), _plain),
    **dict.fromkeys(("Gemma2", "Gemma3"), _softcap),
    **dict.fromkeys(("Cohere", "Cohere2"), _logit_scale),
    "Granite": _logits_scaling,
}


_FORWARDS: dict[Any, Callable[..., Any]] = {}  # of each class that has been fused


class _Call:
    """The loss that one pass of the model asks of its head, and gets."""

    def __init__(self, scale: float, softcap: float | None, labels: Tensor, options: dict[str, Any]) -> None:
        self.scale, self.softcap, self.labels, self.options = scale, softcap, labels, options
        self.loss: Tensor | None = None

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        ignore_index = self.options["ignore_index"]
        ids = shifted(_OP, self.labels, ignore_index, self.options["shift_labels"])
        if ids.numel() != hidden.numel() // hidden.shape[-1]:
            raise ValueError(f"{_OP}: labels must have shape {list(hidden.shape[:-1])}, got {list(ids.shape)}")
        ids = ids.reshape(hidden.shape[:-1]).to(hidden.device)
        total = linear_cross_entropy(
            hidden, weight, ids,
            bias=bias, ignore_index=ignore_index, reduction="sum", logit_scale=self.scale, softcap=self.softcap,
        )  # fmt: skip
        self.loss = divided(total, ids, ignore_index, self.options["num_items_in_batch"]).float()


class _LossHead(nn.Linear):
    """A head that gives no logits, but a loss, to a pass that asks for one."""

    call: _Call | None

    def forward(self, hidden: Tensor) -> Tensor:
        if self.call is None:
            return super().forward(hidden)
        self.call(hidden, self.weight, self.bias)
        return hidden.new_empty(*hidden.shape[:-2], 0, self.out_features)


def fuse_lm_head(model: Any) -> Any:
    """Lets a causal language model compute its training loss straight from hidden states.

    In training mode and given `labels`, the model's forward returns the loss of `ForCausalLMLoss`, the auxiliary loss
    added where the model adds it, and `logits` None: logits never exist. In eval mode, without labels, and in
    `generate` nothing changes. Parameters stay the same objects, tied weights tied.

    Served are the `ForCausalLM` classes of Llama, Mistral, Qwen2, Qwen3, Phi3, Gemma 1 to 3, OLMo 2, SmolLM3, Cohere 1
    and 2, Granite, DeepSeek-V3, gpt-oss, Mixtral and Qwen3-MoE, with their softcaps and factors.

    Args:
        model: of one of these classes, not yet wrapped, compiled or prepared.

    Returns:
        The model.

    Raises:
        ValueError: the model or its head is not served, or its forward has been replaced already.
        IncompatibleVersion: transformers calls its loss otherwise.

    Numerics:
        As `linear_cross_entropy`: logits are not rounded to the model's dtype. A mean over no label is 0 with gradient
        0, where transformers gives NaN.
    """
    check_signature("transformers", "transformers.loss.loss_utils.ForCausalLMLoss", ForCausalLMLoss, _LOSS_ARGUMENTS)
    if is_fused(model):
        return model
    name = type(model).__name__
    transform = _transform(model.__class__)
    if not type(model).__module__.startswith("transformers.models.") or transform is None:
        served = ", ".join(f"{family}ForCausalLM" for family in _SERVED)
        raise ValueError(f"{_OP}: model must be one of {served}, got {name}")
    if "forward" in vars(model):
        raise ValueError(f"{_OP}: the forward of this {name} has been replaced already: fuse first, then prepare")
    _check_loss_function(model)
    head: Any = model.lm_head
    if type(head) is not nn.Linear or "forward" in vars(head):
        raise ValueError(f"{_OP}: lm_head of {name} must be a plain nn.Linear, got {type(head).__name__}")
    head.__class__ = _LossHead
    model.lm_head.call = None
    model.forward = types.MethodType(_fused(model.__class__, transform), model)
    return model


def restore_lm_head(model: Any) -> Any:
    """Undoes `fuse_lm_head`; of another model it does nothing.

    Returns:
        The model.

    Raises:
        ValueError: the forward has been replaced since.
    """
    if isinstance(getattr(model, "lm_head", None), _LossHead):
        if not is_fused(model):
            raise ValueError(f"restore_lm_head: the forward of this {type(model).__name__} has been replaced since")
        del model.forward, model.lm_head.call
        model.lm_head.__class__ = nn.Linear
    return model


def is_fused(model: Any) -> bool:
    return getattr(vars(model).get("forward"), "__func__", None) in _FORWARDS.values()


def _fused(model_class: Any, transform: _Transform) -> Callable[..., Any]:
    """The forward in the place of the class's own, with its signature, which Trainer looks at."""
    if model_class in _FORWARDS:
        return _FORWARDS[model_class]
    stock = model_class.forward

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if len(args) > 1:
            raise TypeError(f"{_OP}: arguments after input_ids must be named, got {len(args)} without a name")
        if labels is None or not self.training:
            return stock(self, *args, labels=labels, **kwargs)
        if not isinstance(self.lm_head, _LossHead):
            raise ValueError(f"{_OP}: lm_head was replaced by {type(self.lm_head).__name__}: restore first, then fuse")
        _check_loss_function(self)
        defaults = {"num_items_in_batch": None, "ignore_index": -100, "shift_labels": None}
        options = {name: kwargs.pop(name, default) for name, default in defaults.items()}
        return_dict = kwargs.pop("return_dict", None)
        call = _Call(*transform(self), labels, options)
        self.lm_head.call = call
        try:
            output = stock(self, *args, labels=None, return_dict=True, **kwargs)
        finally:
            self.lm_head.call = None
        loss = call.loss
        if output.get("aux_loss") is not None:
            loss = loss + self.router_aux_loss_coef * output.aux_loss.to(loss.device)  # type: ignore[union-attr]
        output = type(output)(**{**output, "loss": loss, "logits": None})
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    return _FORWARDS.setdefault(model_class, forward)


def _transform(model_class: Any) -> _Transform | None:
    name = model_class.__name__
    return _SERVED.get(name.removesuffix("ForCausalLM")) if name.endswith("ForCausalLM") else None


def _check_loss_function(model: Any) -> None:
    if model.loss_function not in (ForCausalLMLoss, causal_lm_loss):
        name = getattr(model.loss_function, "__name__", model.loss_function)
        raise ValueError(f"{_OP}: loss_function of {type(model).__name__} must be ForCausalLMLoss, got {name}")
