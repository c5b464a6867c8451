"""A language model of 70 thousand parameters, its tokenizer and its tasks, all made in code: nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz+-*=?:. "


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, 48 in all."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def make_model(seed: int = 0, **config: Any) -> PreTrainedModel:
    """A Llama with `config` over the defaults; float32, weights from `seed`."""
    options = {
        "vocab_size": len(SPECIAL) + len(LETTERS),
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**options, **config}))


def save_model(folder: Path, seed: int = 0, **config: Any) -> str:
    """Model and tokenizer as a directory that `from_pretrained` takes; what a trainer with a reference model needs."""
    make_model(seed, **config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def prompts(n: int = 64) -> Dataset:
    """Sums to continue: column `prompt`, of different lengths."""
    return Dataset.from_dict({"prompt": [f"{'add ' * (i % 3)}{i % 10}+{i // 3}=" for i in range(n)]})


def completions(n: int = 32) -> Dataset:
    """For supervised training: columns `prompt` and `completion`, of different lengths."""
    pairs = [(f"{i}+{i % 7}=", f"{i + i % 7}{' ok' * (i % 3)}.") for i in range(n)]
    return Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})


def preferences(n: int = 32) -> Dataset:
    """For preference training: columns `prompt`, `chosen`, `rejected`."""
    data = completions(n)
    rejected = [f"{i % 10}?{' no' * (i % 4)}" for i in range(n)]
    return Dataset.from_dict({"prompt": data["prompt"], "chosen": data["completion"], "rejected": rejected})


def digit_reward(completions: list[str], **_: Any) -> list[float]:
    """Share of the characters that are digits: easily learned, different within a group."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def arguments(config: type, folder: Path, **options: Any) -> Any:
    """A trainer's configuration for a CPU, with nothing reported or saved."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "seed": 1,
    }
    return config(**{**defaults, **options})
