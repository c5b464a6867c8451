"""The reference of grpo_loss against the published formulas, written here sequence by sequence without its code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels.grpo_loss import GRPOLossConfig
from grpo_kernels.grpo_loss.batch_statistics import entropy_threshold
from grpo_kernels.grpo_loss.choices import REDUCTIONS
from python_tests.samples.grpo_loss import VARIANTS, batch, call, config_of, pack

LEAVES = ("log_probs", "entropy")


def _dppo_keeps(c: GRPOLossConfig, lp: float, old: float, a: float) -> bool:
    p, q = math.exp(lp), math.exp(old)
    high = c.clip_low if c.clip_high is None else c.clip_high
    if c.surrogate == "dppo_tv":
        return p <= q + high if a > 0 else p >= q - c.clip_low
    other, old_other = max(1 - p, 0.0), max(1 - q, 0.0)
    kl = q * (old - lp) + old_other * math.log((old_other + 1e-8) / (other + 1e-8))
    return (p <= q or kl <= high) if a > 0 else (p >= q or kl <= c.clip_low)


def _policy(c: GRPOLossConfig, lp: Tensor, lr: Tensor, r: Tensor, a: Tensor, log_s: Tensor | None) -> Tensor:
    low, high = 1 - c.clip_low, 1 + (c.clip_low if c.clip_high is None else c.clip_high)
    if c.surrogate == "gmpo":
        parts = [
            x.clamp(max=high - 1) if b > 0 else x.clamp(min=low - 1) if b < 0 else 0 * x
            for x, b in zip(lr, a.tolist(), strict=True)
        ]
        return -torch.exp(sum(parts, torch.zeros(())) / max(len(parts), 1)) * a
    if c.surrogate in ("dppo_tv", "dppo_kl"):
        lps, lrs, advantages = lp.detach(), lr.detach().tolist(), a.tolist()
        keeps = [_dppo_keeps(c, x, x - g, b) for x, g, b in zip(lps.tolist(), lrs, advantages, strict=True)]
        bounded = r.detach() if c.ratio_cap is None else r.detach().clamp(max=c.ratio_cap)
        return -a * bounded * torch.tensor(keeps, dtype=torch.float64) * lp
    if c.surrogate == "dro":
        return c.dro_beta / 2 * lr**2 - lp * a
    if c.surrogate == "kl_cov":
        return -r * a
    if c.surrogate in ("ppo_clip", "clip_cov"):
        loss = -torch.min((r if c.delta is None else r.clamp(max=c.delta)) * a, r.clamp(low, high) * a)
        return loss if c.dual_clip is None else torch.where(a < 0, torch.min(loss, -c.dual_clip * a), loss)
    if c.surrogate == "cispo":
        bounded = r.clamp(low, high) if c.ratio_cap is None else r.clamp(max=c.ratio_cap)
        return -bounded.detach() * a * lp
    if c.surrogate == "sapo":
        taus = [c.sapo_temperature_pos if x > 0 else c.sapo_temperature_neg for x in a.tolist()]
        tau = torch.tensor(taus, dtype=torch.float64)
        return -4 / tau * torch.sigmoid(tau * (r - 1)) * a
    if c.surrogate == "vespo":
        log_w = lr.detach().clamp(-20, 20).sum()
        if log_s is not None:
            log_w = log_w + log_s.clamp(math.log(1e-8), 20).sum()
        log_w = log_w.clamp(math.log(1e-8), 20).item()
        phi = [
            math.exp(lam + k * log_w - lam * math.exp(log_w))
            for k, lam in (
                (c.vespo_k_pos, c.vespo_lambda_pos) if x >= 0 else (c.vespo_k_neg, c.vespo_lambda_neg)
                for x in a.tolist()
            )
        ]
        return -torch.tensor(phi, dtype=torch.float64) * a * lp
    return -a * lp


def _kl(c: GRPOLossConfig, lp: Tensor, ref: Tensor, r: Tensor) -> Tensor:
    x = ref - lp
    if c.kl_log_ratio_clamp is not None:
        x = x.clamp(-c.kl_log_ratio_clamp, c.kl_log_ratio_clamp)
    kl = {"k1": -x, "k2": x**2 / 2, "k3": torch.exp(x) - x - 1, "abs": x.abs()}[c.kl_estimator.rstrip("+")]
    if c.kl_value_clamp is not None:
        kl = kl.clamp(-c.kl_value_clamp, c.kl_value_clamp)
    if c.kl_estimator.endswith("+"):
        k2 = (lp - ref) ** 2 / 2
        kl = k2 - k2.detach() + kl.detach()
    return kl * r if c.kl_importance_weighted else kl


def _clamps(c: GRPOLossConfig) -> tuple[float, float]:
    low = -math.inf if c.log_ratio_min is None else c.log_ratio_min
    return low, math.inf if c.log_ratio_max is None else c.log_ratio_max


def _selected(c: GRPOLossConfig, inputs: dict[str, Tensor | None]) -> Tensor:
    """[B, T] bool: the tokens of "clip_cov" (all candidates) and "kl_cov"; one by one, in plain numbers."""
    mask, lp, old = inputs["mask"], inputs["log_probs"].detach(), inputs["old_log_probs"]
    selected = torch.zeros_like(mask)
    if c.surrogate not in ("clip_cov", "kl_cov"):
        return selected
    a = inputs["advantages"] if inputs["advantages"].ndim == 2 else inputs["advantages"][:, None].expand(lp.shape)
    places = mask.nonzero().tolist()
    mean_a, mean_lp = a[mask].mean().item(), lp[mask].mean().item()
    covariance = {(b, t): (a[b, t].item() - mean_a) * (lp[b, t].item() - mean_lp) for b, t in places}
    if c.surrogate == "kl_cov":
        count = max(int(c.kl_cov_ratio * len(places)), 1)
        chosen = sorted(covariance, key=lambda place: -covariance[place])[:count]
    else:
        chosen = []
        for b, t in covariance:
            lr = (lp - old)[b][mask[b]]
            r = math.exp(lr.mean() if c.ratio_level == "sequence" else (lp - old)[b, t])
            clipped = r < 1 - c.clip_low if a[b, t] < 0 else r > 1 + (c.clip_high or c.clip_low)
            if c.clip_cov_low < covariance[b, t] < c.clip_cov_high and not (clipped and a[b, t] != 0):
                chosen.append((b, t))
    for b, t in chosen:
        selected[b, t] = True
    return selected


def _sequence(c: GRPOLossConfig, tokens: dict[str, Tensor | None], threshold: float) -> Tensor:
    """Losses of the live tokens of one sequence."""
    lp, a = tokens["log_probs"], tokens["advantages"]
    old = lp.detach() if tokens["old_log_probs"] is None else tokens["old_log_probs"]
    sampler = tokens["sampler_log_probs"]
    lr = lp - old
    log_r = lr if c.ratio_level == "token" else (lr.sum() / max(len(lr), 1)).expand_as(lr)
    if c.ratio_level == "sequence_token":
        log_r = log_r.detach() + lp - lp.detach()
    r = torch.exp(log_r.clamp(*_clamps(c)))
    log_s, s = None, None
    if c.sampler_correction != "none":
        level, kind = c.sampler_correction.split("_")
        gap = old - sampler if level == "token" else (old - sampler).sum().expand_as(old)
        s = torch.exp(gap)
        low, high = c.sampler_floor or 0.0, math.inf if c.sampler_cap is None else c.sampler_cap
        s = s.clamp(low, high) if kind == "truncate" else s * ((s >= low) & (s <= high))
        log_s = torch.log(s)
    loss = _policy(c, lp, lr, r, a, log_s)
    if c.surrogate == "kl_cov":
        loss = loss + c.kl_cov_coef * lr.abs() * tokens["selected"]
    if c.surrogate == "clip_cov":
        loss = loss * ~tokens["selected"]
    if c.off_policy_threshold is not None:
        drift = ((old if sampler is None else sampler) - lp.detach()).sum() / max(len(lp), 1)
        loss = loss * ((a >= 0) | (drift <= c.off_policy_threshold))
    if c.top_entropy_quantile < 1:
        loss = loss * (tokens["entropy"] >= threshold)
    if s is not None and c.surrogate != "vespo":
        loss = loss * s
    if tokens["token_weights"] is not None:
        loss = loss * tokens["token_weights"]
    return loss + c.kl_coef * _kl(c, lp, tokens["ref_log_probs"], r) if c.kl_coef else loss


def definition(c: GRPOLossConfig, inputs: dict[str, Tensor | None], num_items: float | None = None) -> Tensor:
    mask, entropy = inputs["mask"], inputs["entropy"]
    threshold = torch.quantile(entropy[mask], 1 - c.top_entropy_quantile).item()
    inputs = {**inputs, "selected": _selected(c, inputs)}
    rows = []
    for b, live in enumerate(mask):
        tokens = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                tokens[name] = value[b][live] if value[b].shape == live.shape else value[b].expand(live.shape)[live]
            else:
                tokens[name] = None
        rows.append((_sequence(c, tokens, threshold), tokens["entropy"], live))
    kept = [h * (h >= threshold) if c.top_entropy_quantile < 1 else h for _, h, _ in rows]
    if c.reduction == "none":
        out = torch.zeros(mask.shape, dtype=torch.float64)
        for b, (loss, _, live) in enumerate(rows):
            out = out.index_put(
                (torch.full((int(live.sum()),), b), live.nonzero()[:, 0]), loss - c.entropy_coef * kept[b]
            )
        return out
    sums = torch.stack([loss.sum() for loss, _, _ in rows])
    if c.entropy_reduction == "loss":
        sums = sums - c.entropy_coef * torch.stack([h.sum() for h in kept])
    if c.reduction == "token_sum":
        loss = sums.sum()
    elif c.reduction == "token_mean":
        loss = sums.sum() / (num_items or int(mask.sum()))
    else:
        if c.reduction == "sequence_mean_token_mean":
            sums = sums / mask.sum(1).clamp(min=1)
        if c.reduction == "sequence_mean_token_sum_norm":
            sums = sums / (c.max_length or mask.shape[1])
        filled = sum(bool(live.any()) for _, _, live in rows)
        loss = sums.sum() / (num_items or (filled if c.skip_empty_sequences else len(rows)))
    if c.entropy_reduction == "loss":
        return loss
    number = sum(int(((h >= threshold) | (c.top_entropy_quantile == 1)).sum()) for _, h, _ in rows)
    return loss - c.entropy_coef * sum(h.sum() for h in kept) / number


def value_and_gradients(function, inputs: dict[str, Tensor | None]) -> tuple[Tensor, list[Tensor]]:
    """The function's result, and the gradients of an uneven weighting of it."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in LEAVES}
    value = function({**inputs, **leaves})
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    gradients = torch.autograd.grad((value * weights).sum(), list(leaves.values()), materialize_grads=True)
    return value.detach(), list(gradients)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_follows_the_formulas(variant: str, reduction: str) -> None:
    config, inputs = config_of(variant, reduction), batch(variant)
    value, gradients = value_and_gradients(lambda x: definition(config, x), inputs)
    with grpo_kernels.backend("reference"):
        actual, actual_gradients = value_and_gradients(lambda x: call(x, config).loss, inputs)
    torch.testing.assert_close(actual, value, rtol=1e-12, atol=1e-14)
    for ours, expected in zip(actual_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-14)
    assert value.abs().max() > 1e-3
    assert gradients[0].abs().max() > 1e-4


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_sequences_give_the_same(variant: str, reduction: str) -> None:
    config, inputs = config_of(variant, reduction), batch(variant)
    packed, cu_seqlens = pack(inputs)
    inside = slice(int(cu_seqlens[0]), int(cu_seqlens[-1]))
    with grpo_kernels.backend("reference"):
        value, gradients = value_and_gradients(lambda x: call(x, config).loss, inputs)
        loss = call(packed, config, cu_seqlens=cu_seqlens).loss
        part = inside if reduction == "none" else ...
        actual, actual_gradients = value_and_gradients(
            lambda x: call(x, config, cu_seqlens=cu_seqlens).loss[part].view(value.shape), packed
        )
    if reduction == "none":
        assert not loss[: inside.start].any()
        assert not loss[inside.stop :].any()
    torch.testing.assert_close(actual, value, rtol=1e-12, atol=1e-14)
    for ours, expected in zip(actual_gradients, gradients, strict=True):
        assert not ours[: inside.start].any()
        assert not ours[inside.stop :].any()
        torch.testing.assert_close(ours[inside].view(expected.shape), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("reduction", [r for r in REDUCTIONS if r not in ("none", "token_sum")])
def test_num_items_replaces_the_count(reduction: str) -> None:
    config, inputs = config_of("ppo", reduction), batch()
    expected = definition(config, inputs, num_items=100.0)
    with grpo_kernels.backend("reference"):
        for number in (100, 100.0, torch.tensor(100.0), torch.tensor(100)):
            torch.testing.assert_close(call(inputs, config, num_items=number).loss, expected, rtol=1e-12, atol=0)
        for absent in (0, torch.tensor(0.0)):
            torch.testing.assert_close(call(inputs, config, num_items=absent).loss, call(inputs, config).loss)


def test_max_length_from_config_and_argument() -> None:
    inputs = batch()
    config = GRPOLossConfig(reduction="sequence_mean_token_sum_norm", max_length=50)
    with grpo_kernels.backend("reference"):
        torch.testing.assert_close(call(inputs, config).loss, definition(config, inputs))
        expected = definition(GRPOLossConfig(reduction="sequence_mean_token_sum_norm", max_length=7), inputs)
        torch.testing.assert_close(call(inputs, config, max_length=7).loss, expected)


def test_coefficients_as_arguments_override_the_config() -> None:
    inputs = batch()
    config = GRPOLossConfig(kl_coef=0.5, entropy_coef=0.5)
    expected = definition(GRPOLossConfig(kl_coef=0.1, entropy_coef=0.3), inputs)
    with grpo_kernels.backend("reference"):
        for kl, bonus in ((0.1, 0.3), (torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))):
            torch.testing.assert_close(call(inputs, config, kl_coef=kl, entropy_coef=bonus).loss, expected)
        inputs["ref_log_probs"] = inputs["entropy"] = None
        torch.testing.assert_close(
            call(inputs, config, kl_coef=0.0, entropy_coef=0.0).loss, definition(GRPOLossConfig(), batch())
        )


def test_entropy_threshold_is_torch_quantile_over_live_tokens() -> None:
    for dtype in (torch.float32, torch.float64):
        for seed in range(5):
            entropy, mask = torch.rand(7, 11, dtype=dtype), torch.rand(7, 11) > 0.1 * seed
            noisy = torch.where(mask, entropy, float("nan"))
            for keep in (0.0, 0.2, 0.25, 0.5, 0.99, 1.0):
                expected = torch.quantile(entropy[mask], 1.0 - keep)
                assert torch.equal(entropy_threshold(noisy, mask, None, keep), expected)
    nothing = torch.zeros(3, 2, dtype=torch.bool)
    assert entropy_threshold(torch.ones(3, 2), nothing, None, 0.5) == math.inf
    assert entropy_threshold(torch.ones(0, 2), None, None, 0.5) == math.inf
