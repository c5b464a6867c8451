"""The tokens that "clip_cov" and "kl_cov" choose: how many, which, and with what randomness."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from grpo_kernels import GRPOLossConfig, grpo_loss
from grpo_kernels.grpo_loss.batch_statistics import selected_tokens
from grpo_kernels.grpo_loss.inputs import Subject, loss_inputs

NAN, INF = math.nan, math.inf


def selected(config: GRPOLossConfig, log_probs: Tensor, advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    inputs = loss_inputs(
        Subject("test", log_probs),
        config,
        len(log_probs),
        None,
        advantages,
        mask,
        ref_log_probs=None,
        sampler_log_probs=None,
        token_weights=None,
        entropy=None,
        kl_coef=None,
        entropy_coef=None,
        cu_seqlens=None,
        num_items=None,
        max_length=None,
    )
    return selected_tokens(inputs, config)


def kl_cov(ratio: float, **fields: Any) -> GRPOLossConfig:
    return GRPOLossConfig(surrogate="kl_cov", kl_cov_ratio=ratio, **fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("share", "count"), [(1e-6, 1), (0.1, 2), (0.15, 3), (0.29, 5), (0.5, 10), (1.0, 20)], ids=str)
def test_exactly_the_share_of_the_live_tokens_and_at_least_one(share: float, count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    lp, a = (torch.randn(4, 7, generator=generator, dtype=dtype) for _ in range(2))
    mask = torch.arange(28).view(4, 7) % 7 < 5
    for equal in (False, True):  # all covariances are equal: the first tokens
        chosen = selected(kl_cov(share), torch.zeros_like(lp) if equal else lp, a, mask)
        assert chosen.dtype == dtype
        assert chosen.sum() == count
        assert not chosen[~mask].any()
        order = chosen[mask]
        if equal:
            assert order[:count].all()
        else:
            covariance = (a[mask] - a[mask].mean()) * (lp[mask] - lp[mask].mean())
            assert order[covariance.topk(count).indices].all()


def test_log_probs_without_a_covariance_are_not_chosen() -> None:
    lp = torch.tensor([[-1.0, -INF, NAN, -3.0], [-0.5, INF, -2.0, -1.0]])
    a = torch.tensor([[2.0, 2.0, 2.0, NAN], [-1.0, -1.0, INF, -2.0]])
    chosen = selected(kl_cov(1.0), lp, a)
    assert chosen.tolist() == [[1, 0, 0, 0], [1, 0, 0, 1]]
    config = kl_cov(1.0, reduction="none", kl_cov_coef=1.0)
    loss = grpo_loss(lp, lp - 0.5, a, None, config).loss
    assert loss[0, 0] == pytest.approx(-2 * math.exp(0.5) + 0.5)  # NaN stays in its token
    assert loss.isnan().tolist() == [[False, False, True, True], [False, False, False, False]]


def test_nothing_to_choose_from() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for config in (kl_cov(1.0), GRPOLossConfig(surrogate="clip_cov", clip_cov_low=-9.0)):
        lp = torch.randn(2, 3, requires_grad=True)
        assert not selected(config, lp.detach(), torch.randn(2), nothing).any()
        output = grpo_loss(lp, None, torch.randn(2), nothing, config)
        assert output.loss == 0
        assert not torch.autograd.grad(output.loss, lp)[0].any()
        for shape in ((0, 3), (2, 0)):
            assert selected(config, torch.zeros(shape), torch.zeros(shape[0])).shape == shape


def clip_cov(ratio: float, **fields: Any) -> GRPOLossConfig:
    return GRPOLossConfig(surrogate="clip_cov", clip_cov_ratio=ratio, clip_cov_low=0.0, **fields)


def test_every_candidate_is_drawn_as_often() -> None:
    """4000 draws of 2 among 8 candidates: 1000 each, give or take five standard deviations of 27."""
    lp = torch.tensor([[-2.0, -1.0] * 8])
    a = torch.tensor([[-1.0, 1.0] * 4 + [1.0, -1.0] * 4])  # the covariance is positive in the first half
    torch.manual_seed(0)
    draws = torch.stack([selected(clip_cov(0.125), lp, a) for _ in range(4000)]).view(4000, 16)
    assert (draws.sum(1) == 2).all()
    assert not draws[:, 8:].any()
    assert (draws[:, :8].sum(0) - 1000).abs().max() < 5 * 27.4


def test_draws_are_those_of_the_default_generator() -> None:
    lp, a = torch.randn(8, 50), torch.randn(8)
    first, again, other = ((torch.manual_seed(seed), selected(clip_cov(0.05), lp, a))[1] for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 < first.sum() <= 20


def test_a_dropped_token_has_neither_loss_nor_gradient() -> None:
    lp, a = torch.randn(8, 50).requires_grad_(), torch.randn(8)
    config = clip_cov(0.2, reduction="none")
    torch.manual_seed(3)
    chosen = selected(config, lp.detach(), a) != 0
    torch.manual_seed(3)
    output = grpo_loss(lp, None, a, None, config)
    (gradient,) = torch.autograd.grad(output.loss.sum(), lp)
    expected = torch.where(chosen, 0, -a[:, None])
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(gradient, expected)
    assert output.metrics.to_dict()["capped_fraction"] == pytest.approx(chosen.float().mean().item())


def test_clipped_tokens_are_no_candidates() -> None:
    """A ratio of e^0.5 is outside of 1.2 where the advantage is positive, and of e^-0.5 where it is negative."""
    lp = torch.tensor([[-2.0, -1.0, -2.0, -1.0]])
    old, a = lp + torch.tensor([[0.5, -0.5, -0.5, 0.5]]), torch.tensor([[-1.0, 1.0, -1.0, 1.0]])
    loss = grpo_loss(lp, old, a, None, clip_cov(1.0, reduction="none")).loss
    assert loss.tolist() == [[pytest.approx(0.8), pytest.approx(-1.2), 0.0, 0.0]]


@pytest.mark.parametrize("surrogate", ["clip_cov", "kl_cov"])
def test_compiled_calls_do_not_recompile(surrogate: str, native_cpu: None) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    config = GRPOLossConfig.preset(surrogate)

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def compiled(lp: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        return grpo_loss(lp, old, advantages, None, config).loss

    for step in range(2, 9):
        lp, old = (-torch.rand(3, 2 * step) for _ in range(2))
        advantages = torch.randn(3)
        torch.manual_seed(step)
        actual = compiled(lp.requires_grad_(), old, advantages)
        torch.manual_seed(step)
        expected = grpo_loss(lp, old, advantages, None, config).loss
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, lp)[0] for loss in (actual, expected)))
    assert counter.frame_count <= 2
