"""The public function: argument checks and the choice of a backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _dispatch
from grpo_kernels.speculative_sampling import ops
from grpo_kernels.speculative_sampling.arguments import (
    OP,
    check_options,
    check_tensors,
    per_row,
    raise_if_faulty,
)


class VerifyDraftOutput(NamedTuple):
    """What `verify_draft` returns.

    Args:
        token_ids: [B, K + 1] int64. The accepted drafts, one token drawn from the residual or, behind the last draft,
            from the target, then -1.
        num_accepted: [B] int64. How many drafts were accepted. One token more was emitted, unless the row is broken:
            `(token_ids >= 0).sum(1)` counts tokens in any case.
        log_probs: [B, K + 1] fp32 (fp64 for fp64 logits). Log-probs of the emitted tokens under the target at the
            temperature, nats, before top-k and top-p; 0 behind them.
    """

    token_ids: Tensor
    num_accepted: Tensor
    log_probs: Tensor


def verify_draft(
    target_logits: Tensor,
    draft_ids: Tensor,
    *,
    draft_logits: Tensor | None = None,
    draft_lengths: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    seeds: Tensor | None = None,
    offsets: Tensor | None = None,
    mode: str = "token",
) -> VerifyDraftOutput:
    """Verifies drafted tokens: what is emitted has the law of sampling from the target token by token.

    With p and q the distributions of target and draft, after temperature and filters, and uniforms u_i::

        token    draft x_i is accepted iff all before it are and u_i < p(x_i) / q(x_i); at the first that is not, a
                 token from max(p - q, 0), normalised; behind the last draft, a token from p
        block    accepts at least as many. P_0 = 1, P_i = min(P_{i-1} p(x_{i-1}) / q(x_{i-1}), 1),
                 S_i = sum max(P_i p - q, 0), h_i = S_i / (S_i + 1 - P_i), h_K = P_K: the first
                 tau = max {i: u_{i-1} < h_i} drafts, then a token from max(P_tau p - q, 0), or p behind the last
        greedy   drafts are accepted while each is the target's likeliest token, the lowest id among equals; then
                 that token

    No softmax is held in memory, and the log-probs that a trainer needs of the emitted tokens come from the same pass.

    Args:
        target_logits: [B, K + 1, V] bf16, fp16, fp32 or fp64. Row i follows the first i drafts. Any strides with a
            dense last axis, those of an expand included, are read in place. K = 0 samples one token.
        draft_ids: [B, K] int32 or int64, in [0, V). Drafted tokens, drawn from `draft_logits` at the same temperature
            and with the same filters.
        draft_logits: [B, K, V] of the dtype of target_logits, or None: the drafts could not have been others (an
            argmax, an n-gram), or nobody knows their probabilities. q is then 1 at the draft.
        draft_lengths: [B] int32 or int64, in [0, K]. Drafts of each row; what lies behind them may be anything.
            None: K.
        temperature: number or [B] tensor, > 0.
        top_k: number or [B] int tensor; <= 0: no filter. Keeps what is not below the k-th largest logit.
        top_p: number or [B] tensor, in (0, 1]. Of what top_k leaves, keeps the likeliest tokens, as few as reach this
            share of its mass. Tokens of equal logits stay or go together. Both apply alike to target and draft.
        seeds: [B] int64. None: drawn from torch's default generator on the device. Drafts must have been drawn with
            noise that is neither this nor that of an earlier draft: seeds of their own, and an offset larger by one for
            every draw.
        offsets: [B] int64. Tokens of each sequence before this call, None: 0. Noise is a function of the seed and of
            this place, and of nothing else; calls that go on with the same seed need an offset that grows.
        mode: "token", "block" or "greedy", which looks at neither filters, seeds nor draft_logits.

    Returns:
        `VerifyDraftOutput(token_ids, num_accepted, log_probs)`. Not differentiable; log-probs are float32 (float64 for
        float64 logits).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range. On the CPU also where a
            draft id, a draft length, a temperature or a top_p of a tensor is out of range; on other devices such a row
            has token -1, num_accepted 0 and log_prob NaN at position 0.
        BackendUnavailable: one was asked for with `backend(...)` and cannot be used.

    Numerics:
        fp32 with sums in a fixed order, on the CPU in float64; float64 for float64 logits. A row's tokens do not depend
        on the other rows or the device, but for draws nearer to a tie than rounding. Equal target and draft logits
        accept every draft. -inf means probability zero. A residual that is zero by rounding is replaced by p.

        Noise is Philox4x32-10 keyed by the seed. A draft is accepted with its probability rounded up to a multiple of
        2^-24; the drawn token wins a race of exponentials of 32 bits (the Gumbel-max trick), in which a probability
        down to 1e-9 counts for what it is, 1e-10 for 0.8 of it, and one below 1e-11 for nothing.

        A NaN or +inf, or nothing but -inf, in a row of logits that the decision looks at ends the sequence there: token
        -1 and log_prob NaN, num_accepted what was accepted before. The block rule looks at the rows of all drafts
        before it accepts any: one of those ends the sequence at position 0.

    Source:
        Token rule: Leviathan et al. (2211.17192), Chen et al. (2302.01318). Block rule: Sun et al. (2403.10444).
        One-hot drafts as in vLLM's n-gram drafting; the race as in its rejection sampler.
    """
    check_tensors(target_logits, draft_ids, draft_logits, draft_lengths)
    check_options(target_logits, temperature, top_k, top_p, seeds, offsets, mode)
    dtype = ops.result_dtype(target_logits)
    target_logits = target_logits.detach()
    temperatures = per_row(temperature, target_logits, dtype, 1.0)
    if mode == "greedy":
        draft_logits = top_k = top_p = offsets = None
        seeds = torch.zeros(target_logits.shape[:1], dtype=torch.int64, device=target_logits.device)
    top_k = per_row(top_k, target_logits, torch.int64, None)
    top_p = per_row(top_p, target_logits, dtype, 1.0)
    lengths = per_row(draft_lengths, target_logits, torch.int64, None)
    if seeds is None:
        seeds = torch.randint(2**63 - 1, target_logits.shape[:1], device=target_logits.device)
    backend = _dispatch.resolve(OP, target_logits)
    if backend == "reference":
        raise_if_faulty(target_logits, draft_ids, lengths, temperatures, top_p)
    return VerifyDraftOutput(
        *ops.verify_draft(
            target_logits,
            draft_ids,
            None if draft_logits is None else draft_logits.detach(),
            lengths,
            temperatures,
            top_k,
            top_p,
            seeds,
            offsets,
            mode,
            backend,
        )
    )
