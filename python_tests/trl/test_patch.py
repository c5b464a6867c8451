"""patch, unpatch, is_patched, patched: what is replaced where, what is put back, what is refused."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs TRL")

from trl.trainer import utils

from grpo_kernels.integrations.trl import IncompatibleVersion, is_patched, patch, patched, unpatch

pytestmark = [pytest.mark.trl, pytest.mark.slow]

OF_LOGITS = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")
NAMES = (*OF_LOGITS, "_ChunkedLogProbFunction", "_use_triton")
STOCK = {name: getattr(utils, name) for name in NAMES}
USER = "trl.experimental.tpo.tpo_trainer"  # imports a function of logits by its name


def found() -> dict[str, Any]:
    return {name: getattr(utils, name) for name in NAMES}


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    unpatch()
    yield
    for name, value in STOCK.items():
        setattr(utils, name, value)
    unpatch()
    assert found() == STOCK


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> Callable[[], ModuleType]:
    """Imports a module of TRL as if for the first time."""
    before = sys.modules.get(USER)

    def load() -> ModuleType:
        monkeypatch.delitem(sys.modules, USER, raising=False)
        return importlib.import_module(USER)

    if before is not None:
        monkeypatch.setitem(sys.modules, USER, before)
    return load


def test_patched_and_put_back_as_often_as_one_likes() -> None:
    assert not is_patched()
    for _ in range(2):
        patch()
        assert is_patched()
        first = found()
        assert all(first[name] is not STOCK[name] for name in NAMES)
        patch()
        assert found() == first
        unpatch()
        unpatch()
        assert not is_patched()
        assert found() == STOCK


def test_modules_that_have_imported_the_functions(user: Callable[[], ModuleType]) -> None:
    module = user()
    stock = module.selective_log_softmax_and_entropy
    assert stock is STOCK["selective_log_softmax_and_entropy"]
    with patched():
        assert module.selective_log_softmax_and_entropy is utils.selective_log_softmax_and_entropy
        assert module.selective_log_softmax_and_entropy is not stock
    assert module.selective_log_softmax_and_entropy is stock


def test_modules_that_import_the_functions_while_they_are_replaced(user: Callable[[], ModuleType]) -> None:
    with patched():
        module = user()
        assert module.selective_log_softmax_and_entropy is utils.selective_log_softmax_and_entropy
    assert module.selective_log_softmax_and_entropy is STOCK["selective_log_softmax_and_entropy"]
    assert module.selective_log_softmax_and_entropy is utils.selective_log_softmax_and_entropy


def test_what_others_import_from_trl_stays() -> None:
    from trl import kernels

    with patched():
        assert kernels.ChunkedLogProbFunction is STOCK["_ChunkedLogProbFunction"]
        assert kernels.chunked_logprob._use_triton is STOCK["_use_triton"]


def test_a_function_keeps_its_name_text_and_signature() -> None:
    import inspect

    with patched():
        for name in OF_LOGITS:
            ours, stock = getattr(utils, name), STOCK[name]
            assert (ours.__name__, ours.__doc__) == (stock.__name__, stock.__doc__)
            own, theirs = (inspect.signature(f, follow_wrapped=False) for f in (ours, stock))
            assert [(p.name, p.default) for p in own.parameters.values()] == [
                (p.name, p.default) for p in theirs.parameters.values()
            ]


def test_blocks_nest() -> None:
    with patched():
        with patched():
            assert is_patched()
        assert is_patched()
        unpatch()
        assert not is_patched()
        with patched():
            assert is_patched()
        assert not is_patched()
    assert found() == STOCK
    patch()
    with patched():
        unpatch()
    assert is_patched()


def test_a_block_that_raises_puts_back() -> None:
    with pytest.raises(KeyError, match="mine"), patched():
        raise KeyError("mine")
    assert not is_patched()
    assert found() == STOCK


def test_what_someone_else_put_there_since_stays() -> None:
    patch()
    foreign = utils.selective_log_softmax = lambda *_: 0
    unpatch()
    assert utils.selective_log_softmax is foreign
    assert utils.entropy_from_logits is STOCK["entropy_from_logits"]


def without_temperature(logits: Any, index: Any, row_mask: Any = None) -> None: ...


class OtherHead:
    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any) -> None: ...


class OtherOutputs:
    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, temperature: Any, chunk_size: Any,
        final_logit_softcapping: Any = None, logit_scale: Any = 1.0, outputs: Any = ("entropy", "is_top1"),
    ) -> None: ...  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("selective_log_softmax", without_temperature, "must take .* got .logits, index, row_mask. from trl"),
        ("_ChunkedLogProbFunction", OtherHead, "forward must take .* got .ctx, hidden, weight. from trl"),
        ("_ChunkedLogProbFunction", OtherOutputs, "must return log-probs and .* got .'entropy', 'is_top1'."),
        ("_ChunkedLogProbFunction", object(), "must be TRL's autograd function, got <object"),
    ],
)
def test_other_signatures_are_refused_and_nothing_is_replaced(
    name: str, value: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, name, value)
    before = found()
    with pytest.raises(IncompatibleVersion, match=message), patched():
        pass
    assert not is_patched()
    assert found() == before


@pytest.mark.parametrize("name", ["_ChunkedLogProbFunction", "entropy_from_logits", "_supports_trl_loss_kernel"])
def test_a_missing_function_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(utils, name)
    with pytest.raises(IncompatibleVersion, match=f"{name} is missing from trl {importlib.metadata.version('trl')}"):
        patch()
    assert not is_patched()


def test_an_older_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.9.2")
    with pytest.raises(IncompatibleVersion, match=r"needs TRL 1\.16, got 1\.9\.2"):
        patch()


@pytest.mark.parametrize("package", ["trl", "transformers"])
def test_without_trl_the_message_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ImportError, match=r"needs TRL 1\.16: pip install 'trl>=1\.16,<2' 'transformers>="):
        patch()
    with pytest.raises(ImportError, match=r"pip install 'trl>=1\.16,<2'"):
        importlib.import_module("grpo_kernels.integrations.trl").FusedGRPOTrainer  # noqa: B018
