"""docs/openrlhf.md, against the signatures and the documented formulas of OpenRLHF 0.11.2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from python_tests.trainer_docs import arguments, assert_equal_to, assert_signature, blocks, ragged, run, stand_in

# Read in the wheel of openrlhf 0.11.2, files openrlhf/models/{loss,utils}.py.
CONSTRUCTOR = (
    "(self, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, token_level_loss=True, policy_loss_type='ppo', "
    "is_correction_level='off', is_correction_mode='mask', is_correction_gating='ratio', "
    "is_correction_threshold=(0.5, 5.0))"
)
FORWARD = (
    "(self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, dp_size=1, "
    "batch_num_tokens=None, global_batch_size=None)"
)
FUNCTIONS = {"log_probs_from_logits": "(logits, labels, temperature=1.0)", "compute_entropy": "(logits)"}

OPTIONS: list[dict[str, Any]] = [
    {},
    {"clip_eps_high": 0.4, "dual_clip": 1.5},
    {"token_level_loss": False},
    {"policy_loss_type": "gspo", "clip_eps_low": 0.05, "clip_eps_high": 0.1},
    {"policy_loss_type": "gspo", "is_correction_level": "token"},
    {"is_correction_level": "token", "is_correction_threshold": (0.8, 1.3), "dual_clip": 1.5},
    {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.8, 1.3)},
    {"is_correction_level": "seq", "is_correction_threshold": (0.9, 1.2), "token_level_loss": False},
    {"is_correction_level": "token", "is_correction_gating": "binary_kl", "is_correction_threshold": (0.0, 0.02)},
    {"is_correction_level": "seq", "is_correction_gating": "binary_kl", "is_correction_threshold": (0.0, 0.05)},
    {"is_correction_level": "token", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.1)},
    {"is_correction_level": "seq", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.12)},
]


class PolicyLoss(nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in arguments(CONSTRUCTOR, self, *args, **kwargs).items():
            if name != "self":
                setattr(self, name, value)
        if self.policy_loss_type == "gspo":
            self.token_level_loss = False


def masked_mean(tensor: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    return tensor.mean(dim) if mask is None else (tensor * mask).sum(dim) / mask.sum(dim)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    stand_in(monkeypatch, "openrlhf.models.loss", PolicyLoss=PolicyLoss)
    stand_in(monkeypatch, "openrlhf.models.utils", masked_mean=masked_mean)
    return run("openrlhf.md")


def statistic_weights(loss: Any, old: Tensor, rollout: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of one sequence's live tokens, and which units are inside the band."""
    low, high = loss.is_correction_threshold
    ratio = (old - rollout).exp()
    p, q = rollout.exp().clamp(1e-6, 1 - 1e-6), old.exp().clamp(1e-6, 1 - 1e-6)
    by_token = {
        "ratio": old - rollout,
        "tv": (p - q).abs(),
        "binary_kl": p * p.log() - p * q.log() + (1 - p) * (1 - p).log() - (1 - p) * (1 - q).log(),
    }[loss.is_correction_gating]
    unit = by_token.mean() if loss.is_correction_level == "seq" else by_token
    unit = unit.exp() if loss.is_correction_gating == "ratio" else unit
    inside = (low <= unit) & (unit <= high)
    if loss.is_correction_mode == "clip":
        return unit.clamp(low, high), inside
    return ratio * inside, inside


def definition(loss: Any, data: dict[str, Tensor], items: float | None) -> Callable[[Tensor, torch.dtype], Tensor]:
    """The loss as a function of the log-probs: one sequence at a time, over its live tokens alone."""

    def value(log_probs: Tensor, dtype: torch.dtype) -> Tensor:
        total, tokens, sequences = torch.zeros((), dtype=dtype), 0, 0
        for row, live in enumerate(data["mask"]):
            old, rollout, advantage = (data[name][row, live].to(dtype) for name in ("old", "sampler", "advantages"))
            corrected = loss.is_correction_level != "off"
            if not live.any():
                continue
            if loss.policy_loss_type == "gspo":
                ratio = (log_probs[row, live] - (rollout if corrected else old)).mean().exp()
                corrected = False
            else:
                ratio = (log_probs[row, live] - old).clamp(-20, 20).exp()
            bounded = ratio.clamp(1 - loss.clip_eps_low, 1 + loss.clip_eps_high)
            gain = torch.minimum(ratio * advantage, bounded * advantage)
            if loss.dual_clip is not None:
                gain = torch.where(advantage < 0, torch.maximum(gain, loss.dual_clip * advantage), gain)
            if corrected:
                gain = gain * statistic_weights(loss, old, rollout)[0]
            total = total - (gain.sum() if loss.token_level_loss else gain.mean())
            tokens, sequences = tokens + len(old), sequences + 1
        return total / (items or (tokens if loss.token_level_loss else sequences))

    return value


def call(loss: Any, data: dict[str, Tensor], log_probs: Tensor, **counts: Any) -> tuple[Any, ...]:
    return loss(log_probs, data["old"], data["advantages"], data["mask"], data["sampler"], **counts)


def test_signatures(page: dict[str, Any]) -> None:
    assert_signature(page["FusedPolicyLoss"].forward, FORWARD)
    for name, text in FUNCTIONS.items():
        assert_signature(page[name], text)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradient(page: dict[str, Any], options: dict[str, Any]) -> None:
    data, loss = ragged(6, 9), page["FusedPolicyLoss"](**options)
    assert_equal_to(lambda x: call(loss, data, x)[0], definition(loss, data, None), data["log_probs"])
    counts = {"dp_size": 2, "batch_num_tokens": torch.tensor(31.0), "global_batch_size": torch.tensor(7.0)}
    items = (31.0 if loss.token_level_loss else 7.0) / 2
    assert_equal_to(lambda x: call(loss, data, x, **counts)[0], definition(loss, data, items), data["log_probs"])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_other_results(page: dict[str, Any], options: dict[str, Any]) -> None:
    data, loss = ragged(6, 9), page["FusedPolicyLoss"](**options)
    _, clip_ratio, ppo_kl, vllm_kl, filtered = call(loss, data, data["log_probs"])
    mask, old, advantages = data["mask"], data["old"], data["advantages"]
    gap = data["log_probs"] - old
    torch.testing.assert_close(ppo_kl, -gap[mask].mean())
    gspo, corrected = loss.policy_loss_type == "gspo", loss.is_correction_level != "off"
    if gspo:
        gap = data["log_probs"] - (data["sampler"] if corrected else old)
        gap = torch.stack([row[live].mean().expand(9) for row, live in zip(gap, mask, strict=True)])
    clipped = (gap.exp() > 1 + loss.clip_eps_high) & (advantages > 0)
    clipped |= (gap.exp() < 1 - loss.clip_eps_low) & (advantages < 0)
    torch.testing.assert_close(clip_ratio, clipped[mask].float().mean())
    assert 0 < clip_ratio < 1
    if not corrected or gspo:
        assert vllm_kl is None
        assert filtered is None
        return
    torch.testing.assert_close(vllm_kl, (data["sampler"] - old)[mask].mean())
    inside = [
        statistic_weights(loss, o[live], s[live])[1].reshape(-1)
        for o, s, live in zip(old, data["sampler"], mask, strict=True)
    ]
    torch.testing.assert_close(filtered, (~torch.cat(inside)).float().mean())
    assert 0 < filtered < 1


@pytest.mark.parametrize("options", [{}, {"policy_loss_type": "gspo"}], ids=str)
def test_ranks_and_micro_batches_give_one_mean(page: dict[str, Any], options: dict[str, Any]) -> None:
    """As OpenRLHF does it: counts / accumulation steps, the loss / accumulation steps, the mean over ranks."""
    data, loss = ragged(8, 9), page["FusedPolicyLoss"](**options)
    tokens, sequences = data["mask"].sum(), (data["mask"].sum(-1) > 0).sum()
    ranks, steps = 2, 2

    def step(log_probs: Tensor) -> Tensor:
        losses = []
        for rows in torch.arange(8).chunk(ranks * steps):
            part = {name: value[rows] for name, value in data.items()}
            counts = {"batch_num_tokens": tokens / steps, "global_batch_size": sequences / steps}
            losses.append(call(loss, part, log_probs[rows], dp_size=ranks, **counts)[0] / steps)
        return torch.stack(losses).double().sum().float() / ranks

    assert_equal_to(step, definition(loss, data, None), data["log_probs"])


def test_poison_behind_the_mask_and_beyond_the_clamp(page: dict[str, Any]) -> None:
    data, loss = ragged(6, 9), page["FusedPolicyLoss"]()
    clean = call(loss, data, data["log_probs"])[0]
    poisoned = {name: value.clone() for name, value in data.items()}
    for name in ("old", "sampler", "advantages"):
        poisoned[name][~data["mask"]] = float("nan")
    assert torch.equal(call(loss, poisoned, data["log_probs"])[0], clean)
    for side in (1.0, -1.0):  # a ratio far above 1 with a bad response, far below with a good one: neither is clipped
        far = torch.zeros(1, 2, requires_grad=True)
        old, advantages = torch.tensor([[-50 * side, 0.0]]), torch.tensor([[-side, 1.0]])
        value = loss(far, old, advantages, torch.ones(1, 2))[0]
        value.backward()
        torch.testing.assert_close(value.detach(), (side * torch.tensor(20 * side).exp() - 1) / 2)
        assert far.grad.tolist() == [[0.0, -0.5]]


def test_a_step_without_live_tokens_gives_zero(page: dict[str, Any]) -> None:
    log_probs, none = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3, dtype=torch.bool)
    count = torch.tensor(0.0)
    for options in ({}, {"token_level_loss": False}):
        loss = page["FusedPolicyLoss"](**options)(
            log_probs, log_probs.detach(), torch.ones(2, 3), none, batch_num_tokens=count, global_batch_size=count
        )[0]
        assert loss.item() == 0
        assert torch.autograd.grad(loss, log_probs)[0].count_nonzero() == 0


def test_log_probs_and_entropy(page: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = 3 * torch.randn(2, 5, 37, generator=generator), torch.randint(37, (2, 5), generator=generator)
    weights = torch.randn(2, 5, generator=generator)

    def expected(logits: Tensor, dtype: torch.dtype) -> Tensor:
        chosen = (logits / 0.7).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        distribution = logits.softmax(-1)
        entropy = -(distribution * distribution.log()).sum(-1)
        return ((chosen + 0.5 * entropy) * weights).sum()

    def actual(logits: Tensor) -> Tensor:
        chosen = page["log_probs_from_logits"](logits, labels, temperature=0.7)
        return ((chosen + 0.5 * page["compute_entropy"](logits)) * weights).sum()

    assert_equal_to(actual, expected, logits)


def test_install(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    actor = stand_in(monkeypatch, "openrlhf.models.actor", log_probs_from_logits=None, compute_entropy=None)
    ppo_actor = stand_in(monkeypatch, "openrlhf.trainer.ray.ppo_actor", PolicyLoss=PolicyLoss)
    stand_in(monkeypatch, "fused_openrlhf", install=page["install"])
    exec(blocks("openrlhf.md")[1])
    assert ppo_actor.PolicyLoss is page["FusedPolicyLoss"]
    assert actor.log_probs_from_logits is page["log_probs_from_logits"]
    assert actor.compute_entropy is page["compute_entropy"]


def test_an_older_openrlhf_is_refused(page: dict[str, Any]) -> None:
    """0.11.0, commit 3c3be62, has other options: their absence shows before anything is computed."""
    loss = page["FusedPolicyLoss"]()
    del loss.is_correction_level
    with pytest.raises(AttributeError, match="is_correction_level"):
        call(loss, data := ragged(2, 3), data["log_probs"])
