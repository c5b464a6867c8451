"""Replacing attributes of another package: whole, reversible, refused where signatures differ."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from grpo_kernels.integrations._patch import IncompatibleVersion, Patch, Replacement, attribute_of, check_signature

PACKAGE = "patched_package"


def original(a: int, b: int) -> int:
    return a + b


def another(a: int, b: int) -> int:
    return a * b


def make(owner: SimpleNamespace) -> Patch:
    return Patch(PACKAGE, lambda: [Replacement(owner, "first", another), Replacement(owner, "second", another)])


@pytest.fixture
def owner() -> SimpleNamespace:
    return SimpleNamespace(first=original, second=original)


def test_apply_and_undo_are_idempotent(owner: SimpleNamespace) -> None:
    patch = make(owner)
    assert not patch.applied
    for _ in range(2):
        patch.apply()
        assert patch.applied
        assert (owner.first, owner.second) == (another, another)
    for _ in range(2):
        patch.undo()
        assert not patch.applied
        assert (owner.first, owner.second) == (original, original)
    patch.apply()
    assert owner.first is another


def test_what_someone_else_put_there_stays(owner: SimpleNamespace) -> None:
    patch = make(owner)
    patch.apply()
    foreign = owner.second = lambda a, b: 0
    patch.undo()
    assert (owner.first, owner.second) == (original, foreign)


def test_modules_that_were_imported_in_between_get_the_original(
    owner: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, foreign = ModuleType(f"{PACKAGE}.late"), ModuleType(f"{PACKAGE}_of_another")
    for module in (late, foreign):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, f"{PACKAGE}.absent", None)  # type: ignore[arg-type]
    patch = make(owner)
    patch.apply()
    vars(late)["renamed"] = vars(foreign)["renamed"] = owner.first
    patch.undo()
    assert vars(late)["renamed"] is original
    assert vars(foreign)["renamed"] is another


def test_after_a_block_all_is_as_before(owner: SimpleNamespace) -> None:
    patch = make(owner)

    def fails() -> None:
        assert owner.first is another
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), patch.within():
        fails()
    assert owner.first is original
    patch.apply()
    with patch.within():
        patch.undo()
        assert owner.first is original
    assert owner.first is another


def test_an_attribute_that_a_version_lacks_is_named(owner: SimpleNamespace) -> None:
    assert attribute_of("pytest", "owner", owner, "first") is original
    with pytest.raises(IncompatibleVersion, match=rf"owner\.third is missing from pytest {pytest.__version__}"):
        attribute_of("pytest", "owner", owner, "third")


def test_nothing_is_replaced_when_a_check_fails(owner: SimpleNamespace) -> None:
    def build() -> list[Replacement]:
        check_signature("pytest", "owner.first", owner.first, ("a", "b"))
        check_signature("pytest", "owner.second", owner.second, ("a", "c"))
        return [Replacement(owner, "first", another), Replacement(owner, "second", another)]

    patch = Patch(PACKAGE, build)
    message = rf"owner.second must take \(a, c\), got \(a, b\) from pytest {pytest.__version__}"
    with pytest.raises(IncompatibleVersion, match=message):
        patch.apply()
    assert not patch.applied
    assert owner.first is original


def test_a_missing_attribute_replaces_nothing(owner: SimpleNamespace) -> None:
    patch = Patch(PACKAGE, lambda: [Replacement(owner, "first", another), Replacement(owner, "third", another)])
    with pytest.raises(AttributeError, match="third"):
        patch.apply()
    assert not patch.applied
    assert owner.first is original


def test_variadic_parameters_are_written_with_their_stars() -> None:
    def function(a: int, *rest: int, b: int = 0, **options: int) -> None: ...

    check_signature("pytest", "function", function, ("a", "*rest", "b", "**options"))
    with pytest.raises(IncompatibleVersion, match=r"must take \(a, b\)"):
        check_signature("pytest", "function", function, ("a", "b"))
