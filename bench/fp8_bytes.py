"""`python -m bench.fp8_bytes`: bytes of the experts' weights and of what a layer keeps for its backward, measured in
fp32, bf16 and FP8; --save writes the record behind the tables of docs/fp8.md.

Layers have the widths of the models, and one expert that takes every slot of a few tokens: bytes a weight and bytes a
token depend on neither number. No time is measured, and nothing here depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import _dispatch
from grpo_kernels.moe_experts import fp8_weights

from . import moe_definitions as definitions
from .case import Inputs
from .moe_definitions import DEEPSEEK, GPT_OSS_SMALL, QWEN, Model
from .moe_layer import experts

RECORD = Path(__file__).parent / "results" / "fp8_bytes.json"
MODELS = (DEEPSEEK, QWEN, GPT_OSS_SMALL)
SAVES = ("preact", "input")
_TOKENS = 16  # a multiple of 4: no byte between columns of scales
_WEIGHTS = ("gate_up", "down")


@dataclass(frozen=True)
class Setting:
    """Dtypes of the tokens and of the parameters; with a recipe of its own under autocast, as with master weights."""

    name: str
    tokens: torch.dtype
    parameters: torch.dtype
    recipe: str = "bf16"

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.tokens == self.parameters else torch.autocast("cpu", self.tokens)


SETTINGS = (
    Setting("fp32", torch.float32, torch.float32),
    Setting("bf16", torch.bfloat16, torch.bfloat16),
    Setting("fp8", torch.bfloat16, torch.float32, "fp8_block128"),
)


def make(model: Model, setting: Setting) -> Inputs:
    """Tokens, one expert's parameters, and weights and ids of slots that are all of that expert."""

    def filled(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, 0.01, dtype=dtype).requires_grad_()

    made = {"x": filled(_TOKENS, model.hidden, dtype=setting.tokens)}
    for name, (into, out) in {"gate_up": (model.hidden, 2 * model.width), "down": (model.width, model.hidden)}.items():
        made[name] = filled(1, *((into, out) if model.clamped else (out, into)), dtype=setting.parameters)
        if model.clamped:
            made[f"{name}_bias"] = filled(1, out, dtype=setting.parameters)
    made["weights"] = filled(_TOKENS, model.top_k, dtype=torch.float32)
    return made | {"ids": torch.zeros(_TOKENS, model.top_k, dtype=torch.int32)}


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Each piece of memory once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# --- activations -----------------------------------------------------------------------------------------------------


def _kept(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The result, and what autograd keeps for it beside parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    found: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, found


def _kind(tensor: Tensor, model: Model) -> str:
    """Of something that our op keeps: codes or scales of tokens or of rows, or maps and weights of slots."""
    if tensor.ndim != 2 or tensor.shape[1] == model.top_k:
        return "routes"
    return "tokens" if tensor.shape[0] == _TOKENS else "preacts"


def activations(model: Model, setting: Setting, save: str) -> dict[str, Any]:
    """Bytes a token of what is kept between the passes. save "all": by a loop over the experts in eager PyTorch."""
    inputs = make(model, setting)
    with setting.autocast():
        run = partial(experts, model, inputs, (inputs["weights"], inputs["ids"]), recipe=setting.recipe, save=save)
        if save == "all":
            run = partial(
                definitions.experts_in_turn, *(inputs[name] for name in ("x", "weights", "ids")), inputs, model
            )
        _, kept = _kept(run, [inputs[name] for name in inputs if name.startswith(_WEIGHTS)])
    row: dict[str, Any] = {"model": model.name, "recipe": setting.name, "save": save}
    row["bytes_per_token"] = _bytes(kept) // _TOKENS
    if save != "all":
        for kind in ("tokens", "preacts", "routes"):
            row[kind] = _bytes(tensor for tensor in kept if _kind(tensor, model) == kind) // _TOKENS
        row["numbers"] = model.hidden + (2 * model.top_k * model.width if save == "preact" else 0)
    return row


# --- weights ---------------------------------------------------------------------------------------------------------


def weights(model: Model, setting: Setting) -> dict[str, Any]:
    """Bytes a weight: of parameters, of their gradients after a backward, and of FP8 copies."""
    inputs = make(model, setting)
    given = [inputs[name] for name in _WEIGHTS]
    numbers = sum(weight.numel() for weight in given)
    with setting.autocast():
        result = experts(model, inputs, (inputs["weights"], inputs["ids"]), recipe=setting.recipe)
    result.sum().backward()
    gradients = [weight.grad for weight in given if weight.grad is not None]
    row: dict[str, Any] = {"model": model.name, "recipe": setting.name, "numbers": numbers}
    row |= {"parameter": _bytes(given) / numbers, "gradient": _bytes(gradients) / numbers}
    if setting.recipe == "fp8_block128":
        row |= {name: round(size / numbers, 5) for name, size in _copies(model, given).items()}
    return row


def _copies(model: Model, given: list[Tensor]) -> dict[str, int]:
    """Bytes of what products take: the forward one copy, the backward the other. Those that the layer has made."""
    backend = _dispatch.resolve("fp8_quantize", given[0])
    shaped = [weight.transpose(1, 2) if model.clamped else weight for weight in given]
    plain = [part for weight in shaped for part in fp8_weights.quantized(weight, backend, both=True)]
    turned = [part for weight in shaped for part in fp8_weights.turned(weight, backend)]
    return {"copy": _bytes(plain), "both_copies": _bytes([*plain, *turned])}


def measure() -> dict[str, list[dict[str, Any]]]:
    """The record."""
    found = []
    for model in MODELS:
        found += [activations(model, setting, "all") for setting in SETTINGS if setting.recipe == "bf16"]
        found += [activations(model, setting, save) for save in SAVES for setting in SETTINGS]
    record = {"weights": [weights(model, setting) for model in MODELS for setting in SETTINGS], "activations": found}
    grpo_kernels.clear_fp8_weight_cache()
    return record


def load() -> dict[str, list[dict[str, Any]]]:
    """The saved record."""
    record: dict[str, list[dict[str, Any]]] = json.loads(RECORD.read_text())
    return record


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fp8_bytes", description=__doc__)
    parser.add_argument(
        "--save", action="store_true", help=f"write {RECORD.name}; python -m bench.docs then writes the page"
    )
    arguments = parser.parse_args()
    parts = [
        f' "{part}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]"
        for part, rows in measure().items()
    ]
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    if arguments.save:
        RECORD.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
