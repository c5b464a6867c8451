"""docs/nemo_rl.md, against the signatures and the documented formulas of NeMo-RL at commit 7ea279a."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import GRPOLossConfig, grpo_loss
from python_tests.trainer_docs import arguments, assert_equal_to, assert_signature, blocks, ragged, run, stand_in

# Read at commit 7ea279abfbeb698b092856d0dab61e7cf39bc909 (22 August 2026, version 0.6.0):
# nemo_rl/algorithms/loss/{interfaces,loss_functions}.py, nemo_rl/algorithms/utils.py.
CALL = "(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks)"
CONSTRUCTOR = "(self, cfg, use_fused_linear_logprobs=False)"
CALCULATE_KL = (
    "(logprobs, logprobs_reference, kl_type='k3', input_clamp_value=20.0, output_clamp_value=10.0, "
    "importance_sampling_weights=None)"
)
MASKED_MEAN = "(values, mask, dim=None, global_normalization_factor=None)"
CONFIG: dict[str, Any] = {
    "disable_ppo_ratio": False,
    "token_level_loss": True,
    "sequence_level_importance_ratios": False,
    "ratio_clip_min": 0.2,
    "ratio_clip_max": 0.2,
    "ratio_clip_c": None,
    "reference_policy_kl_penalty": 0.01,
    "reference_policy_kl_type": "k3",
    "kl_input_clamp_value": 20.0,
    "kl_output_clamp_value": 10.0,
    "use_kl_in_reward": False,
    "use_importance_sampling_correction": False,
    "truncated_importance_sampling_type": None,
    "truncated_importance_sampling_ratio": None,
    "truncated_importance_sampling_ratio_min": None,
    "use_on_policy_kl_approximation": False,
    "force_on_policy_ratio": False,
    "use_cispo": False,
    "positive_example_nll_weight": 0.0,
}

NO_KL = {"reference_policy_kl_penalty": 0.0}
GSPO = {"sequence_level_importance_ratios": True, "token_level_loss": False}


def correction(kind: str | None, low: float | None, high: float | None, **options: Any) -> dict[str, Any]:
    return {
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": kind,
        "truncated_importance_sampling_ratio_min": low,
        "truncated_importance_sampling_ratio": high,
        **options,
    }


OPTIONS: list[dict[str, Any]] = [
    {},
    {"ratio_clip_max": 0.4, "ratio_clip_c": 1.5, **NO_KL},
    {"token_level_loss": False, "reference_policy_kl_type": "k2"},
    {"kl_input_clamp_value": 0.5, "kl_output_clamp_value": None},
    {"kl_output_clamp_value": 0.1, "use_on_policy_kl_approximation": True},
    {"reference_policy_kl_type": "k1", "kl_input_clamp_value": None},
    {**GSPO, "ratio_clip_min": 0.05, "ratio_clip_max": 0.1},
    {"use_cispo": True, **NO_KL},
    {"disable_ppo_ratio": True, **NO_KL},
    {"force_on_policy_ratio": True, "ratio_clip_c": 3.0},
    {"force_on_policy_ratio": True, **GSPO},
    correction(None, None, None, **NO_KL),
    correction("tis", None, 1.2, **NO_KL),
    correction("tis", 0.9, 1.2, ratio_clip_c=1.5),
    correction("icepop", 0.8, 1.3, **NO_KL),
    correction("seq-mask-tis", 0.9, 1.1, **NO_KL),
    correction("tis", None, 1.5, **GSPO),
    correction("icepop", 0.5, 2.0, **GSPO, **NO_KL),
    correction("icepop", 0.8, 1.3, force_on_policy_ratio=True),
]


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class Config:
    def __init__(self, **options: Any) -> None:
        unknown = options.keys() - CONFIG.keys()
        assert not unknown
        vars(self).update({**CONFIG, **options})


class ClippedPGLossFn:
    """Its attributes; its call gives metrics alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        values = arguments(CONSTRUCTOR, self, *args, **kwargs)
        cfg = values["cfg"]
        vars(self).update(vars(cfg))
        self.use_fused_linear_logprobs = values["use_fused_linear_logprobs"]
        self.reference_policy_kl_penalty = 0 if cfg.use_kl_in_reward else cfg.reference_policy_kl_penalty
        self.loss_type = LossType.TOKEN_LEVEL if cfg.token_level_loss else LossType.SEQUENCE_LEVEL

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, float]]:
        values = arguments(CALL, self, *args, **kwargs)
        assert not torch.is_grad_enabled()
        log_probs = values["next_token_logprobs"]
        assert not log_probs.requires_grad
        return log_probs.sum(), {"loss": -1.0, "num_valid_samples": values["data"]["sample_mask"].sum().item()}


def masked_mean(*args: Any, **kwargs: Any) -> Tensor:
    call = arguments(MASKED_MEAN, *args, **kwargs)
    count = call["global_normalization_factor"]
    count = call["mask"].sum(call["dim"]) if count is None else count
    return (call["values"] * call["mask"]).sum(call["dim"]) / (count + 1e-8)


def kl_value(x: Tensor, kind: str) -> Tensor:
    return {"k1": -x, "k2": x**2 / 2, "k3": x.exp() - x - 1}[kind]


def calculate_kl(*args: Any, **kwargs: Any) -> Tensor:
    """x clamped, its weight without gradient where that held it; the product clamped."""
    call = arguments(CALCULATE_KL, *args, **kwargs)
    x, weights = call["logprobs_reference"] - call["logprobs"], call["importance_sampling_weights"]
    if (limit := call["input_clamp_value"]) is not None:
        weights = torch.where(x.abs() <= limit, weights, weights.detach())
        x = x.clamp(-limit, limit)
    kl = weights * kl_value(x, call["kl_type"])
    limit = call["output_clamp_value"]
    return kl if limit is None else kl.clamp(-limit, limit)


@pytest.fixture
def loss_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    stand_in(monkeypatch, "nemo_rl.algorithms.loss.interfaces", LossType=LossType)
    stand_in(monkeypatch, "nemo_rl.algorithms.loss.loss_functions", ClippedPGLossFn=ClippedPGLossFn)
    stand_in(monkeypatch, "nemo_rl.algorithms.utils", calculate_kl=calculate_kl, masked_mean=masked_mean)
    return run("nemo_rl.md")["FusedClippedPGLossFn"]


def batch(seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """NeMo-RL's data dictionary, whose tensors are one token longer than the log-probs, and the log-probs."""
    data = ragged(8, 9, seed)

    def longer(value: Tensor) -> Tensor:
        return torch.cat([torch.full_like(value[:, :1], 7), value], dim=1)  # the first token has no log-prob

    return {
        "prev_logprobs": longer(data["old"]),
        "generation_logprobs": longer(data["sampler"]),
        "reference_policy_logprobs": longer(data["ref"]),
        "advantages": longer(data["advantages"]),
        "token_mask": longer(data["mask"].float()),
        "sample_mask": torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 0]),
    }, data["log_probs"]


def sampler_weight(cfg: Config, gap: Tensor) -> Tensor:
    low, high = cfg.truncated_importance_sampling_ratio_min, cfg.truncated_importance_sampling_ratio
    weight = (gap.sum() if cfg.sequence_level_importance_ratios else gap).exp()
    kind = cfg.truncated_importance_sampling_type
    if kind == "tis":
        return weight.clamp(low or 0.0, high)
    if kind == "icepop":
        return weight * ((low <= weight) & (weight <= high))
    if kind == "seq-mask-tis":
        mean = gap.mean().exp()
        return weight * ((low <= mean) & (mean <= high))
    return weight


def kl_term(cfg: Config, log_probs: Tensor, ref: Tensor, sampler: Tensor) -> Tensor:
    """NeMo-RL's KL with its gradient written out: w KL' + w KL where no clamp holds, else 0."""
    here = log_probs.detach()
    x = ref - here
    weight = (here - sampler).exp() if cfg.use_on_policy_kl_approximation else torch.ones_like(x)
    limit, bound = cfg.kl_input_clamp_value, cfg.kl_output_clamp_value
    bounded = x if limit is None else x.clamp(-limit, limit)
    kl = weight * kl_value(bounded, cfg.reference_policy_kl_type)
    slope = {"k1": torch.ones_like(x), "k2": -x, "k3": 1 - x.exp()}[cfg.reference_policy_kl_type]
    moving = torch.ones_like(x, dtype=torch.bool) if limit is None else x.abs() <= limit
    if bound is not None:
        moving &= kl.abs() <= bound
        kl = kl.clamp(-bound, bound)
    return kl + torch.where(moving, weight * slope + kl, 0) * (log_probs - here)


def definition(cfg: Config, data: dict[str, Tensor], items: float) -> Callable[[Tensor, torch.dtype], Tensor]:
    """The loss as a function of the log-probs: one sequence at a time, over its live tokens alone."""
    names = ("prev_logprobs", "generation_logprobs", "reference_policy_logprobs", "advantages")

    def value(log_probs: Tensor, dtype: torch.dtype) -> Tensor:
        total = torch.zeros((), dtype=dtype)
        for row in range(len(log_probs)):
            live = data["token_mask"][row, 1:] > 0
            if not data["sample_mask"][row] or not live.any():
                continue
            here = log_probs[row, live]
            old, sampler, ref, advantage = (data[name][row, 1:][live].to(dtype) for name in names)
            old = here.detach() if cfg.force_on_policy_ratio else old
            log_ratio = here - old
            if cfg.sequence_level_importance_ratios and not cfg.force_on_policy_ratio:
                log_ratio = log_ratio.mean().expand_as(here)
            ratio = log_ratio.exp()
            bounded = ratio.clamp(1 - cfg.ratio_clip_min, 1 + cfg.ratio_clip_max)
            if cfg.use_cispo:
                loss = -advantage * bounded.detach() * here
            elif cfg.disable_ppo_ratio and not cfg.force_on_policy_ratio:
                loss = -advantage * here
            else:
                loss = -torch.minimum(advantage * ratio, advantage * bounded)
            if cfg.ratio_clip_c is not None:
                loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * cfg.ratio_clip_c), loss)
            if cfg.use_importance_sampling_correction:
                loss = loss * sampler_weight(cfg, old - sampler)
            if cfg.reference_policy_kl_penalty:
                loss = loss + cfg.reference_policy_kl_penalty * kl_term(cfg, here, ref, sampler)
            total = total + (loss.sum() if cfg.token_level_loss else loss.mean())
        return total / items

    return value


def counts(data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Valid sequences and tokens, as NeMo-RL's workers count them."""
    return data["sample_mask"].sum(), (data["token_mask"][:, 1:] * data["sample_mask"][:, None]).sum()


def test_signatures(loss_class: Any) -> None:
    assert_signature(loss_class.__call__, CALL)
    assert_signature(loss_class.__init__, CONSTRUCTOR.replace(")", ", policy=None)"))
    assert issubclass(loss_class, ClippedPGLossFn)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradient(loss_class: Any, options: dict[str, Any]) -> None:
    cfg, (data, log_probs) = Config(**options), batch()
    loss, (sequences, tokens) = loss_class(cfg), counts(data)
    items = float(tokens if cfg.token_level_loss else sequences)
    assert_equal_to(lambda x: loss(x, data, sequences, tokens)[0], definition(cfg, data, items), log_probs)


def test_kl_of_unfiltered_log_probs(loss_class: Any) -> None:
    """With top-k or top-p NeMo-RL hands the KL term log-probs of its own, which get their own gradient."""
    cfg, (data, log_probs) = Config(reference_policy_kl_penalty=0.5), batch()
    loss, (sequences, tokens) = loss_class(cfg), counts(data)
    other = (log_probs - 0.3).requires_grad_()
    with_kl = loss(log_probs, {**data, "curr_logprobs_unfiltered": other}, sequences, tokens)[0]
    (gradient,) = torch.autograd.grad(with_kl, other)
    policy = definition(Config(**NO_KL), data, float(tokens))(log_probs, torch.float32)
    whole = definition(cfg, data, float(tokens))
    at = other.detach().double().requires_grad_()
    kl = whole(at, torch.float64) - definition(Config(**NO_KL), data, float(tokens))(at, torch.float64)
    torch.testing.assert_close(with_kl - policy, kl.float())
    kl_alone = definition(cfg, {**data, "advantages": 0 * data["advantages"]}, float(tokens))(at, torch.float64)
    torch.testing.assert_close(gradient, torch.autograd.grad(kl_alone, at)[0].float())


@pytest.mark.parametrize("options", [{}, GSPO], ids=str)
def test_ranks_and_micro_batches_give_one_mean(loss_class: Any, options: dict[str, Any]) -> None:
    """As NeMo-RL does it: global counts, the loss times the ranks in place, the mean over ranks."""
    cfg, (data, log_probs) = Config(**options), batch()
    loss, (sequences, tokens), ranks = loss_class(cfg), counts(data), 2

    def step(log_probs: Tensor) -> Tensor:
        losses = []
        for rows in torch.arange(8).chunk(ranks * 2):
            part, _ = loss(log_probs[rows], {name: value[rows] for name, value in data.items()}, sequences, tokens)
            part *= ranks
            losses.append(part)
        return torch.stack(losses).double().sum().float() / ranks

    items = float(tokens if cfg.token_level_loss else sequences)
    assert_equal_to(step, definition(cfg, data, items), log_probs)


def test_metrics_are_those_of_nemo_rl_but_for_the_loss(loss_class: Any) -> None:
    data, log_probs = batch()
    value, metrics = loss_class(Config())(log_probs.requires_grad_(), data, *counts(data))
    assert metrics == {"loss": value.item(), "num_valid_samples": 6.0}


def test_another_policy(loss_class: Any) -> None:
    data, log_probs = batch()
    sapo = GRPOLossConfig.preset("sapo")
    loss = loss_class(Config(token_level_loss=False, **NO_KL), policy=sapo)(log_probs, data, *counts(data))[0]
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    rest = (data["prev_logprobs"][:, 1:], data["advantages"][:, 1:], mask)
    assert torch.equal(loss, grpo_loss(log_probs, *rest, sapo, num_items=counts(data)[0]).loss)
    with pytest.raises(ValueError, match="policy must have reduction='token_mean' and no KL"):
        loss_class(Config(), policy=sapo)


def test_poison_behind_the_mask(loss_class: Any) -> None:
    data, log_probs = batch()
    loss, (sequences, tokens) = loss_class(Config(**NO_KL)), counts(data)
    clean = loss(log_probs, data, sequences, tokens)[0]
    dead = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]) == 0
    for name in ("prev_logprobs", "advantages"):
        data[name][:, 1:][dead] = float("nan")
    log_probs[dead] = float("inf")
    log_probs.requires_grad_()
    value = loss(log_probs, data, sequences, tokens)[0]
    assert torch.equal(value, clean)
    assert torch.autograd.grad(value, log_probs)[0][dead].count_nonzero() == 0


def test_what_is_not_served(loss_class: Any) -> None:
    with pytest.raises(ValueError, match="FusedClippedPGLossFn: positive_example_nll_weight must be 0"):
        loss_class(Config(positive_example_nll_weight=0.1))
    with pytest.raises(ValueError, match="ratio_clip_c must be None with disable_ppo_ratio"):
        loss_class(Config(disable_ppo_ratio=True, ratio_clip_c=3.0))


def test_the_line_in_the_script(loss_class: Any) -> None:
    class MasterConfig:
        loss_fn = Config()

    names = {
        "FusedClippedPGLossFn": loss_class,
        "master_config": MasterConfig,
        "loss_fn": ClippedPGLossFn(Config(), use_fused_linear_logprobs=True),
    }
    exec(blocks("nemo_rl.md")[1], names)
    assert isinstance(names["loss_fn"], loss_class)
    assert names["loss_fn"].use_fused_linear_logprobs
