"""patch() for verl: what it replaces, puts back and refuses, on the stand-in."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from python_tests.verl.conftest import Batch, nothing, stand_in

HEAD = "verl.utils.kernel.linear_cross_entropy"
FUSED = "verl.models.mcore.model_forward_fused"
ENGINE = "verl.workers.engine.fsdp.transformer_impl"


@pytest.fixture
def fresh() -> Iterator[ModuleType]:
    with stand_in() as adapter:
        yield adapter


def head(name: str = HEAD) -> Any:
    return sys.modules[name].linear_cross_entropy


def registry() -> dict[str, Any]:
    return sys.modules["verl.trainer.ppo.core_algos"].ADV_ESTIMATOR_REGISTRY


def test_everything_is_replaced_and_put_back(fresh: ModuleType) -> None:
    engine = sys.modules[ENGINE].FSDPEngineWithLMHead
    methods = dict(vars(engine))
    assert not fresh.is_patched()
    for _ in range(2):
        fresh.patch()
        assert fresh.is_patched()
        assert head() is head(FUSED) is fresh.linear_cross_entropy
        assert registry()["gdpo"] is fresh.ESTIMATORS["gdpo"]
        assert engine.forward_step is not methods["forward_step"]
    for _ in range(2):
        fresh.unpatch()
        assert not fresh.is_patched()
        assert head()() == head(FUSED)() == "verl's own"
        assert registry()["gdpo"] is nothing
        assert {name: vars(engine)[name] for name in methods if name[0] != "_"} == {
            name: method for name, method in methods.items() if name[0] != "_"
        }
    with fresh.patched(), fresh.patched():
        assert head() is fresh.linear_cross_entropy
    assert head()() == "verl's own"


def test_modules_that_import_it_later_get_verls_own_back(fresh: ModuleType) -> None:
    late = ModuleType("verl.models.mcore.late")
    sys.modules[late.__name__] = late
    with fresh.patched():
        late.linear_cross_entropy = head()  # type: ignore[attr-defined]
    assert late.linear_cross_entropy() == "verl's own"  # type: ignore[attr-defined]


def test_importing_autopatch_patches(fresh: ModuleType) -> None:
    importlib.import_module(fresh.__name__ + ".autopatch")
    assert fresh.is_patched()


def test_without_the_fsdp_engine_the_head_alone_is_replaced(fresh: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, ENGINE, None)
    monkeypatch.delattr(sys.modules["verl.workers.engine.fsdp"], "transformer_impl")
    with fresh.patched():
        assert head() is fresh.linear_cross_entropy


@pytest.mark.parametrize("what", ["head", "engine"])
def test_another_verl_is_refused(fresh: ModuleType, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.7.0")

    def other(ctx: Any, hidden: Any) -> None: ...

    if what == "head":
        monkeypatch.setattr(sys.modules[HEAD].LinearCrossEntropy, "forward", other)
        message = (
            r"LinearCrossEntropy.forward must take \(ctx, hidden, weight, .*\), got \(ctx, hidden\) from verl 0.7.0"
        )
    else:
        monkeypatch.setattr(sys.modules[ENGINE].FSDPEngineWithLMHead, "forward_step", other)
        message = r"FSDPEngineWithLMHead.forward_step must take \(self, micro_batch, .*\), got \(ctx, hidden\)"
    with pytest.raises(fresh.IncompatibleVersion, match=message):
        fresh.patch()
    assert not fresh.is_patched()
    assert head()() == "verl's own"
    assert registry()["gdpo"] is nothing


def test_what_a_module_lacks_is_refused(fresh: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.7.0")
    core_algos = sys.modules["verl.trainer.ppo.core_algos"]
    for owner, name, call in (
        (core_algos, "register_policy_loss", fresh.register),
        (sys.modules[HEAD], "LinearCrossEntropy", fresh.patch),
        (sys.modules[ENGINE], "FSDPEngineWithLMHead", fresh.patch),
    ):
        with monkeypatch.context() as context:
            context.delattr(owner, name)
            with pytest.raises(fresh.IncompatibleVersion, match=f"{name} is missing from verl 0.7.0"):
                call()


def test_verl_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in() as adapter:
        name = adapter.__name__
        for loaded in [loaded for loaded in sys.modules if loaded.startswith(name)]:
            del sys.modules[loaded]
        monkeypatch.setitem(sys.modules, "verl.trainer.ppo", None)
        with pytest.raises(ImportError, match=r"grpo_kernels.integrations.verl needs verl 0.9: pip install verl"):
            importlib.import_module(name)


class Jagged(SimpleNamespace):
    """As much of a jagged tensor as the engine's outputs need."""

    def offsets(self) -> torch.Tensor:
        return torch.tensor([0, 2, 5])


class Engine:
    """Makes one of the stand-in's engines whose model calls the patched head."""

    def __init__(self, adapter: ModuleType, backend: str = "triton") -> None:
        module = sys.modules[ENGINE]
        self.calls = module.calls
        self.engine = module.FSDPEngineWithLMHead()
        self.engine.module = SimpleNamespace(_verl_fused_kernels_backend=backend)
        self.engine.inputs = lambda batch: ({"return_dict": None}, {
            "temperature_rmpad": torch.arange(5.0), "input_ids_rmpad_rolled": torch.arange(5), "temperature": "samples",
        })  # fmt: skip
        self.engine._gather_and_unpad_packed = lambda values, pad: values[: len(values) - pad]


def test_temperatures_of_samples_reach_the_model(fresh: ModuleType) -> None:
    fresh.patch()
    made = Engine(fresh)
    batch = Batch(use_fused_kernels=True, temperature=torch.ones(2), use_remove_padding=True)
    inputs, _ = made.engine.prepare_model_inputs(batch)
    assert made.calls[-1][1]["use_fused_kernels"] is False
    assert batch["use_fused_kernels"] is True
    assert torch.equal(inputs["temperature"], torch.arange(5.0)[None])
    assert torch.equal(inputs["shift_labels"], torch.arange(5)[None])
    assert inputs["return_dict"] is True
    inputs, _ = made.engine.prepare_model_inputs(Batch({**batch, "use_remove_padding": False}))
    assert inputs["temperature"] == "samples"
    assert "shift_labels" not in inputs
    for other in ({"temperature": 1.0}, {"use_fused_kernels": False}):  # verl serves these itself
        given = Batch({**batch, **other})
        made.engine.prepare_model_inputs(given)
        assert made.calls[-1][1] is given
    kind = type(made.engine)
    with_more = type("WithMore", (kind,), {"prepare_model_outputs": lambda *arguments: None})
    for served, engine in (
        (True, type("Turbo", (kind,), {})()),
        (False, with_more()),
        (False, Engine(fresh, backend="torch").engine),
    ):
        engine.module, engine.inputs = getattr(engine, "module", made.engine.module), made.engine.inputs
        engine.prepare_model_inputs(batch)
        assert (made.calls[-1][1] is not batch) == served  # verl's own method refuses it


@pytest.mark.parametrize("remove_padding", [True, False])
def test_the_sum_of_squares_reaches_the_output(fresh: ModuleType, remove_padding: bool) -> None:
    fresh.patch()
    made = Engine(fresh)
    shape, pad = ((1, 6), 1) if remove_padding else ((2, 3), 0)
    hidden, weight = torch.randn(*shape, 4), torch.randn(11, 4)
    labels = torch.randint(11, shape)
    _, _, squares = fresh.linear_cross_entropy_with_sum_pi_squared(hidden, weight, labels)

    def step(batch: Batch) -> Any:
        log_probs, _ = head()(hidden, weight, labels)
        return made.engine.prepare_model_outputs(log_probs, {"pad_size": pad}, batch, None)

    made.engine.step = step
    batch = Batch(use_fused_kernels=True, calculate_sum_pi_squared=True, use_remove_padding=remove_padding)
    batch["input_ids"] = Jagged()
    output = made.engine.forward_step(batch, None, True)
    assert made.calls[-1][1]["calculate_sum_pi_squared"] is False
    wanted = squares.reshape(-1)[[0, 1, 2, 3, 4] if remove_padding else [0, 1, 3, 4, 5]]
    assert torch.equal(output["sum_pi_squared"].values(), wanted)
    assert torch.equal(output["sum_pi_squared"].offsets(), Jagged().offsets())

    made.engine.step = lambda batch: made.engine.prepare_model_outputs(None, {}, batch, None)
    with pytest.raises(RuntimeError, match="the model's forward did not call linear_cross_entropy"):
        made.engine.forward_step(batch, None, True)
    plain = Batch({**batch, "calculate_sum_pi_squared": False})
    assert made.engine.forward_step(plain, None, True) == {"log_probs": None}
    assert made.calls[-1][1] is plain
