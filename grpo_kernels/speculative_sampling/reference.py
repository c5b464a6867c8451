"""Verification of drafts in plain PyTorch: the definition, exact in float64, and the fallback on any device.

`verify_draft` puts the law's pieces and the noise together; tests integrate over the noise with the same pieces.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.speculative_sampling import noise_reference
from grpo_kernels.speculative_sampling.ops import result_dtype


class Distribution(NamedTuple):
    """A softmax of each row of logits.

    Args:
        log_probs: [B, R, V]. After temperature and filters, -inf for what they leave out.
        unfiltered: [B, R, V]. After the temperature alone.
        sound: [B, R] bool. The row has a softmax: no NaN, no +inf, not nothing but -inf.
    """

    log_probs: Tensor
    unfiltered: Tensor
    sound: Tensor


def kept(x: Tensor, e: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """[B, R, V] bool. What the filters leave: thresholds on the logits, so that equals stay or go together.

    top_k keeps what is not below the k-th largest logit. Then top_p keeps a token iff all that are likelier hold less
    than top_p of the mass that top_k left.

    Args:
        x: [B, R, V]. Logits, of which the temperature does not change the order.
        e: [B, R, V]. Their probabilities, not normalised.
        top_k: [B] int64; <= 0 or >= V: off.
        top_p: [B]; 1: off.
    """
    vocab = x.shape[-1]
    ranked, order = x.sort(dim=-1, descending=True)
    threshold = torch.full_like(x[..., :1], -math.inf)
    if top_k is not None:
        index = (top_k.clamp(1, vocab) - 1)[:, None, None].expand_as(threshold)
        threshold = torch.where((top_k > 0)[:, None, None], ranked.gather(-1, index), threshold)
    if top_p is not None:
        mass = torch.where(ranked >= threshold, e.gather(-1, order), 0.0).cumsum(-1)
        likelier = torch.cat([torch.zeros_like(mass[..., :1]), mass[..., :-1]], -1)
        last = (likelier < top_p[:, None, None] * mass[..., -1:]).sum(-1, keepdim=True) - 1
        nucleus = torch.maximum(threshold, ranked.gather(-1, last.clamp(min=0)))
        threshold = torch.where((top_p < 1.0)[:, None, None], nucleus, threshold)
    return x >= threshold


def distribution(
    logits: Tensor, temperatures: Tensor | None, top_k: Tensor | None, top_p: Tensor | None
) -> Distribution:
    """softmax(logits / temperature) over what the filters keep. Logits [B, R, V], the others [B].

    Differences are divided by the temperature, not logits: nothing overflows however small it is.
    """
    x = logits.to(result_dtype(logits))
    top = x.amax(-1, keepdim=True)
    u = x - top
    if temperatures is not None:
        u = u / temperatures[:, None, None]
    e = u.exp()
    unfiltered = u - e.sum(-1, keepdim=True).log()
    sound = top.isfinite().squeeze(-1)
    if top_k is None and top_p is None:
        return Distribution(unfiltered, unfiltered, sound)
    keep = kept(x, e, top_k, top_p)
    total = torch.where(keep, e, 0.0).sum(-1, keepdim=True)
    return Distribution(torch.where(keep, u - total.log(), -math.inf), unfiltered, sound)


def one_hot(draft_ids: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """[B, K, V]. Log-probs of a draft that could not have been another: greedy drafts, n-grams, or drafts whose
    probabilities nobody knows."""
    ids = torch.arange(vocab, device=draft_ids.device)
    return torch.where(ids == draft_ids[..., None], 0.0, -math.inf).to(dtype)


def log_ratios(log_p: Tensor, log_q: Tensor, draft_ids: Tensor) -> Tensor:
    """[B, K]. log p(x) - log q(x) of every draft x; -inf where p(x) or q(x) is 0."""
    index = draft_ids.to(torch.int64)[..., None]
    of_target = log_p[:, : draft_ids.shape[1]].gather(-1, index).squeeze(-1)
    of_draft = log_q.gather(-1, index).squeeze(-1)
    return torch.where((of_target > -math.inf) & (of_draft > -math.inf), of_target - of_draft, -math.inf)


def residual(log_p: Tensor, log_q: Tensor, scale: Tensor) -> Tensor:
    """[..., V]. max(scale p - q, 0), with a `scale` of [...]."""
    return (scale[..., None] * log_p.exp() - log_q.exp()).clamp(min=0.0)


def token_thresholds(ratios: Tensor) -> Tensor:
    """[B, K]. Draft i is accepted iff all before it are and its uniform lies below: min(p / q, 1)."""
    return ratios.exp().clamp(max=1.0)


def prefix_weights(ratios: Tensor) -> Tensor:
    """[B, K + 1]. P_0 = 1, P_i = min(P_{i-1} p(x_{i-1}) / q(x_{i-1}), 1) of the block rule."""
    log_weight = torch.zeros_like(ratios[:, :1]) if ratios.shape[1] else ratios.new_zeros(len(ratios), 1)
    found = [log_weight]
    for i in range(ratios.shape[1]):
        log_weight = (log_weight + ratios[:, i : i + 1]).clamp(max=0.0)
        found.append(log_weight)
    return torch.cat(found, 1).exp()


def block_thresholds(log_p: Tensor, log_q: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
    """[B, K]. The first i + 1 drafts are accepted iff uniform i lies below column i, and no later one below its own.

    h_i = S_i / (S_i + 1 - P_i) with S_i the mass of the residual at position i, and P at the row's last draft.
    """
    drafts = log_q.shape[1]
    inner = weights[:, 1:drafts]
    mass = residual(log_p[:, 1:drafts], log_q[:, 1:], inner).sum(-1)
    rest = mass + (1.0 - inner)
    inner_thresholds = torch.where(rest > 0.0, mass / rest, 1.0)
    thresholds = torch.cat([inner_thresholds, weights[:, drafts:]], 1)[:, :drafts]
    last = torch.arange(1, drafts + 1, device=lengths.device) == lengths[:, None]
    return torch.where(last, weights[:, 1:], thresholds)


def accepted_by_token(passed: Tensor) -> Tensor:
    """[B]. How many drafts come before the first that did not pass. [B, K] bool."""
    return passed.to(torch.int64).cumprod(1).sum(1)


def accepted_by_block(passed: Tensor) -> Tensor:
    """[B]. The number of drafts up to the last that passed. [B, K] bool."""
    places = torch.arange(passed.shape[1] + 1, device=passed.device)
    return (torch.nn.functional.pad(passed.to(torch.int64), (1, 0)) * places).amax(1)


def final_weights(log_p: Tensor, log_q: Tensor, scale: Tensor, num_accepted: Tensor, lengths: Tensor) -> Tensor:
    """[B, V]. What the token behind the accepted drafts is drawn from, not normalised: the residual at that position,
    or p behind the last draft and where the residual is zero by rounding. `scale` is [B]."""
    rows = torch.arange(len(num_accepted), device=num_accepted.device)
    target = log_p[rows, num_accepted]
    if log_q.shape[1] == 0:
        return target.exp()
    weights = residual(target, log_q[rows, num_accepted.clamp(max=log_q.shape[1] - 1)], scale)
    whole = (num_accepted == lengths) | (weights == 0.0).all(-1)
    return torch.where(whole[:, None], target.exp(), weights)


def race(weights: Tensor, exponentials: Tensor) -> Tensor:
    """[B]. Token j wins with probability w_j / sum w; the lowest of equals."""
    return torch.where(weights > 0.0, weights / exponentials, -1.0).argmax(-1)


class _Rows(NamedTuple):
    """What the rows say before any logit is looked at, each with what is out of range replaced."""

    lengths: Tensor  # [B] int64
    draft_ids: Tensor  # [B, K] int64
    temperatures: Tensor | None
    top_p: Tensor | None
    faulty: Tensor  # [B] bool


def _rows(
    target_logits: Tensor, draft_ids: Tensor, draft_lengths: Tensor | None, temperatures: Tensor | None,
    top_p: Tensor | None,
) -> _Rows:  # fmt: skip
    batch, drafts = draft_ids.shape
    if draft_lengths is None:
        draft_lengths = torch.full((batch,), drafts, device=draft_ids.device)
    faulty = (draft_lengths < 0) | (draft_lengths > drafts)
    lengths = draft_lengths.clamp(0, drafts).to(torch.int64)
    ids = draft_ids.to(torch.int64)
    inside = (ids >= 0) & (ids < target_logits.shape[-1])
    live = torch.arange(drafts, device=ids.device) < lengths[:, None]
    faulty = faulty | (live & ~inside).any(1)
    if temperatures is not None:
        positive = (temperatures > 0.0) & temperatures.isfinite()
        faulty, temperatures = faulty | ~positive, torch.where(positive, temperatures, 1.0)
    if top_p is not None:
        share = (top_p > 0.0) & (top_p <= 1.0)
        faulty, top_p = faulty | ~share, torch.where(share, top_p, 1.0)
    return _Rows(lengths, torch.where(live & inside, ids, 0), temperatures, top_p, faulty)


def verify_draft(
    target_logits: Tensor,
    draft_ids: Tensor,
    draft_logits: Tensor | None,
    draft_lengths: Tensor | None,
    temperatures: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    seeds: Tensor,
    offsets: Tensor | None,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Emitted tokens [B, K + 1], number of accepted drafts [B] and log-probs [B, K + 1], as `api.verify_draft` says."""
    drafts = draft_ids.shape[1]
    rows = _rows(target_logits, draft_ids, draft_lengths, temperatures, top_p)
    if mode == "greedy":
        target = distribution(target_logits, rows.temperatures, None, None)
        likeliest = target_logits.argmax(-1)
        passed = (rows.draft_ids == likeliest[:, :drafts]) & _live(rows)
        num_accepted = accepted_by_token(passed & target.sound[:, :drafts])
        num_accepted = torch.where(rows.faulty, 0, num_accepted)
        tokens = likeliest.gather(1, num_accepted[:, None])
        return _emit(rows, target, num_accepted, tokens, rows.faulty | ~_at(target.sound, num_accepted))

    filters = (rows.temperatures, top_k, rows.top_p)
    target = distribution(target_logits, *filters)
    if draft_logits is None:
        log_q = one_hot(rows.draft_ids, target_logits.shape[-1], target.log_probs.dtype)
        sound = target.sound[:, :drafts]
    else:
        log_q, _, draft_sound = distribution(draft_logits, *filters)
        sound = target.sound[:, :drafts] & draft_sound
    ratios = log_ratios(target.log_probs, log_q, rows.draft_ids)
    offsets = torch.zeros_like(seeds) if offsets is None else offsets
    uniform = noise_reference.uniforms(seeds, offsets, drafts, ratios.dtype)
    if mode == "token":
        passed = (uniform < token_thresholds(ratios)) & sound & _live(rows)
        num_accepted = torch.where(rows.faulty, 0, accepted_by_token(passed))
        scale = torch.ones_like(target.log_probs[:, 0, 0])
        broken = ~_at(torch.cat([sound, sound.new_ones(len(sound), 1)], 1), num_accepted)
        broken = broken & (num_accepted < rows.lengths)
    else:
        weights = prefix_weights(ratios)
        passed = (uniform < block_thresholds(target.log_probs, log_q, weights, rows.lengths)) & _live(rows)
        broken = (~sound & _live(rows)).any(1)
        num_accepted = torch.where(rows.faulty | broken, 0, accepted_by_block(passed))
        scale = _at(weights, num_accepted)
    broken = broken | rows.faulty | ~_at(target.sound, num_accepted)
    final = final_weights(target.log_probs, log_q, scale, num_accepted, rows.lengths)
    exponentials = noise_reference.exponentials(seeds, offsets + num_accepted, final.shape[-1], final.dtype)
    return _emit(rows, target, num_accepted, race(final, exponentials)[:, None], broken)


def _live(rows: _Rows) -> Tensor:
    """[B, K] bool. Which drafts there are."""
    return torch.arange(rows.draft_ids.shape[1], device=rows.lengths.device) < rows.lengths[:, None]


def _at(values: Tensor, position: Tensor) -> Tensor:
    """[B]. Of [B, R] values those at one position a row."""
    return values.gather(1, position[:, None]).squeeze(1)


def _emit(
    rows: _Rows, target: Distribution, num_accepted: Tensor, last: Tensor, broken: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs: accepted drafts, then `last` [B, 1]; -1 and NaN in its place where the row is `broken`."""
    position = torch.arange(rows.draft_ids.shape[1] + 1, device=last.device)
    before, there = position < num_accepted[:, None], position == num_accepted[:, None]
    tokens = torch.where(before, torch.nn.functional.pad(rows.draft_ids, (0, 1)), last)
    log_probs = target.unfiltered.gather(-1, tokens[..., None]).squeeze(-1)
    wrong = there & broken[:, None]
    tokens = torch.where((before | there) & ~wrong, tokens, -1)
    log_probs = torch.where(wrong, math.nan, torch.where(before | there, log_probs, 0.0))
    return tokens, num_accepted, log_probs
