"""The router in plain PyTorch: the definition, the oracle in float64, and the fallback on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels.moe_router.options import RouterOptions

EPSILON = 1e-20
"""Added to a sum of sigmoid or sqrtsoftplus scores that divides, as DeepSeek-V3 does."""


def ordered(key: Tensor) -> Tensor:
    """[...]. Integers in the order of the keys: NaN below -inf, -0 equal to 0. The lowest integer is left free."""
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[key.dtype]
    limits = torch.iinfo(integer)
    bits = (key + 0.0).view(integer)
    return torch.where(key.isnan(), limits.min + 1, torch.where(bits < 0, bits ^ limits.max, bits))


def best(ranks: Tensor, count: int) -> Tensor:
    """[..., count] int64. Where the largest `ranks` of the last axis are, in descending order; the lower index wins."""
    return ranks.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def live_top_k(key: Tensor, top_k: int, n_group: int, topk_group: int, group_score: str) -> Tensor:
    """[T, K] int64. The best experts of the best groups, in descending order of their keys."""
    ranks = ordered(key)
    if n_group > 1:
        shape = (key.shape[0], n_group, key.shape[1] // n_group)
        grouped = key.view(shape)
        two = group_score == "top2_sum" and grouped.shape[-1] > 1
        winners = grouped.gather(-1, best(ordered(grouped), 2 if two else 1))
        value = winners[..., 0] + winners[..., 1] if two else winners[..., 0]
        kept = torch.zeros_like(value, dtype=torch.bool).scatter(-1, best(ordered(value), topk_group), True)
        lowest = torch.iinfo(ranks.dtype).min
        ranks = torch.where(kept[..., None], ranks.view(shape), lowest).view(key.shape)
    return best(ranks, top_k)


def scores(z: Tensor, scoring_func: str) -> Tensor:
    """[T, E]. The score of every expert; of "topk_softmax" the logit, which ranks alike."""
    if scoring_func == "softmax":
        return torch.softmax(z, dim=-1)
    if scoring_func == "topk_softmax":
        return z
    if scoring_func == "sigmoid":
        return torch.sigmoid(z)
    small = z < -30.0  # sqrt(log(1 + t)) = sqrt(t) (1 - t / 4) there, t = e^z: differentiable down to -inf
    low = torch.where(small, z, -30.0)
    high = torch.where(small, 0.0, z)
    near_zero = torch.exp(low / 2) * (1.0 - torch.exp(low) / 4)
    return torch.where(small, near_zero, torch.logaddexp(high, torch.zeros_like(high)).sqrt())


def replay(live_ids: Tensor, replay_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ids of every slot, whether a token's set differs from the live one, and whether its replay is faulty.

    A slot that is -1, out of range or a repetition takes the best live expert that is not replayed.
    """
    ids = replay_ids.to(torch.int64)
    inside = (ids >= 0) & (ids < experts)
    equal = (ids[:, :, None] == ids[:, None, :]) & inside[:, :, None]
    repeated = equal.tril(-1).any(dim=-1)
    given = inside & ~repeated
    faulty = ((ids != -1) & ~given).any(dim=-1)

    taken = torch.zeros(ids.shape[0], experts + 1, dtype=torch.bool, device=ids.device)
    taken = taken.scatter(1, torch.where(given, ids, experts), True)
    used = taken.gather(1, live_ids)
    spare = live_ids.gather(1, used.to(torch.uint8).sort(dim=1, stable=True).indices)
    turn = ((~given).cumsum(dim=1) - 1).clamp(min=0)
    # What fills the other slots is live: the sets differ where a replayed id is not.
    live = torch.zeros_like(taken).scatter(1, live_ids, True)
    differs = (given & ~live.gather(1, torch.where(given, ids, experts))).any(dim=1)
    return torch.where(given, ids, spare.gather(1, turn)), differs, faulty


def weights_at(z: Tensor, score: Tensor, ids: Tensor, options: RouterOptions) -> Tensor:
    """[T, K]. The weights of the chosen experts, from the logits and the scores of this pass."""
    if options.over_chosen:
        weights = torch.softmax(z.gather(1, ids), dim=-1)
    else:
        weights = score.gather(1, ids)
        if options.norm_topk_prob and options.scoring_func != "softmax":
            weights = weights / (weights.sum(dim=-1, keepdim=True) + EPSILON)
    return weights * options.routed_scaling_factor


def sequence_of(cu_seqlens: Tensor | None, tokens: int, device: torch.device) -> tuple[Tensor, int]:
    """[T] int64: the sequence of every token, B where it has none; and B."""
    if cu_seqlens is None:
        return torch.zeros(tokens, dtype=torch.int64, device=device), 1
    batch = cu_seqlens.shape[0] - 1
    position = torch.arange(tokens, device=device, dtype=cu_seqlens.dtype)
    index = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    return torch.where(position >= cu_seqlens[0], index, batch), batch


def counts(ids: Tensor, live: Tensor, experts: int, rows: Tensor | None = None, row_count: int = 1) -> Tensor:
    """[row_count, E] int32. How many slots of live tokens each expert has, of all tokens or by the token's row."""
    flat = ids if rows is None else ids + rows[:, None] * experts
    total = torch.zeros(row_count * experts, dtype=torch.int32, device=ids.device)
    ones = live[:, None].to(torch.int32).expand(ids.shape)
    return total.scatter_add(0, flat.reshape(-1), ones.reshape(-1)).view(row_count, experts)


def losses(
    z: Tensor, live: Tensor, per_expert: Tensor, cu_seqlens: Tensor | None, logits: Tensor, options: RouterOptions
) -> Tensor:
    """[3]. z-loss, auxiliary loss and sequence-wise balance loss, without coefficients; 0 where not asked for.

    Both balance losses are sums over tokens of <column, p>, with a column of coefficients for every expert that comes
    from counts alone: no gradient flows through it.
    """
    tokens, experts = z.shape
    zero = z.new_zeros(())
    live_tokens = live.sum().clamp(min=1).to(z.dtype)
    results = [zero, zero, zero]
    if options.z_loss:
        largest = z.detach().amax(dim=-1)
        lse = largest + (z - largest[:, None]).exp().sum(dim=-1).log()
        results[0] = torch.where(live, lse * lse, 0.0).sum() / live_tokens
    if options.aux_loss or options.seq_aux_loss:
        if options.scoring_func in ("softmax", "topk_softmax"):
            p = torch.softmax(z, dim=-1)
        else:
            score = scores(z, options.scoring_func)
            p = score / (score.sum(dim=-1, keepdim=True) + EPSILON)
    if options.aux_loss:
        column = per_expert.to(z.dtype) * (experts / options.top_k) / (live_tokens * live_tokens)
        results[1] = torch.where(live, (p * column).sum(dim=-1), 0.0).sum()
    if options.seq_aux_loss:
        sequence, batch = sequence_of(cu_seqlens, tokens, z.device)
        ids = best(ordered(logits), options.top_k)  # every score rises with the logit, and the logit does not saturate
        chosen = counts(ids, live, experts, sequence, batch + 1).to(z.dtype)
        length = torch.zeros(batch + 1, dtype=torch.int32, device=z.device)
        length = length.scatter_add(0, sequence, live.to(torch.int32))
        nonempty = (length[:batch] > 0).sum().clamp(min=1).to(z.dtype)
        square = length.clamp(min=1).to(z.dtype).square()
        columns = chosen * (experts / options.top_k) / (square * nonempty)[:, None]
        counted = live & (sequence < batch)
        results[2] = torch.where(counted, (p * columns[sequence]).sum(dim=-1), 0.0).sum()
    return torch.stack(results)


def moe_router(
    logits: Tensor,
    bias: Tensor | None,
    token_mask: Tensor | None,
    replay_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    options: RouterOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """topk_weights, topk_ids, tokens_per_expert, losses [3] and replay_mismatch, as `api.moe_router` says."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tokens, experts = logits.shape
    live = token_mask if token_mask is not None else torch.ones(tokens, dtype=torch.bool, device=logits.device)
    x = torch.where(live[:, None], logits.to(dtype), 0.0)  # a masked row may hold anything; its gradient is exactly 0
    plain = x.detach()
    broken = (plain.isnan() | (plain == float("inf"))).any(dim=-1)

    key = plain
    if bias is not None or options.n_group > 1:
        key = scores(plain, options.scoring_func)
        key = key if bias is None else key + bias.to(dtype)
    ids = live_top_k(key, options.top_k, options.n_group, options.topk_group, options.group_score)
    mismatch = torch.zeros((), dtype=torch.int32, device=logits.device)
    if replay_ids is not None:
        ids, differs, faulty = replay(ids, replay_ids, experts)
        broken = broken | (faulty & live)
        mismatch = (differs & live).sum(dtype=torch.int32)
    per_expert = counts(ids, live, experts)[0]

    if options.scoring_func in ("softmax", "topk_softmax"):
        summed = plain.gather(1, ids) if options.over_chosen else plain
        broken = broken | (summed.amax(dim=-1) == -float("inf"))

    # Everything that has a gradient comes from z: a broken row is NaN in all its weights and in all its gradient.
    z = x * torch.where(broken, float("nan"), 1.0).to(dtype)[:, None]
    weights = torch.where(live[:, None], weights_at(z, scores(z, options.scoring_func), ids, options), 0.0)
    wanted = losses(z, live, per_expert, cu_seqlens, plain, options)
    return weights, torch.where(live[:, None], ids, -1).to(torch.int32), per_expert, wanted, mismatch
