"""PPO beside GRPO in the training example: the step that is taken is PPO's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.r1.measuring import ppo, ppo_step
from examples.r1.measuring.ppo_step import METHODS, Parts
from examples.r1.policy.model import ModelConfig
from examples.r1.policy.sequences import Sequences
from grpo_kernels.testing import assert_as_accurate
from python_tests.r1_stages import tiny_run


def _plain_advantages(rewards: Tensor, values: Tensor, lengths: list[int], gamma: float, lam: float) -> Tensor:
    """The sum that defines GAE, term by term."""
    found = torch.zeros_like(values)
    for row, length in enumerate(lengths):
        r, v = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            found[row, t] = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
    return found


def _mask(lengths: list[int], columns: int) -> Tensor:
    return torch.arange(columns) < torch.tensor(lengths).unsqueeze(1)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_advantages_are_the_sum_that_defines_them(gamma: float, lam: float) -> None:
    lengths = [6, 1, 0, 4]
    mask = _mask(lengths, 6)
    rewards, values = torch.randn(2, 4, 6, dtype=torch.float64)
    expected = _plain_advantages(rewards, values, lengths, gamma, lam)
    poison = torch.full_like(values, float("nan"))
    found = ppo.generalised_advantages(
        torch.where(mask, rewards, poison), torch.where(mask, values, -poison), mask, gamma, lam
    )
    torch.testing.assert_close(found.advantages, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.returns, expected + values * mask, rtol=1e-12, atol=1e-14)
    if lam == 1.0 and gamma == 1.0:  # without a critic's say: what is still to come
        later = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
        torch.testing.assert_close(found.returns, later, rtol=1e-12, atol=1e-14)


def test_rewards_of_tokens_are_the_penalty_and_at_the_end_the_score() -> None:
    mask = _mask([3, 0, 1], 3)
    old, ref = torch.randn(2, 3, 3, dtype=torch.float64)
    scores = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    found = ppo.token_rewards(scores, old.masked_fill(~mask, float("inf")), ref, mask, 0.1)
    expected = -0.1 * (old - ref) * mask
    expected[0, 2] += 1.0
    expected[2, 0] += 3.0
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0.0)


def test_whitened_advantages_have_mean_0_and_variance_1() -> None:
    mask = _mask([5, 2, 0], 5)
    advantages = (3.0 + 2.0 * torch.randn(3, 5, dtype=torch.float64)).masked_fill(~mask, float("nan"))
    white = ppo.whiten(advantages, mask)
    assert white[~mask].eq(0.0).all()
    assert float(white[mask].mean()) == pytest.approx(0.0, abs=1e-14)
    assert float(white[mask].square().mean()) == pytest.approx(1.0, abs=1e-7)
    nothing = ppo.whiten(advantages, torch.zeros_like(mask))
    assert nothing.eq(0.0).all()


def test_the_loss_of_values_and_its_gradient() -> None:
    mask = _mask([4, 0, 2], 4)
    values, returns = torch.randn(2, 3, 4, dtype=torch.float64)
    values = values.masked_fill(~mask, float("nan")).requires_grad_()
    loss = ppo.value_loss(values, returns.masked_fill(~mask, float("inf")), mask)
    difference = (values.detach() - returns)[mask]
    assert float(loss.detach()) == pytest.approx(0.5 * float(difference.square().mean()), rel=1e-14)
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(gradient[mask], difference / 6, rtol=1e-14, atol=0.0)
    assert gradient[~mask].eq(0.0).all()
    empty = torch.zeros(0, 4, requires_grad=True)
    assert float(ppo.value_loss(empty, empty.detach(), empty.detach().bool()).detach()) == 0.0


class Recorded:
    """A step of PPO in float32, with the batch it was made of and the models before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sample = ppo_step._sample
        self.before: dict[str, Any] = {}

        def recording(run: Any, parts: Parts) -> Any:
            self.before = {name: copy.deepcopy(part.model) for name, part in parts.items()}
            self.batch = sample(run, parts)
            return self.batch

        monkeypatch.setattr(ppo_step, "_sample", recording)
        self.run = tiny_run()
        self.parts = ppo_step.train_ppo(self.run, mixed=False)

    def plain_losses(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any, Any]:
        """Losses of policy and critic as the papers write them, and the two models, in this dtype."""
        policy, critic = (copy.deepcopy(self.before[name]).to(dtype) for name in ("policy", "critic"))
        prompts, completions, mask = self.batch.sequences
        lengths = mask.sum(dim=1).tolist()
        old, ref, scores = (value.to(dtype) for value in self.batch[1:])
        values = critic.value(critic.transformer.completion_hidden(prompts, completions)).squeeze(-1)
        rewards = -self.run.settings.kl_coef * (old - ref) * mask
        for row, length in enumerate(lengths):
            rewards[row, length - 1] += scores[row]
        advantages = _plain_advantages(rewards, values.detach(), lengths, 1.0, 0.95)
        returns = (advantages + values.detach())[mask]
        value_loss = 0.5 * (values[mask] - returns).square().mean()
        chosen = advantages[mask]
        white = (chosen - chosen.mean()) / (chosen.var(unbiased=False) + 1e-8).sqrt()
        logits = policy.head(policy.completion_hidden(prompts, completions))
        log_probs = -F.cross_entropy(logits.flatten(0, 1), completions.flatten(), reduction="none").view_as(mask)
        ratio = torch.exp(log_probs - old)[mask]
        policy_loss = -torch.minimum(ratio * white, ratio.clamp(0.8, 1.2) * white).mean()
        return policy_loss, value_loss, policy, critic


def test_gradients_of_policy_and_critic_are_those_of_plain_ppo(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch)
    assert len(set(recorded.batch.scores.tolist())) > 1
    assert int(recorded.batch.sequences.mask.sum()) > 8
    exact, eager = recorded.plain_losses(torch.float64), recorded.plain_losses(torch.float32)
    for index, name in enumerate(("policy", "critic")):
        expected, plain = (
            torch.autograd.grad(losses[index], list(losses[index + 2].parameters())) for losses in (exact, eager)
        )
        found = [parameter.grad for parameter in recorded.parts[name].model.parameters()]
        flat = [torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (found, expected, plain)]
        assert float(flat[1].abs().max()) > 1e-3
        assert_as_accurate(*flat, name=name)
        with pytest.raises(AssertionError, match=f"{name}: error"):
            assert_as_accurate(flat[0] * (1 + 1e-4), *flat[1:], name=name)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_moves_what_is_trained_and_nothing_else(
    method: str, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: dict[str, Any] = {}
    descend = ppo_step.Part.descend

    def recording(part: ppo_step.Part, loss: Tensor) -> None:
        recorded[str(len(recorded))] = [value.clone() for value in part.model.state_dict().values()]
        descend(part, loss)

    monkeypatch.setattr(ppo_step.Part, "descend", recording)
    parts = METHODS[method](tiny_run(mtp=1), mixed)
    assert len(recorded) == len(parts) - 2
    for before, name in zip(recorded.values(), ("policy", "critic"), strict=False):
        part = parts[name]
        now = list(part.model.state_dict().values())
        assert sum(not torch.equal(old, new) for old, new in zip(before, now, strict=True)) > len(now) / 2
        dtype = torch.bfloat16 if mixed else torch.float32
        for index, parameter in enumerate(part.model.parameters()):
            assert parameter.dtype == dtype
            assert parameter.grad is not None
            assert parameter.grad.dtype == dtype
            if mixed:
                assert torch.equal(parameter.detach(), part.masters[index].bfloat16())
                assert part.masters[index].grad is None
    for name in ("reference", "reward model"):
        assert not any(parameter.requires_grad for parameter in parts[name].model.parameters())
        with pytest.raises(RuntimeError, match="frozen"):
            parts[name].descend(torch.zeros((), requires_grad=True))


def test_values_of_a_token_are_seen_before_it() -> None:
    critic = ppo.Critic(ModelConfig(max_length=12, width=16, layers=2, heads=2, mtp=2)).double()
    prompts, completions = torch.randint(2, 20, (2, 6)), torch.randint(2, 20, (4, 5))
    mask = torch.ones_like(completions, dtype=torch.bool)
    values = critic(Sequences(prompts, completions, mask))
    assert values.shape == (4, 5)
    changed = completions.clone()
    changed[:, 3] = 1
    others = critic(Sequences(prompts, changed, mask))
    torch.testing.assert_close(others[:, :4], values[:, :4], rtol=1e-12, atol=1e-12)
    assert not torch.equal(others[:, 4], values[:, 4])
