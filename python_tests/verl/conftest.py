"""A stand-in for verl: what the adapter is plugged into, with the signatures of verl 0.9.1."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "recorded.json").read_text())
_ADAPTER = "grpo_kernels.integrations.verl"


def with_signature(names: list[str], body: Callable[..., Any]) -> Callable[..., Any]:
    """`body` under a signature of these names."""

    def function(*args: Any, **kwargs: Any) -> Any:
        return body(*args, **kwargs)

    kinds = {"*": inspect.Parameter.VAR_POSITIONAL, "**": inspect.Parameter.VAR_KEYWORD}
    made = [
        inspect.Parameter(name.lstrip("*"), kinds.get(name[: name.count("*")], inspect.Parameter.POSITIONAL_OR_KEYWORD))
        for name in names
    ]
    function.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
    return function


def nothing(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a stand-in computes nothing")


def core_algos() -> dict[str, Any]:
    losses: dict[str, Any] = {}
    estimators: dict[str, Any] = {"gdpo": nothing}

    def register(table: dict[str, Any]) -> Callable[[str], Callable[[Any], Any]]:
        def decorator(name: str) -> Callable[[Any], Any]:
            if table is estimators and name in table:
                raise ValueError(f"{name} has already been registered")
            return lambda function: table.setdefault(name, function)

        return decorator

    bodies = {"register_policy_loss": register(losses), "register_adv_est": register(estimators)}
    names = RECORDED["signatures"]["verl.trainer.ppo.core_algos"]
    made = {name: with_signature(parameters, bodies.get(name, nothing)) for name, parameters in names.items()}
    return {**made, "POLICY_LOSS_REGISTRY": losses, "ADV_ESTIMATOR_REGISTRY": estimators}


class Batch(dict[str, Any]):
    """As much of a TensorDict as the engine reads."""

    def copy(self) -> Batch:
        return Batch(self)


def engine(calls: list[tuple[str, Batch]]) -> type:
    """An engine that records the batches that reach its own methods."""
    names = RECORDED["signatures"]["verl.workers.engine.fsdp.transformer_impl"]

    def prepare_model_inputs(self: Any, micro_batch: Batch) -> Any:
        calls.append(("inputs", micro_batch))
        return self.inputs(micro_batch)

    def prepare_model_outputs(self: Any, output: Any, output_args: Any, micro_batch: Batch, processor: Any) -> Any:
        calls.append(("outputs", micro_batch))
        return {"log_probs": output}

    def forward_step(self: Any, micro_batch: Batch, loss_function: Any, forward_only: bool) -> Any:
        return self.step(micro_batch)

    bodies = (prepare_model_inputs, prepare_model_outputs, forward_step)
    methods = {
        body.__name__: with_signature(names[f"FSDPEngineWithLMHead.{body.__name__}"], body)
        for body in bodies
    }  # fmt: skip
    return type("FSDPEngineWithLMHead", (), methods)


def stand_in_modules() -> dict[str, ModuleType]:
    """By name. `verl.models.mcore.model_forward_fused` imports the head by name, as verl's does."""
    head_names = RECORDED["signatures"]["verl.utils.kernel.linear_cross_entropy"]["LinearCrossEntropy.forward"]
    forward = with_signature(head_names, nothing)
    head = type("LinearCrossEntropy", (), {"forward": staticmethod(forward)})

    def own(*args: Any) -> str:
        return "verl's own"

    calls: list[tuple[str, Batch]] = []
    contents: dict[str, dict[str, Any]] = {
        "verl.trainer.ppo.core_algos": core_algos(),
        "verl.utils.kernel.linear_cross_entropy": {"LinearCrossEntropy": head, "linear_cross_entropy": own},
        "verl.utils.tensordict_utils": {
            "get_non_tensor_data": lambda data, key, default: data.get(key, default),
            "assign_non_tensor": lambda data, **values: data.update(values),
        },
        "verl.models.mcore.model_forward_fused": {"linear_cross_entropy": own},
        "verl.workers.engine.fsdp.transformer_impl": {"FSDPEngineWithLMHead": engine(calls), "calls": calls},
    }
    modules: dict[str, ModuleType] = {}
    for name, values in contents.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            modules.setdefault(path, ModuleType(path)).__path__ = []
            if depth > 1:
                setattr(modules[".".join(parts[: depth - 1])], parts[depth - 1], modules[path])
        modules[name].__dict__.update(values)
    return modules


@contextmanager
def stand_in() -> Iterator[ModuleType]:
    """`grpo_kernels.integrations.verl`, imported anew over the stand-in, in whose place verl's modules are put back."""

    def mine() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == "verl" or name.startswith(_ADAPTER)]

    saved = {name: sys.modules.pop(name) for name in mine()}
    sys.modules.update(stand_in_modules())
    try:
        yield importlib.import_module(_ADAPTER)
    finally:
        for name in mine():
            del sys.modules[name]
        sys.modules.update(saved)


@pytest.fixture(scope="module")
def adapter() -> Iterator[ModuleType]:
    """`grpo_kernels.integrations.verl` over the stand-in."""
    with stand_in() as module:
        yield module
