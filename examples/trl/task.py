"""A tokenizer, a tiny Llama, prompts and a reward, all made in code: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
DIGITS = tuple("0123456789")


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Words between spaces: ten digits, and w0, w1, ... up to `vocab` tokens."""
    words = [*SPECIAL, *DIGITS]
    words += [f"w{i}" for i in range(vocab - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def make_model(vocab: int, width: int) -> LlamaForCausalLM:
    """Two layers; nearly all of its parameters are its embeddings and its head, which is the point."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def make_prompts() -> Dataset:
    return Dataset.from_dict({"prompt": [" ".join([*str(number), "w0"]) for number in range(100, 164)]})


def digit_reward(completions: list[str], **_: Any) -> list[float]:
    """Share of the words that are digits."""
    return [sum(word in DIGITS for word in text.split()) / max(len(text.split()), 1) for text in completions]


def early_word_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """How early in the vocabulary the words stand, of [0, 1]: different for every completion of a large one."""
    return [1.0 / (1.0 + sum(ids) / len(ids) / 1e4) for ids in completion_ids]
