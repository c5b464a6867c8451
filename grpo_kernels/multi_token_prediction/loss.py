"""All depths as the rows of one matrix, in one pass over the head or in two."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.grpo_loss import GRPOLossOutput
from grpo_kernels.linear_log_probs import ops_one_pass
from grpo_kernels.linear_log_probs.attach import Again, attach, cast, may_form_gradients, needs_gradient, requests
from grpo_kernels.linear_log_probs.function import LinearRows, Options
from grpo_kernels.linear_log_probs.head import Head
from grpo_kernels.linear_log_probs.policy import Policy
from grpo_kernels.linear_log_probs.sums import Gradients
from grpo_kernels.linear_log_probs.two_pass import rows_of_head


class Depths(NamedTuple):
    """Some depths, one after another, after the checks of the arguments."""

    options: Options
    hidden: Tensor  # [depths, N, H]
    head: Head
    targets: Tensor  # [depths, N] int64, -1 where nothing is predicted
    temperatures: Tensor | None  # 0-d or [N]
    weights: Tensor  # [depths]
    shares: Tensor  # [depths]; what a sum of losses is multiplied by
    z_loss: float
    policy: Policy | None  # whose loss the first of them carries
    accumulator: Tensor | None

    def flat(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states [depths * N, H], targets and temperatures of the rows."""
        temperatures = self.temperatures
        if temperatures is not None and temperatures.ndim > 0:
            temperatures = temperatures.repeat(len(self.weights))
        return self.hidden.flatten(0, 1), self.targets.view(-1), temperatures

    def split(self) -> tuple[Depths, Depths]:
        """The first, and the others on a head that takes no gradient."""
        sizes = [1, len(self.weights) - 1]
        hidden, targets, weights, shares = (
            torch.split(value, sizes) for value in (self.hidden, self.targets, self.weights, self.shares)
        )
        first = self._replace(hidden=hidden[0], targets=targets[0], weights=weights[0], shares=shares[0])
        bias, a, b = (None if tensor is None else tensor.detach() for tensor in self.head[1:4])
        head = Head(self.head.weight.detach(), bias, a, b, self.head.lora_scale)
        return first, self._replace(
            hidden=hidden[1], head=head, targets=targets[1], weights=weights[1], shares=shares[1], policy=None,
            accumulator=None,
        )  # fmt: skip


class Losses(NamedTuple):
    """Of some depths. Only the loss is differentiable."""

    loss: Tensor
    depth_losses: Tensor  # [depths]
    log_probs: Tensor  # [depths, N]
    top1_ids: Tensor  # [depths, N]
    policy: GRPOLossOutput | None

    def followed_by(self, other: Losses) -> Losses:
        """Those of both."""
        depth_losses, log_probs, top1_ids = (torch.cat(pair) for pair in zip(self[1:4], other[1:4], strict=True))
        return Losses(self.loss + other.loss, depth_losses, log_probs, top1_ids, self.policy)


def losses_of(depths: Depths) -> Losses:
    """In one pass over the head where the kernels may form gradients in the forward, else in two."""
    flat, targets, temperatures = depths.flat()
    leaves = (flat, *depths.head[:4])
    trained, policy = needs_gradient(leaves), depths.policy
    if (
        trained
        and may_form_gradients(depths.options)
        and (policy is None or policy.takes_one_pass(len(depths.head.weight)))
    ):
        return _one_pass(depths)
    rows = rows_of_head(depths.options, flat, depths.head, targets, None, temperatures, depths.accumulator)
    return _losses(depths, rows, 2 if trained else 1)


def _losses(depths: Depths, rows: LinearRows, passes: int) -> Losses:
    """What the values of the rows give; the loss is differentiable in them."""
    shape = depths.targets.shape
    losses = -rows.log_probs
    if rows.log_sum_exp is not None:
        losses = depths.z_loss * rows.log_sum_exp.square() + losses
    losses, output = losses.view(shape), None
    if depths.policy is None:
        depth_losses = losses.sum(1) * depths.shares
    else:
        if rows.entropy is None:
            raise RuntimeError("the loss of a policy needs the entropy")
        output = depths.policy.output(rows.log_probs[: shape[1]], rows.entropy[: shape[1]], passes)
        depth_losses = torch.cat([output.loss[None], losses[1:].sum(1) * depths.shares[1:]])
    if rows.top1_ids is None:
        raise RuntimeError("the likeliest tokens are missing")
    loss = (depth_losses * depths.weights).sum()
    return Losses(
        loss, depth_losses.detach(), rows.log_probs.detach().view(shape), rows.top1_ids.view(shape), output
    )  # fmt: skip


def _one_pass(depths: Depths) -> Losses:
    hidden, targets, temperatures = depths.flat()
    leaves = (hidden, *depths.head[:4])
    wanted = requests(leaves, depths.accumulator)
    with torch.no_grad():
        factors = (depths.weights * depths.shares)[:, None].expand(depths.targets.shape)
        again: Again
        others: tuple[Tensor | None, ...]
        if depths.policy is None:
            again = partial(_cross_entropy, depths.options, depths.z_loss, wanted)
            others = (targets, temperatures, factors.reshape(-1))
        else:
            terms = depths.policy.terms().times(depths.weights[0])
            again = partial(_policy_loss, depths.options, depths.z_loss, wanted, tuple(terms[8:]))
            others = (targets, temperatures, factors[1:].reshape(-1), *terms[:8])
        values, gradients = again(*leaves, *others)
        found = _losses(depths, values, 1)
    loss = attach(found.loss, gradients, leaves, others, again, depths.accumulator)
    return found._replace(loss=loss)


def _cross_entropy(
    options: Options, z_loss: float, wanted: tuple[Any, ...], *tensors: Any
) -> tuple[LinearRows, Gradients]:
    hidden, head = cast(options, *tensors[:5])
    targets, temperatures, factors = tensors[5:]
    log_probs, log_sum_exp, top1_ids, a, b, c, d, e = ops_one_pass.linear_cross_entropy(
        hidden, *head, targets, None, temperatures, options.temperature, options.logit_scale, options.softcap, factors,
        z_loss, True, *wanted, options.backend,
    )  # fmt: skip
    return LinearRows(log_probs, None, None, top1_ids, log_sum_exp if z_loss else None), Gradients(a, b, c, d, e)


def _policy_loss(
    options: Options, z_loss: float, wanted: tuple[Any, ...], constants: tuple[Any, ...], *tensors: Any
) -> tuple[LinearRows, Gradients]:
    hidden, head = cast(options, *tensors[:5])
    targets, temperatures, factors, *terms = tensors[5:]
    log_probs, entropy, log_sum_exp, top1_ids, a, b, c, d, e = ops_one_pass.linear_grpo_loss(
        hidden, *head, targets, None, temperatures, options.temperature, options.logit_scale, options.softcap, *terms,
        *constants, factors, z_loss, True, *wanted, options.backend,
    )  # fmt: skip
    return LinearRows(log_probs, entropy, None, top1_ids, log_sum_exp if z_loss else None), Gradients(a, b, c, d, e)
