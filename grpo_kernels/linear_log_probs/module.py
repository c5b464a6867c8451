"""A head whose ops run inside a module's forward, where FSDP2, DDP and ZeRO-3 gather and reduce its weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grpo_kernels import _checks
from grpo_kernels._sharded import is_dtensor
from grpo_kernels.grpo_loss import GRPOLossConfig, GRPOLossOutput
from grpo_kernels.linear_log_probs.api import linear_token_log_probs
from grpo_kernels.linear_log_probs.cross_entropy import linear_cross_entropy
from grpo_kernels.linear_log_probs.grpo import linear_grpo_loss
from grpo_kernels.linear_log_probs.head import LoRAFactors
from grpo_kernels.linear_log_probs.weights import check_weight
from grpo_kernels.multi_token_prediction import MTPLossOutput, mtp_linear_cross_entropy
from grpo_kernels.multi_token_prediction.arguments import stacked
from grpo_kernels.token_log_probs import TokenLogProbsOutput

_OP = "FusedLMHead"
_DEFAULT_CONFIG = GRPOLossConfig()
_REMEDY = (
    "wrap the head before fully_shard, FullyShardedDataParallel or deepspeed.initialize; call it in the forward of the "
    "unit that owns the weight, or make it a unit of its own, fully_shard(head)"
)
_OWN = {
    "weight": "it is the head's",
    "bias": "it is the head's",
    "logit_scale": "give it to the constructor",
    "softcap": "give it to the constructor",
    "lora": "give it to the constructor, so that the factors are gathered with the weight",
    "weight_grad_accumulator": "the gradient would pass by the hooks that reduce it; call the op with the weight",
}

Computation = Callable[[Tensor, Tensor, Tensor | None, LoRAFactors | None], Any]
"""Hidden states, weight, bias and LoRA factors, all gathered -> the tensors that take part in the backward."""


class FusedLMHead(nn.Module):
    """A language-model head whose log-probs and losses come straight from hidden states.

    It takes the place of the head it wraps and shares its parameters: names in the state dict stay, tied weights stay
    tied, and `head(hidden)` gives the same logits. Each op runs inside this module's forward, so that whatever hooks a
    sharding library puts on modules see it::

        model.lm_head = FusedLMHead(model.lm_head)      # then fully_shard, DistributedDataParallel or DeepSpeed
        loss = model.lm_head.grpo_loss(hidden, token_ids, old_log_probs, advantages, mask, config).loss

    Arguments other than the hidden states do not pass through the hooks: a mixed precision policy would round
    old_log_probs to bfloat16. For the same reason results stay float32 whatever its `output_dtype`.

    Args:
        head: nn.Linear, or nn.Embedding whose table is the head's weight. Not one with adapters or a forward of its
            own: those are refused rather than ignored.
        logit_scale: logits are multiplied by this in the log-probs and losses; `head(hidden)` stays without.
        softcap: likewise, softcap * tanh(logits / softcap) follows.
        lora: factors of low rank that belong to the head. Parameters among them become this module's `lora_a` and
            `lora_b`; adapters of another library stay shared with it.

    Raises:
        TypeError, ValueError: the head is of another kind, or an option is out of range.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_a: Tensor | None
    lora_b: Tensor | None

    def __init__(
        self,
        head: nn.Module,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        lora: LoRAFactors | None = None,
    ) -> None:
        super().__init__()
        _check_head(head)
        _checks.check_number(_OP, "logit_scale", logit_scale)
        if logit_scale == 0:
            raise ValueError(f"{_OP}: logit_scale must not be 0")
        if softcap is not None:
            _checks.check_number(_OP, "softcap", softcap, above=0.0)
        embedding = isinstance(head, nn.Embedding)
        self.in_features = int(head.embedding_dim if embedding else head.in_features)  # type: ignore[arg-type]
        self.out_features = int(head.num_embeddings if embedding else head.out_features)  # type: ignore[arg-type]
        self.logit_scale = logit_scale
        self.softcap = softcap
        self._own("weight", head.weight)  # type: ignore[arg-type]
        self._own("bias", getattr(head, "bias", None))
        if lora is not None and not isinstance(lora, LoRAFactors):
            raise TypeError(f"{_OP}: lora must be LoRAFactors(a, b, scale), got {type(lora).__name__}")
        a, b, self.lora_scale = (None, None, 0.0) if lora is None else lora
        self._own("lora_a", a)
        self._own("lora_b", b)
        self.train(head.training)

    def _own(self, name: str, tensor: Tensor | None) -> None:
        if tensor is None or isinstance(tensor, nn.Parameter):
            self.register_parameter(name, tensor)
        else:
            self.register_buffer(name, tensor)

    def extra_repr(self) -> str:
        lora = "" if self.lora_a is None else f", lora_scale={self.lora_scale}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"logit_scale={self.logit_scale}, softcap={self.softcap}{lora}"
        )

    def forward(self, hidden: Tensor, computation: Computation | None = None) -> Any:
        """Logits of the wrapped head, without logit_scale and softcap; or what `computation` makes of the weight.

        A computation runs between the hooks of this module. Tensors that it returns get their backward hooks; what it
        closes over stays as it is, while a mixed precision policy casts the hidden states.
        """
        lora = None
        if self.lora_a is not None and self.lora_b is not None:
            lora = LoRAFactors(self.lora_a, self.lora_b, self.lora_scale)
        if computation is not None:
            return computation(hidden, self.weight, self.bias, lora)
        logits = F.linear(hidden, self.weight, self.bias)
        if lora is not None:
            logits = logits + lora.scale * F.linear(F.linear(hidden, lora.a), lora.b)
        return logits

    def token_log_probs(self, hidden: Tensor, token_ids: Tensor, **options: Any) -> TokenLogProbsOutput:
        """`linear_token_log_probs` with this head. Options: temperature, mask, outputs, vocab_shard."""
        output, (log_probs, entropy) = self._call(
            linear_token_log_probs, lambda output: (output.log_probs, output.entropy), hidden, (token_ids,), options
        )
        return TokenLogProbsOutput(log_probs, entropy, output.sum_squared_probs, output.top1_ids)

    def cross_entropy(self, hidden: Tensor, target: Tensor, **options: Any) -> Tensor:
        """`linear_cross_entropy` with this head. Options: ignore_index, reduction, z_loss, vocab_shard."""
        loss: Tensor
        _, (loss,) = self._call(linear_cross_entropy, lambda output: (output,), hidden, (target,), options)
        return loss

    def grpo_loss(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        old_log_probs: Tensor | None,
        advantages: Tensor,
        mask: Tensor | None,
        config: GRPOLossConfig = _DEFAULT_CONFIG,
        **options: Any,
    ) -> GRPOLossOutput:
        """`linear_grpo_loss` with this head. Options: temperature, ref_log_probs and the others of that function."""
        arguments = (token_ids, old_log_probs, advantages, mask, config)
        output, (loss,) = self._call(linear_grpo_loss, lambda output: (output.loss,), hidden, arguments, options)
        return GRPOLossOutput(loss, output.metrics, output.log_probs, output.entropy)

    def mtp_cross_entropy(self, hiddens: Tensor | Sequence[Tensor], token_ids: Tensor, **options: Any) -> MTPLossOutput:
        """`mtp_linear_cross_entropy` with this head.

        Args:
            hiddens: [D + 1, N, H] or [D + 1, B, T, H], or a sequence of D + 1 tensors [N, H] or [B, T, H].
            token_ids: [N] or [B, T] int32 or int64. Row i of depth k predicts token_ids[i + k + shift].
            options: positions, cu_seqlens, shift, mask, ignore_index, depth_weights, normalizer, num_items, policy,
                detach_head, temperature, z_loss and vocab_shard of that function. The others are the head's own.

        Returns:
            `MTPLossOutput`: a 0-d loss, differentiable; [D + 1] of each depth; [N] or [B, T] of depth 0's rows.
        """
        hiddens = stacked(_OP, hiddens)
        output, (loss,) = self._call(
            mtp_linear_cross_entropy, lambda output: (output.loss,), hiddens, (token_ids,), options
        )
        return MTPLossOutput(loss, *output[1:])

    def _call(
        self,
        op: Callable[..., Any],
        differentiable: Callable[[Any], tuple[Tensor | None, ...]],
        hidden: Tensor,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> tuple[Any, list[Any]]:
        """Runs an op in the forward. Returns its output, and the differentiable parts of it as the hooks left them."""
        for name in options.keys() & _OWN.keys():
            raise TypeError(f"{_OP}: {name} is no option of a call: {_OWN[name]}")
        output: Any = None
        parts: list[Tensor | None] = []

        def computation(
            hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRAFactors | None
        ) -> tuple[Tensor, ...]:
            nonlocal output, parts
            if options.get("vocab_shard") is not None:
                weight, bias = _local(weight), _local(bias)
                lora = None if lora is None else LoRAFactors(_local(lora.a), _local(lora.b), lora.scale)
            check_weight(_OP, weight, _REMEDY)
            output = op(
                hidden, weight, *arguments,
                bias=bias, logit_scale=self.logit_scale, softcap=self.softcap, lora=lora, **options,
            )  # fmt: skip
            parts = [None if part is None else _no_view(part) for part in differentiable(output)]
            return tuple(part for part in parts if part is not None and part.requires_grad)

        hooked = iter(self(hidden, computation))
        return output, [
            _exact(next(hooked), part) if part is not None and part.requires_grad else part for part in parts
        ]


def _no_view(part: Tensor) -> Tensor:
    """A copy of a view: an operation in place on one would lose the hooks, and FSDP2 warns of it."""
    copied = part.requires_grad and (torch.compiler.is_compiling() or part._is_view())
    return part.clone() if copied else part


def _exact(hooked: Tensor, original: Tensor) -> Tensor:
    """What the hooks returned, unless it is rounded: then the original, on which FSDP2 put its hook before the cast."""
    if hooked.dtype == original.dtype:
        return hooked
    cast = hooked.grad_fn
    source = (original.grad_fn, original.output_nr)
    if cast is not None and cast.name() == "ToCopyBackward0" and cast.next_functions[0] == source:
        return original
    raise ValueError(
        f"{_OP}: a hook turned a result into {str(hooked.dtype).removeprefix('torch.')}; take output_dtype out of the "
        "mixed precision policy of this module"
    )


def _local(value: Any) -> Any:
    """The part of this rank, where tensor parallelism keeps the head's tensors as DTensors."""
    return value.to_local() if is_dtensor(value) else value


def _check_head(head: nn.Module) -> None:
    """Raises unless the head is logits = hidden @ weight^T + bias and nothing else."""
    found = type(head).__name__
    if not isinstance(head, nn.Module):
        raise TypeError(f"{_OP}: head must be an nn.Module, got {found}")
    if hasattr(head, "base_layer") or hasattr(head, "lora_A"):
        raise TypeError(
            f"{_OP}: head carries adapters ({found}), which this module would leave out: wrap its base layer and pass "
            "lora=LoRAFactors(lora_A.weight, lora_B.weight, scaling)"
        )
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and "forward" not in vars(head)
    if not plain and not isinstance(head, nn.Embedding):
        raise TypeError(f"{_OP}: head must be nn.Linear with nn.Linear's forward, or an nn.Embedding, got {found}")
    if plain and (head._forward_pre_hooks or head._forward_hooks):
        raise ValueError(f"{_OP}: head has forward hooks, which this module would leave out: {_REMEDY}")
    if not isinstance(head._parameters.get("weight"), nn.Parameter):
        raise TypeError(f"{_OP}: head.weight must be a parameter, not computed as by parametrizations")
