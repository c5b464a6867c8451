"""docs/plain_loop.md learns; the functions of docs/trainers.md are what the page says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from python_tests.trainer_docs import DOCS, assert_equal_to, assert_signature, blocks, ragged, run, stand_in

# Read at commits a956457 (SkyRL), 559b447 (prime-rl) and 624b824 (slime), all of August 2026.
SKYRL = "(log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None)"
PRIME_RL_INPUTS = ("trainer_logprobs", "inference_logprobs", "ref_logprobs", "advantages", "loss_mask", "loss_weights")
SLIME = "(args, batch, logits, sum_of_sample_mean)"
SLIME_LOG_PROBS = ("args", "unconcat_tokens", "total_lengths", "response_lengths")


def block_with(text: str) -> int:
    """Which block of trainers.md that is."""
    (index,) = (i for i, block in enumerate(blocks("trainers.md")) if text in block)
    return index


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


# --- the plain loop --------------------------------------------------------------------------------------------------


def test_the_plain_loop_learns_from_its_rewards(capsys: pytest.CaptureFixture[str]) -> None:
    page = run("plain_loop.md")
    assert page["curve"][0] < 0.2
    assert page["curve"][14] > 0.5
    assert page["curve"][-1] > 0.9
    assert page["accuracy"].min() > 0.9
    assert capsys.readouterr().out.startswith("sampled reward 0.0")
    groups, reward = page["GROUP"], page["reward"]

    def of_another_response(tokens: Tensor, mask: Tensor) -> Tensor:
        rewards = reward(tokens, mask)
        return rewards.view(-1, groups)[:, torch.randperm(groups)].flatten() if len(rewards) > groups else rewards

    page["train"].__globals__["reward"] = of_another_response
    curve, _ = page["train"](steps=15)
    assert max(curve) < 0.3


def test_the_plain_loop_stays_short() -> None:
    (code,) = blocks("plain_loop.md")
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 42


# --- the functions of trainers.md ------------------------------------------------------------------------------------


def test_skyrl(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, Any] = {}

    def register_policy_loss(name: str) -> Any:
        return lambda function: registered.setdefault(name, function)

    path = "skyrl.backends.skyrl_train.utils.ppo_utils"
    stand_in(monkeypatch, path, register_policy_loss=register_policy_loss)
    page = run("trainers.md", block_with("register_policy_loss"))
    loss, data = registered["grpo_kernels_sapo"], ragged(6, 9)
    assert_signature(page["sapo"], SKYRL)

    def definition(log_probs: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum over the live tokens of SAPO's loss, of advantages that are divided already."""
        live = data["mask"]
        advantage = data["advantages"][live].to(dtype)
        tau = torch.where(advantage > 0, 1.0, 1.05).to(dtype)
        ratio = (log_probs[live] - data["old"][live].to(dtype)).exp()
        return -(advantage * 4 / tau * (tau * (ratio - 1)).sigmoid()).sum()

    rest = (data["old"], data["advantages"], None, data["mask"].float())
    assert_equal_to(lambda x: loss(x, *rest)[0], definition, data["log_probs"])
    assert loss(data["log_probs"], *rest)[1].keys() == {"clip_ratio"}


@pytest.mark.parametrize("weighted", [False, True])
def test_prime_rl(monkeypatch: pytest.MonkeyPatch, weighted: bool) -> None:
    @dataclass
    class LossOutputs:
        loss: Tensor
        metrics: dict[str, Tensor]

    inputs = SimpleNamespace
    stand_in(monkeypatch, "prime_rl.trainer.rl.loss", LossInputs=inputs, LossOutputs=LossOutputs)
    loss = run("trainers.md", block_with("prime_rl"))["dapo_loss"]
    data = {name: value[0] for name, value in ragged(1, 30).items()}
    data["mask"] = torch.arange(30) % 3 > 0
    weights = torch.linspace(0, 2, 30) if weighted else None

    def actual(log_probs: Tensor) -> Tensor:
        values = (log_probs, data["sampler"], None, data["advantages"], data["mask"], weights)
        return loss(inputs(**dict(zip(PRIME_RL_INPUTS, values, strict=True)))).loss

    def definition(log_probs: Tensor, dtype: torch.dtype) -> Tensor:
        ratio = (log_probs - data["sampler"].to(dtype)).exp()
        terms = clipped(ratio, data["advantages"].to(dtype), 0.2, 0.28)
        return (terms * (1 if weights is None else weights.to(dtype)))[data["mask"]].sum()

    assert_equal_to(actual, definition, data["log_probs"])


def test_slime(monkeypatch: pytest.MonkeyPatch) -> None:
    data, lengths = ragged(3, 9), [9, 4, 6]

    def responses(value: Tensor) -> list[Tensor]:
        return [row[:length] for row, length in zip(value, lengths, strict=True)]

    def get_log_probs_and_entropy(logits: Tensor, **options: Any) -> tuple[Tensor, dict[str, list[Tensor]]]:
        assert tuple(options) == SLIME_LOG_PROBS
        return logits, {"log_probs": responses(logits)}

    masks = responses(data["mask"].float())
    masks[1][:] = 1

    def sum_of_sample_mean(value: Tensor) -> Tensor:
        rows = zip(value.split(lengths), masks, strict=True)
        return sum((row * mask).sum() / mask.sum().clamp(min=1) for row, mask in rows)

    stand_in(monkeypatch, "slime.backends.megatron_utils.loss", get_log_probs_and_entropy=get_log_probs_and_entropy)
    loss = run("trainers.md", block_with("slime.backends"))["dapo_loss"]
    assert_signature(loss, SLIME)
    batch = {"log_probs": responses(data["old"]), "advantages": responses(data["advantages"])}
    batch |= {"unconcat_tokens": None, "total_lengths": None, "response_lengths": None}
    args = SimpleNamespace(eps_clip=0.2, eps_clip_high=0.28)

    def definition(log_probs: Tensor, dtype: torch.dtype) -> Tensor:
        ratio = (log_probs - data["old"].to(dtype)).exp()
        terms = responses(clipped(ratio, data["advantages"].to(dtype), 0.2, 0.28))
        means = [(term * mask).sum() / max(mask.sum(), 1) for term, mask in zip(terms, masks, strict=True)]
        return torch.stack(means).sum()

    # The stand-in takes log-probs for logits: the log-probs themselves are slime's.
    assert_equal_to(lambda x: loss(args, batch, x, sum_of_sample_mean)[0], definition, data["log_probs"])


def test_megatron(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = SimpleNamespace(
        get_tensor_model_parallel_rank=lambda: 0, get_tensor_model_parallel_group=lambda: dist.group.WORLD
    )
    stand_in(monkeypatch, "megatron.core", parallel_state=state)
    function = run("trainers.md", block_with("megatron.core"))["log_probs_and_entropy"]
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(5, 2, 31, generator=generator), torch.randint(31, (2, 5), generator=generator)

    def definition(logits: Tensor, dtype: torch.dtype) -> Tensor:
        log_probs = logits.transpose(0, 1).log_softmax(-1)
        return (log_probs.gather(-1, labels[..., None])[..., 0] - (log_probs.exp() * log_probs).sum(-1)).sum()

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert_equal_to(lambda x: torch.stack(function(x, labels)).sum(), definition, logits)
    finally:
        dist.destroy_process_group()


def test_any_other_trainer() -> None:
    loss, data = run("trainers.md", block_with("def policy_loss("))["policy_loss"], ragged(6, 9)

    def definition(log_probs: Tensor, dtype: torch.dtype) -> Tensor:
        live = data["mask"]
        ratio = (log_probs[live] - data["old"][live].to(dtype)).exp()
        return clipped(ratio, data["advantages"][live].to(dtype), 0.2, 0.28).sum() / 50

    rest = (data["old"], data["advantages"], data["mask"])
    assert_equal_to(lambda x: loss(x, *rest, num_items=50), definition, data["log_probs"])


# --- the pages -------------------------------------------------------------------------------------------------------


def test_the_table_names_pages_that_exist() -> None:
    text = (DOCS / "trainers.md").read_text()
    for page, anchor in re.findall(r"\]\(([\w.]*)(?:#([\w-]+))?\)", text):
        assert not page or (DOCS / page).exists(), page
        assert not anchor or f"\n## {anchor}\n" in text.lower(), anchor


@pytest.mark.parametrize("page", ["openrlhf.md", "nemo_rl.md", "torchtitan.md"])
def test_pages_say_at_the_top_what_was_checked(page: str) -> None:
    title, _, first, *_ = (DOCS / page).read_text().splitlines()
    trainer = title.removeprefix("# ")
    assert re.fullmatch(rf"Checked against the signatures of {trainer} .+, not run in {trainer}\.", first)
