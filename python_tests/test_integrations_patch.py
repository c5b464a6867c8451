"""Replacing attributes of another package: whole, reversible, refused where signatures differ."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from grpo_kernels.integrations._patch import IncompatibleVersion, Patch, Replacement, check_signature


def original(a: int, b: int) -> int:
    return a + b


def another(a: int, b: int) -> int:
    return a * b


def make(owner: SimpleNamespace) -> Patch:
    return Patch(lambda: [Replacement(owner, "first", another), Replacement(owner, "second", another)])


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


def test_nothing_is_replaced_when_a_check_fails(owner: SimpleNamespace) -> None:
    def build() -> list[Replacement]:
        check_signature("pytest", "owner.first", owner.first, ("a", "b"))
        check_signature("pytest", "owner.second", owner.second, ("a", "c"))
        return [Replacement(owner, "first", another), Replacement(owner, "second", another)]

    patch = Patch(build)
    message = rf"owner.second must take \(a, c\), got \(a, b\) from pytest {pytest.__version__}"
    with pytest.raises(IncompatibleVersion, match=message):
        patch.apply()
    assert not patch.applied
    assert owner.first is original


def test_a_missing_attribute_replaces_nothing(owner: SimpleNamespace) -> None:
    patch = Patch(lambda: [Replacement(owner, "first", another), Replacement(owner, "third", another)])
    with pytest.raises(AttributeError, match="third"):
        patch.apply()
    assert not patch.applied
    assert owner.first is original


def test_variadic_parameters_are_written_with_their_stars() -> None:
    def function(a: int, *rest: int, b: int = 0, **options: int) -> None: ...

    check_signature("pytest", "function", function, ("a", "*rest", "b", "**options"))
    with pytest.raises(IncompatibleVersion, match=r"must take \(a, b\)"):
        check_signature("pytest", "function", function, ("a", "b"))
