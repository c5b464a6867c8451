"""What the benchmark of multi-token prediction computes, in plain PyTorch: the losses of all depths with a head that
keeps its logits, and with heads that know one depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import grpo_kernels

from . import linear_definitions as linear
from .case import Inputs
from .linear_definitions import Values
from .linear_peers import Peer

LAMBDA = 0.3
"""DeepSeek-V3's weight of the mean over the depths behind the model itself."""

CONFIG = grpo_kernels.GRPOLossConfig.preset("bnpo", kl_coef=linear.KL_COEF, clip_low=linear.CLIP, clip_high=linear.CLIP)


@dataclass(frozen=True)
class Problem:
    """Attributes:
    depths: behind the model itself.
    policy: whether depth 0 carries the GRPO loss, and not cross-entropy. Row i then predicts token i, else i + 1.
    """

    depths: int
    policy: bool = False

    @property
    def shift(self) -> int:
        return 0 if self.policy else 1

    @property
    def states(self) -> list[str]:
        """Names of the hidden states in the inputs, one tensor a depth."""
        return [f"hidden_{depth}" for depth in range(self.depths + 1)]

    def weight_of(self, depth: int) -> float:
        return LAMBDA / self.depths if depth else 1.0


def labels(problem: Problem, inputs: Inputs, depth: int) -> Tensor:
    """[B, T]. The token that each row of a depth predicts; -100 where its sequence has none."""
    ahead = depth + problem.shift
    ids = inputs["token_ids"]
    return F.pad(ids[:, ahead:], (0, ahead), value=-100) if ahead else ids


def separate(problem: Problem, cross_entropy: Peer, policy: Peer, inputs: Inputs) -> Values:
    """One call a depth, of functions that know `hidden`, `weight` and `token_ids`."""
    losses = []
    for depth, name in enumerate(problem.states):
        given = {**inputs, "hidden": inputs[name], "token_ids": labels(problem, inputs, depth)}
        if depth or not problem.policy:
            given = {**given, "hidden": given["hidden"].flatten(0, 1), "token_ids": given["token_ids"].flatten()}
        run = policy if problem.policy and depth == 0 else cross_entropy
        losses.append(problem.weight_of(depth) * run(given)[0].float())
    return (torch.stack(losses).sum(),)


def kept_logits(inputs: Inputs) -> Values:
    """Cross-entropy as eager PyTorch has it, in float32 where the logits are narrower."""
    logits = F.linear(inputs["hidden"], inputs["weight"])
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (F.cross_entropy(wide, inputs["token_ids"]),)


def kept_policy_logits(inputs: Inputs) -> Values:
    return linear.grpo_loss(F.linear(inputs["hidden"], inputs["weight"]), inputs)


def one_cross_entropy(inputs: Inputs) -> Values:
    """Ours, for one depth."""
    return (grpo_kernels.linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["token_ids"]),)


def one_policy_loss(inputs: Inputs) -> Values:
    """Ours, for the policy alone."""
    terms = [inputs[name] for name in ("hidden", "weight", "token_ids", "old_log_probs")]
    result = grpo_kernels.linear_grpo_loss(
        *terms, inputs["advantages"].squeeze(-1), inputs["mask"], CONFIG, ref_log_probs=inputs["ref_log_probs"]
    )
    return (result.loss,)


def together(problem: Problem, inputs: Inputs) -> Values:
    """Ours, all depths in one pass."""
    policy = None
    if problem.policy:
        policy = grpo_kernels.PolicyTerms(
            inputs["old_log_probs"], inputs["advantages"].squeeze(-1), CONFIG, ref_log_probs=inputs["ref_log_probs"]
        )
    result = grpo_kernels.mtp_linear_cross_entropy(
        [inputs[name] for name in problem.states], inputs["weight"], inputs["token_ids"], shift=problem.shift,
        policy=policy,
    )  # fmt: skip
    return (result.loss,)


def with_gradients(problem: Problem, forward: Callable[[Inputs], Values], inputs: Inputs) -> tuple[Tensor, ...]:
    """The loss, and the gradients of every depth's hidden states and of the weight."""
    (loss,) = forward(inputs)
    leaves = [inputs[name] for name in (*problem.states, "weight")]
    return (loss.detach(), *torch.autograd.grad(loss, leaves, inputs["upstream"].to(loss.dtype)))


def sample(outputs: Sequence[Tensor]) -> list[Tensor]:
    """What is compared with float64: the loss, some rows of all hidden states' gradients, some of the weight's."""
    loss, *states, weight = outputs
    return linear.sample([loss, torch.stack(states), weight])


def definition(problem: Problem, inputs: Inputs) -> list[Tensor]:
    """The `sample` from a few rows' logits at a time."""
    every = [labels(problem, inputs, depth) for depth in range(problem.depths + 1)]
    targets = torch.stack(every)
    factors = [problem.weight_of(depth) / (found >= 0).sum() * (found >= 0) for depth, found in enumerate(every)]
    if problem.policy:
        factors[0] = torch.zeros_like(factors[0])
    given: Inputs = {
        "hidden": torch.stack([inputs[name].detach() for name in problem.states]),
        "weight": inputs["weight"].detach(),
        "token_ids": targets.clamp(min=0),
        "factors": torch.stack(factors),
        "upstream": inputs["upstream"],
    }
    if problem.policy:
        first = torch.zeros_like(targets, dtype=torch.bool)
        first[0] = True
        names = ("old_log_probs", "ref_log_probs", "advantages", "tokens")
        given |= {"mask": first, **{name: inputs[name] for name in names}}
    return linear.in_chunks(_weighted_policy if problem.policy else _weighted, given)


def _weighted(logits: Tensor, inputs: Inputs) -> Values:
    return (-(linear.chosen_log_probs(logits, inputs["token_ids"]) * inputs["factors"]).sum(),)


def _weighted_policy(logits: Tensor, inputs: Inputs) -> Values:
    (policy,) = linear.grpo_loss(logits, inputs)
    return (policy + _weighted(logits, inputs)[0],)
