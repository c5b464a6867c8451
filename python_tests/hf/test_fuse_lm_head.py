"""fuse_lm_head: the loss and gradients of the stock models in training, without logits; nothing else changes."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers

from grpo_kernels.integrations.transformers import (
    causal_lm_loss,
    fuse_lm_head,
    lm_head,
    replace_moe,
    restore_lm_head,
    restore_moe,
)
from grpo_kernels.integrations.trl.forward import logit_transform
from python_tests.hf.tiny import DENSE_MODELS, MOE_MODELS, VOCAB, assert_gradients, batch, gradients, tiny

pytestmark = [pytest.mark.trl, pytest.mark.slow, pytest.mark.usefixtures("native_cpu")]


def step(model: Any, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**{**batch(), **options})
    output.loss.backward()
    return output, gradients(model)


@pytest.mark.parametrize("name", [*DENSE_MODELS, "deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe"])
def test_loss_and_gradients_are_those_of_the_stock_model(name: str) -> None:
    options: dict[str, Any] = {}
    if name in MOE_MODELS and name != "deepseek_v3":
        options["output_router_logits"] = True
    model = tiny(name)
    eager_output, eager = step(model, **options)
    exact_output, exact = step(tiny(name, torch.float64), **options)
    assert fuse_lm_head(model) is model
    output, ours = step(model, **options)
    assert output.logits is None
    assert "logits" not in output
    assert type(output) is type(eager_output)
    assert output.loss.dtype == eager_output.loss.dtype
    torch.testing.assert_close(output.loss, exact_output.loss)
    assert_gradients(ours, exact, eager)
    if options:
        torch.testing.assert_close(output.aux_loss, eager_output.aux_loss, rtol=0, atol=0)
    shifted = torch.nn.functional.pad(batch()["labels"][:, 1:], (0, 1), value=-100)
    divided, _ = step(model, num_items_in_batch=torch.tensor(7), shift_labels=shifted, **options)
    restore_lm_head(model)
    torch.testing.assert_close(divided.loss, step(model, num_items_in_batch=7, **options)[0].loss)


@pytest.mark.parametrize("name", [*DENSE_MODELS, *MOE_MODELS])
def test_the_table_of_models_agrees_with_their_configurations(name: str) -> None:
    """FusedGRPOTrainer reads factor and softcap from the configuration, as TRL does; here each class is listed."""
    model = tiny(name)
    transform = lm_head._transform(type(model))
    assert transform is not None
    assert transform(model) == tuple(logit_transform(model.config))


def test_bfloat16() -> None:
    model = tiny("gemma2", torch.bfloat16)
    exact = step(copy.deepcopy(model).double())[1]
    eager = step(model)[1]
    ours = step(fuse_lm_head(model))[1]
    assert_gradients(ours, exact, eager)


def test_everything_else_is_as_it_was(tmp_path: Path) -> None:
    stock = tiny("llama_tied")
    model = fuse_lm_head(copy.deepcopy(stock))
    assert fuse_lm_head(model) is model  # again
    inputs = batch()
    ids = inputs["input_ids"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    assert inspect.signature(model.forward) == inspect.signature(stock.forward)  # Trainer drops columns by it
    assert list(model.state_dict()) == list(stock.state_dict())
    assert torch.equal(model(ids).logits, stock(ids).logits)
    assert torch.equal(model(ids, logits_to_keep=2).logits, stock(ids, logits_to_keep=2).logits)
    evaluated, expected = model.eval()(**inputs), stock.eval()(**inputs)
    assert torch.equal(evaluated.loss, expected.loss)
    assert torch.equal(evaluated.logits, expected.logits)
    assert torch.equal(
        model.generate(ids[:1], max_new_tokens=4, do_sample=False),
        stock.generate(ids[:1], max_new_tokens=4, do_sample=False),
    )
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(loaded) is type(stock)
    assert torch.equal(loaded.eval()(**inputs).logits, expected.logits)
    assert restore_lm_head(model) is model
    assert vars(model).keys() == vars(stock).keys()
    assert type(model.lm_head) is nn.Linear
    assert vars(model.lm_head).keys() == vars(stock.lm_head).keys()
    assert restore_lm_head(model) is model


def test_a_copy_computes_with_its_own_parameters() -> None:
    model = fuse_lm_head(tiny("qwen3"))
    copied = copy.deepcopy(model)
    before = step(model)[0].loss.detach()
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(step(copied)[0].loss.detach(), before)
    assert copied.forward.__self__ is copied


def test_logits_to_keep_with_labels_of_the_kept() -> None:
    model, inputs = tiny("llama"), batch()
    kept = torch.rand(inputs["labels"].shape) < 0.5
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    arguments = {**inputs, "logits_to_keep": kept, "shift_labels": shifted[kept]}
    expected = model(**arguments).loss
    torch.testing.assert_close(fuse_lm_head(model)(**arguments).loss, expected)
    with pytest.raises(ValueError, match="labels must have shape"):
        model(**inputs, logits_to_keep=4)
    torch.testing.assert_close(model(**arguments).loss, expected)  # a pass that failed leaves nothing behind


def test_tuples() -> None:
    model = fuse_lm_head(tiny("llama"))
    named = model(**batch(), use_cache=False)
    (loss,) = model(**batch(), use_cache=False, return_dict=False)
    assert torch.equal(loss, named.loss)
    inputs = batch()
    assert torch.equal(model(inputs.pop("input_ids"), **inputs).loss, named.loss)
    with pytest.raises(TypeError, match="must be named"):
        model(batch()["input_ids"], batch()["attention_mask"], labels=batch()["labels"])


def test_with_replaced_experts_and_checkpointing() -> None:
    model = tiny("qwen3_moe")
    _, expected = step(model)
    fuse_lm_head(model)
    replace_moe(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    _, ours = step(model, use_cache=False)
    torch.testing.assert_close(ours, expected)
    restore_moe(model)
    restore_lm_head(model)


def test_trainer(tmp_path: Path) -> None:
    """The same curve with HF Trainer, gradient accumulation and evaluation included."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    rows = [{key: value[0] for key, value in batch(seed, rows=1).items()} for seed in range(8)]
    histories = []
    for fuse in (False, True):
        model = tiny("llama")
        if fuse:
            fuse_lm_head(model)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
            report_to=[], use_cpu=True, eval_strategy="steps", eval_steps=2, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])
        trainer.train()
        history = trainer.state.log_history
        histories.append(
            [entry[key] for entry in history for key in ("loss", "grad_norm", "eval_loss") if key in entry]
        )
    assert len(histories[0]) == 5
    torch.testing.assert_close(torch.tensor(histories[1]), torch.tensor(histories[0]), rtol=1e-5, atol=0.0)


# what is refused ---------------------------------------------------------------------------------------------------


def refused(model: Any, *parts: str) -> None:
    head = type(getattr(model, "lm_head", None))
    with pytest.raises(ValueError) as caught:
        fuse_lm_head(model)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert type(getattr(model, "lm_head", None)) is head


def test_other_models_are_refused_by_name() -> None:
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2)
    refused(transformers.GPT2LMHeadModel(config), "GPT2LMHeadModel", "LlamaForCausalLM")
    refused(tiny("llama").model, "LlamaModel")
    mine = tiny("llama")
    mine.__class__ = type("LlamaForCausalLM", (type(mine),), {"__module__": "mine"})
    refused(mine, "LlamaForCausalLM")


def test_heads_and_losses_of_others_are_refused_by_name() -> None:
    class Adapted(nn.Linear):
        pass

    model = tiny("llama")
    model.lm_head.__class__ = Adapted
    refused(model, "lm_head of LlamaForCausalLM", "Adapted")
    model = tiny("llama")
    model.forward = model.forward
    refused(model, "fuse first")
    model = tiny("llama")
    model.loss_function = nn.functional.cross_entropy
    refused(model, "loss_function", "cross_entropy")


def test_what_changes_later_is_noticed() -> None:
    model = fuse_lm_head(tiny("llama"))
    model.loss_function = nn.functional.cross_entropy
    with pytest.raises(ValueError, match="loss_function"):
        model(**batch())
    model.loss_function = causal_lm_loss
    model(**batch())
    fused, model.forward = model.forward, model.generate
    with pytest.raises(ValueError, match="replaced since"):
        restore_lm_head(model)
    model.forward = fused
    model.resize_token_embeddings(VOCAB + 5)
    with pytest.raises(ValueError, match="lm_head was replaced by Linear"):
        model(**batch())
