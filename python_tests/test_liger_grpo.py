"""Liger's GRPO losses under Liger's names: against the formulas in float64, value, metrics and gradient."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels.integrations import liger
from grpo_kernels.integrations.liger import LigerFusedLinearGRPOLoss, fused_selective_log_softmax, triton_grpo_loss
from grpo_kernels.testing import assert_as_accurate
from python_tests import liger_problems as problems
from python_tests.liger_problems import LOSS_TYPES, TEMPERATURE, VOCAB, Problem, poisoned, problem

pytestmark = pytest.mark.usefixtures("native_cpu")

LEAVES = ("hidden", "weight", "bias")
UPSTREAM = -1.7
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def fused_linear(p: Problem, o: dict[str, Any], **others: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and metrics, and the gradients of the leaves."""
    options = {k: v for k, v in o.items() if k not in ("ratio", "off_policy", "num_items_in_batch")}
    loss_fn = LigerFusedLinearGRPOLoss(temperature=TEMPERATURE, **options, **others)
    leaves = [p[name].detach().clone().requires_grad_() for name in LEAVES]
    loss, metrics = loss_fn(
        leaves[0], leaves[1], p["ids"], p["mask"], p["advantages"], leaves[2], p["ref"],
        p["old"] if o["off_policy"] else None, vllm_is_ratio=None if o["ratio"] is None else p[o["ratio"]],
        num_items_in_batch=o["num_items_in_batch"],
    )  # fmt: skip
    gradients = torch.autograd.grad(loss, leaves, torch.full_like(loss, UPSTREAM))
    return [loss.detach(), *metrics], list(gradients)


def from_logits(p: Problem, o: dict[str, Any], logits: Tensor, upstream: Tensor, **others: Any) -> tuple[Any, Tensor]:
    """What the call returns, and the gradient of the logits."""
    names = {"epsilon_low": "eps_low", "epsilon_high": "eps_high"}
    options = {names.get(k, k): v for k, v in o.items() if k not in ("ratio", "off_policy")}
    leaf = logits.detach().clone().requires_grad_()
    result = triton_grpo_loss(
        leaf * 1.0, p["old"] if o["off_policy"] else None, p["ref"] if o["beta"] else None, p["ids"], p["advantages"],
        p["mask"], TEMPERATURE, vllm_is_ratio=None if o["ratio"] is None else p[o["ratio"]], **options, **others,
    )  # fmt: skip
    return result, torch.autograd.grad(result[0], leaf, upstream)[0]


def definition(p: Problem, o: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [p[name].detach().to(dtype).requires_grad_() for name in LEAVES]
    log_probs = problems.log_probs_of({**p, **dict(zip(LEAVES, leaves, strict=True))})
    values = problems.expected(p, o, log_probs)
    return [v.detach() for v in values], list(
        torch.autograd.grad(values[0], leaves, torch.tensor(UPSTREAM, dtype=dtype))
    )


# --- against the formulas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_from_hidden_states(loss_type: str) -> None:
    for seed, o in enumerate(problems.cases(loss_type, step=13)):
        p = problem(seed)
        values, gradients = fused_linear(poisoned(p), o)
        wanted, wanted_gradients = definition(p, o, torch.float64)
        torch.testing.assert_close(values[0], wanted[0], **EXACT)
        torch.testing.assert_close(values[1:], [metric.float() for metric in wanted[1:]])
        for gradient, other in zip(gradients, wanted_gradients, strict=True):
            torch.testing.assert_close(gradient, other, **EXACT)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_from_logits(loss_type: str) -> None:
    for seed, o in enumerate(problems.cases(loss_type, step=19)):
        p = problem(seed)
        bad, logits = poisoned(p), problems.logits_of(p).requires_grad_()
        bad_logits = logits.detach().clone()
        bad_logits[:, :-1][~p["mask"]] = math.nan
        log_probs = problems.chosen(logits, p["ids"])
        wanted = problems.expected(p, o, log_probs)
        upstream = torch.tensor(UPSTREAM, dtype=torch.float64)
        (loss, metrics), gradient = from_logits(bad, o, bad_logits, upstream, reduce=True)
        torch.testing.assert_close(loss, wanted[0], **EXACT)
        torch.testing.assert_close(metrics, [metric.float() for metric in wanted[1:]])
        (other,) = torch.autograd.grad(wanted[0], logits, upstream, retain_graph=True)
        torch.testing.assert_close(gradient[:, :-1], other[:, :-1], **EXACT)
        assert not gradient[:, -1].any()

        wanted = problems.expected_tokens(p, o, log_probs)
        upstream = torch.randn(p["mask"].shape).double()
        tokens, gradient = from_logits(bad, o, bad_logits, upstream)
        (other,) = torch.autograd.grad(wanted[0], logits, upstream)
        torch.testing.assert_close(gradient[:, :-1], other[:, :-1], **EXACT)
        assert (tokens[1] is None) == (o["beta"] == 0)
        for value, name in zip(tokens, wanted, strict=True):
            if value is not None:
                torch.testing.assert_close(value, name, **EXACT)


@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16])
def test_is_as_accurate_as_float32_allows(half: torch.dtype) -> None:
    results: list[list[list[Tensor]]] = []
    for index, loss_type in enumerate(LOSS_TYPES):
        p = {k: v.float() if v.is_floating_point() else v for k, v in problem(index).items()}
        p.update({name: p[name].to(half) for name in LEAVES})
        o = next(problems.cases(loss_type)) | {"beta": 0.3, "off_policy": True, "ratio": "token"}
        wide = {k: v.double() if v.is_floating_point() else v for k, v in p.items()}
        runs = fused_linear(p, o), definition(wide, o, torch.float64), definition(p, o, torch.float32)
        results.append([[values[0], *gradients] for values, gradients in runs])
    assert results[0][0][0].dtype == torch.float32
    for part in range(4):
        ours, exact, eager = (torch.cat([r[which][part].flatten() for r in results]) for which in range(3))
        assert_as_accurate(ours, exact.double(), eager.float())


def test_lengths_weigh_sequences_in_luspo() -> None:
    """Two sequences of 2 and 4 tokens on policy: the mean of A times length, whatever the padding."""
    ids, mask = torch.zeros(2, 5, dtype=torch.long), torch.arange(5) < torch.tensor([[2], [4]])
    loss, _ = LigerFusedLinearGRPOLoss(beta=0.0, loss_type="luspo", importance_sampling_level="sequence")(
        torch.randn(2, 5, 8), torch.randn(3, 8), ids, mask, torch.tensor([1.0, -3.0])
    )
    assert loss.item() == pytest.approx(-(1.0 * 2 - 3.0 * 4) / 2)


# --- references, masks, sizes ----------------------------------------------------------------------------------------


def options(**changes: Any) -> dict[str, Any]:
    base = next(problems.cases(changes.get("loss_type", "dapo")))
    return base | {"off_policy": True, "beta": 0.3} | changes


def test_reference_from_its_own_head() -> None:
    p = problem(0)
    generator = torch.Generator().manual_seed(1)
    ref_input = torch.randn(*p["ids"].shape, 5, generator=generator).double().requires_grad_()
    ref_weight = torch.randn(VOCAB, 5, generator=generator).double().requires_grad_()
    ref = problems.log_probs_of({**p, "hidden": ref_input, "weight": ref_weight}).detach()
    ref_input = torch.where(p["mask"][..., None], ref_input, math.nan)
    head, rest = (p["hidden"].requires_grad_(), p["weight"]), (p["ids"], p["mask"], p["advantages"], p["bias"])
    loss_fn = LigerFusedLinearGRPOLoss(temperature=TEMPERATURE)
    own = loss_fn(*head, *rest, None, p["old"], ref_input, ref_weight, p["bias"])
    given = loss_fn(*head, *rest, ref, p["old"], ref_input, ref_weight)
    torch.testing.assert_close(own, given, **EXACT)
    assert torch.autograd.grad(own[0], (ref_input, ref_weight), allow_unused=True) == (None, None)


def test_without_reference_model_the_kl_is_zero() -> None:
    p = problem(0)
    loss, kl, clip = fused_linear(p, options(), use_ref_model=False)[0]
    assert kl == 0
    same, same_clip = fused_linear(p, options(beta=0.0))[0]
    assert (loss, clip) == (same, same_clip)
    with pytest.raises(ValueError, match="ref_per_token_logps, or ref_input and ref_weight, must be given"):
        fused_linear({**p, "ref": None}, options())
    fused_linear({**p, "ref": None}, options(beta=0.0))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_to_learn_from(loss_type: str) -> None:
    p = poisoned(problem(0, (0, 0)))
    values, gradients = fused_linear(p, options(loss_type=loss_type, ratio="token"))
    assert [value.item() for value in values] == [0, 0, 0]
    assert not any(gradient.any() for gradient in gradients)
    empty = {k: v if k in ("weight", "bias") else v[:0] for k, v in p.items()}
    assert fused_linear(empty, options(loss_type=loss_type))[0][0] == 0
    tokens = triton_grpo_loss(problems.logits_of(empty), None, None, empty["ids"], empty["advantages"], beta=0.0)
    assert tokens[0].shape == (0, 6)


def test_masks_of_any_dtype_and_negative_ids() -> None:
    p = poisoned(problem(3))
    wanted = fused_linear(p, options())[0]
    for mask in (p["mask"].float(), p["mask"].long(), p["mask"].to(torch.bfloat16)):
        assert fused_linear({**p, "mask": mask}, options())[0] == wanted
    padded = {**p, "ids": p["ids"].masked_fill(~p["mask"], -100), "mask": None}
    assert fused_linear(padded, options())[0] == wanted


def test_compiled_and_chunk_size_change_nothing() -> None:
    runs = [fused_linear(problem(0), options(), compiled=c, chunk_size=s) for c, s in ((True, 1), (False, 64))]
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_num_items_below_one_counts_as_one() -> None:
    values = [fused_linear(problem(0), options(num_items_in_batch=n))[0] for n in (0, 1, torch.tensor([0.5]))]
    assert values[0] == values[1] == values[2]


def test_options_may_change_between_calls() -> None:
    p, loss_fn = problem(0), LigerFusedLinearGRPOLoss(beta=0.0)
    arguments = (p["hidden"], p["weight"], p["ids"], p["mask"], p["advantages"])
    before, _ = loss_fn(*arguments)
    loss_fn.loss_type = "luspo"
    assert loss_fn(*arguments)[0] != before
    loss_fn.loss_type = "ppo"
    with pytest.raises(ValueError, match="loss_type"):
        loss_fn(*arguments)


# --- the gradient in place of the logits -----------------------------------------------------------------------------


def test_inplace_takes_the_logits_memory_and_says_so() -> None:
    p = problem(0)
    arguments = (None, None, p["ids"], p["advantages"], p["mask"])
    leaf = problems.logits_of(p).nan_to_num(posinf=0.0).requires_grad_()
    kept, given = leaf * 1.0, leaf * 1.0
    before = kept.detach().clone()
    gradients = []
    for logits, inplace in ((kept, False), (given, True)):
        loss, _ = triton_grpo_loss(logits, *arguments, beta=0.0, reduce=True, inplace=inplace)
        gradients.append(torch.autograd.grad(loss, logits, retain_graph=True)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert torch.equal(kept.detach(), before)
    assert gradients[1].data_ptr() == given.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, given)


# --- log-probs without gradient --------------------------------------------------------------------------------------


def test_fused_selective_log_softmax() -> None:
    p = problem(0)
    logits = problems.logits_of(p).requires_grad_()
    wanted = problems.chosen(logits, p["ids"], 0.9).detach()
    torch.testing.assert_close(fused_selective_log_softmax(logits, p["ids"]), wanted, **EXACT)
    longer = torch.cat([torch.full((len(p["ids"]), 3), 7), p["ids"]], 1)
    prompt = torch.cat([torch.ones(len(p["ids"]), 2), p["mask"].float()], 1)
    log_probs = fused_selective_log_softmax(logits, longer, 0.9, prompt)
    torch.testing.assert_close(log_probs, wanted * p["mask"], **EXACT)
    assert not log_probs.requires_grad
    assert fused_selective_log_softmax(logits[:, :1], longer).shape == (len(p["ids"]), 0)


# --- what users see --------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"loss_type": "ppo"}, "loss_type must be one of 'grpo'"),
    ({"importance_sampling_level": "turn"}, "importance_sampling_level must be one of 'token', 'sequence'"),
    ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "importance_sampling_level must be 'token'"),
    ({"beta": None}, "kl_coef must be a number"),
    ({"delta": -1.0}, "delta must be a finite number greater than 0"),
    ({"loss_type": "sapo", "sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be a finite number"),
]


@pytest.mark.parametrize(("bad", "message"), WRONG)
def test_bad_options_raise_before_anything_runs(bad: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        LigerFusedLinearGRPOLoss(**bad)
    with pytest.raises((TypeError, ValueError), match=message):
        triton_grpo_loss("no logits", None, None, None, None, **bad)  # type: ignore[arg-type]


def test_bad_arguments_raise() -> None:
    with pytest.raises(TypeError, match="LigerFusedLinearGRPOLoss: epsilon_high must be a number, got NoneType"):
        LigerFusedLinearGRPOLoss(loss_type="cispo", epsilon_high=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_completion_length must be given with loss_type='dr_grpo'"):
        LigerFusedLinearGRPOLoss(loss_type="dr_grpo")
    logits, ids, advantages = torch.randn(2, 4, 5), torch.zeros(2, 3, dtype=torch.long), torch.randn(2)
    with pytest.raises(ValueError, match=r"delta must be None with loss_type='cispo', got 3\.0"):
        triton_grpo_loss(logits, None, None, ids, advantages, beta=0.0, loss_type="cispo", delta=3.0)
    with pytest.raises(ValueError, match=r"ref_logp must be given with beta=0\.04"):
        triton_grpo_loss(logits, None, None, ids, advantages)
    with pytest.raises(ValueError, match=r"completion_ids must have shape \[B, L\] = \[2, 3\], got \[2, 4\]"):
        triton_grpo_loss(logits, None, None, torch.zeros(2, 4, dtype=torch.long), advantages, beta=0.0)
    with pytest.raises(ValueError, match=r"logits must have shape \[B, L \+ 1, V\]"):
        triton_grpo_loss(logits[:, :0], None, None, ids[:, :0], advantages, beta=0.0)
    with pytest.raises(ValueError, match=r"input_ids must have shape \[B, L\] = \[2, 3\], got \[2, 2\]"):
        fused_selective_log_softmax(logits, ids[:, :2])


def test_signatures_are_those_of_liger() -> None:
    """Of version 0.8.5."""
    own = inspect.signature(LigerFusedLinearGRPOLoss).parameters
    assert {name: parameter.default for name, parameter in own.items()} == {
        "beta": 0.04, "compiled": True, "use_ref_model": True, "chunk_size": 1, "epsilon_low": 0.2,
        "epsilon_high": 0.2, "loss_type": "dapo", "max_completion_length": None, "importance_sampling_level": "token",
        "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "temperature": 1.0, "delta": None,
        "use_bias_correction_kl": False, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
    }  # fmt: skip
    assert list(inspect.signature(LigerFusedLinearGRPOLoss.forward).parameters)[1:] == [
        "_input", "lin_weight", "selected_token_ids", "attention_mask", "advantages", "bias", "ref_per_token_logps",
        "old_per_token_logps", "ref_input", "ref_weight", "ref_bias", "vllm_is_ratio", "num_items_in_batch",
    ]  # fmt: skip
    parameters = inspect.signature(triton_grpo_loss).parameters
    assert list(parameters)[:5] == ["logits", "old_logp", "ref_logp", "completion_ids", "advantages"]
    assert {name: parameter.default for name, parameter in list(parameters.items())[5:]} == {
        "completion_mask": None, "temperature": 0.9, "beta": 0.04, "eps_low": 0.2, "eps_high": 0.4, "inplace": True,
        "loss_type": "dapo", "max_completion_length": None, "importance_sampling_level": "token", "reduce": False,
        "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "vllm_is_ratio": None, "delta": None,
        "use_bias_correction_kl": False, "num_items_in_batch": None, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0,
    }  # fmt: skip
    assert str(inspect.signature(fused_selective_log_softmax)).startswith("(logits")
    assert sorted(liger.__all__) == sorted(name for name in vars(liger) if name[0] in "LCft" and name in liger.__all__)
