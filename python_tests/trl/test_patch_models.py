"""Models whose heads cap, scale, tie or shift their logits: the patched forward of TRL's fused head against stock."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="needs TRL")

import transformers
from transformers import PreTrainedModel
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from grpo_kernels.integrations.trl import head, patched
from grpo_kernels.testing import assert_as_accurate

pytestmark = [pytest.mark.trl, pytest.mark.slow, pytest.mark.usefixtures("native_cpu")]

SIZES = {
    "vocab_size": 51,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "capped": ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 16}),
    "scaled": ("Cohere", {"logit_scale": 0.0625}),
    "divided": ("Granite", {"logits_scaling": 0.25}),
    "tied": ("Qwen2", {"tie_word_embeddings": True}),
    "biased": ("Phi", {}),
    "experts": ("Mixtral", {"num_local_experts": 4, "output_router_logits": True}),
}
WITHOUT_MEAN = ("log_probs", "entropy", "log_sum_sq_probs", "is_top1")


def make_model(name: str) -> PreTrainedModel:
    family, options = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():  # distributions that are not flat, and biases that are not zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def make_batch(model: PreTrainedModel) -> dict[str, Tensor]:
    """Prompts of which no token is scored, padding, and labels of which some are the likeliest token."""
    ids, mask = torch.randint(3, 51, (3, 10)), torch.ones(3, 10, dtype=torch.long)
    mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    labels[2, 6:] = -100
    with torch.no_grad():
        labels[:, 5] = model(input_ids=ids, attention_mask=mask).logits[:, 4].argmax(-1)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def definition(
    model: PreTrainedModel, batch: dict[str, Tensor], temperature: float
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What the fused head returns, from the logits of a copy of the model in float64, and the gradients."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")
    inputs = dict(batch)
    labels = inputs.pop("labels")[:, 1:]
    out = model(**inputs)
    live = labels != -100
    z = out.logits[:, :-1][live] / temperature
    log_p = z.log_softmax(-1)
    log_probs = log_p.gather(-1, labels[live][:, None])[:, 0]
    results = {
        "log_probs": log_probs,
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).exp().sum(-1).log(),
        "mean_logits": z.mean(-1),
    }
    results = {name: value.new_zeros(live.shape).masked_scatter(live, value) for name, value in results.items()}
    results["loss"] = -results["log_probs"].sum() / live.sum()
    if "aux_loss" in out:
        results["aux_loss"] = out.aux_loss
        results["loss"] = results["loss"] + model.config.router_aux_loss_coef * out.aux_loss
    (results["loss"] - 0.1 * results["entropy"].sum()).backward()
    return results, [p.grad for p in model.parameters() if p.grad is not None]


def forward(model: PreTrainedModel, batch: dict[str, Tensor], patch: bool) -> tuple[FusedCausalLMOutput, list[Tensor]]:
    """What the fused head returns, and the gradients of its loss and of the entropy."""
    kernels = mock.patch.object(head, "linear_token_log_probs", wraps=head.linear_token_log_probs)
    stock = mock.patch.object(ChunkedLogProbFunction, "apply", wraps=ChunkedLogProbFunction.apply)
    with kernels as ours, stock as theirs, patched() if patch else nullcontext():
        out = model(**batch, fused_lm_head=True)
        assert (ours.call_count, theirs.call_count) == ((1, 0) if patch else (0, 1))
        loss = out.loss if out.entropy is None else out.loss - 0.1 * out.entropy.sum()
        model.zero_grad()
        loss.backward()
    return out, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model = make_model(name)
    batch = make_batch(model)
    exact, exact_grads = definition(model, batch, 0.8)
    outputs = WITHOUT_MEAN if name == "capped" else ("log_probs", *head.OUTPUTS)
    add_fused_lm_head(model, temperature=0.8, outputs=outputs)
    (ours, grads), (stock, stock_grads) = forward(model, batch, True), forward(model, batch, False)
    assert ours.keys() == stock.keys()
    assert ours.is_top1.any()
    for key, value in stock.items():
        assert ours[key].dtype == value.dtype
        if value.dtype == torch.bool:
            assert torch.equal(ours[key], value)
        else:
            assert_as_accurate(ours[key].detach(), exact[key].detach(), value.detach(), name=key)
    for actual, expected, plain in zip(grads, exact_grads, stock_grads, strict=True):
        assert_as_accurate(actual, expected, plain, name="gradient")


@pytest.mark.parametrize("labels", ["shift_labels", "none"])
def test_shifted_labels_and_no_label_anywhere(labels: str) -> None:
    model = make_model("tied")
    batch = make_batch(model)
    add_fused_lm_head(model, outputs=("log_probs", *head.OUTPUTS))
    if labels == "none":
        batch["labels"].fill_(-100)
    else:
        batch["shift_labels"] = batch.pop("labels").roll(-1, 1)
    (ours, grads), (stock, stock_grads) = forward(model, batch, True), forward(model, batch, False)
    assert ours.keys() == stock.keys()
    for name, value in stock.items():
        torch.testing.assert_close(ours[name], value)
    torch.testing.assert_close(grads, stock_grads)


def test_prompts_are_not_scored_at_all() -> None:
    model = make_model("tied")
    batch = make_batch(model)
    add_fused_lm_head(model)
    with patched(), mock.patch.object(head, "linear_token_log_probs", wraps=head.linear_token_log_probs) as calls:
        model(**batch, fused_lm_head=True)
    assert len(calls.call_args.args[0]) == int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("fp32_head", [False, True])
def test_half_precision_is_no_worse_than_float32(fp32_head: bool) -> None:
    """From equal hidden states: stock rounds its logits to bfloat16, the kernels do not."""
    model = make_model("tied").to(torch.bfloat16)
    batch = make_batch(model)
    labels = batch["labels"][:, 1:]
    live = labels != -100
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        hidden = model.base_model(**inputs).last_hidden_state[:, :-1]
        exact, eager = (
            (hidden.to(dtype) @ model.lm_head.weight.to(dtype).T)
            .log_softmax(-1)
            .gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            for dtype in (torch.float64, torch.float32)
        )
        add_fused_lm_head(model, cast_lm_head_to_fp32=fp32_head)
        with patched():
            ours = model(**batch, fused_lm_head=True).log_probs
    assert_as_accurate(ours[live], exact[live], eager[live])
