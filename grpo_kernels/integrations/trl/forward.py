"""A model whose forward gives its last hidden states and its head to a function, instead of forming logits."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from grpo_kernels._sharded import is_dtensor

HeadFunction = Callable[[Tensor, Tensor, Tensor | None], Any]
"""Takes hidden states [B, S, H], the head's weight [V, H] and its bias [V]; the model's forward returns its result."""


class LogitTransform(NamedTuple):
    """What the model does to its logits; the options of the linear ops."""

    logit_scale: float = 1.0
    softcap: float | None = None


def logit_transform(config: Any) -> LogitTransform:
    """The transform that a transformers configuration asks for, whatever the family calls it."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    scale = next((value for value in found if value is not None), None)
    divisor = getattr(text, "logits_scaling", None)
    if scale is None and divisor is not None:  # the one family that multiplies by it is HyperCLOVA X
        scale = divisor if text.model_type == "hyperclovax" else 1.0 / divisor
    return LogitTransform(1.0 if scale is None else float(scale), getattr(text, "final_logit_softcapping", None))


def add_head_function(model: Any) -> None:
    """Lets `model(..., head_function=f)` return `f(hidden, weight, bias)`; without it the forward stays what it is.

    The call goes through the model's own forward, so that what wraps the model (DDP, FSDP, autocast, PEFT) sees it.
    Backbone and head are looked up at each call: sharding libraries and PEFT replace them.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # generate() checks its arguments against this signature
    def forward(self: Any, *args: Any, head_function: HeadFunction | None = None, **kwargs: Any) -> Any:
        if head_function is None:
            return original(*args, **kwargs)
        hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        head = self.get_output_embeddings()
        weight, bias = (value.full_tensor() if is_dtensor(value) else value for value in (head.weight, head.bias))
        return head_function(hidden.to(weight.device), weight, bias)

    model.forward = types.MethodType(forward, model)
