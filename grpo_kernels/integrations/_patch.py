"""Replacing attributes of another package, so that it can be undone and so that another version of it is refused."""

from __future__ import annotations

import importlib.metadata
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


class IncompatibleVersion(RuntimeError):
    """The installed version of another package is not the one that an adapter was written for; the message says
    where they differ."""


class Replacement(NamedTuple):
    """`value` in the place of `owner`'s attribute `name`."""

    owner: Any
    name: str
    value: Any


def check_signature(package: str, what: str, function: Callable[..., Any], parameters: Sequence[str]) -> None:
    """Raises unless `function` takes exactly these parameters, in this order.

    Args:
        package: distribution whose version the message names.
        what: the function's full name, for the message.
        function: what the installed package has.
        parameters: the names that the adapter was written for; variadic ones with their stars.

    Raises:
        IncompatibleVersion: the signatures differ.
    """
    found = parameter_names(function)
    if found != list(parameters):
        raise IncompatibleVersion(
            f"{what} must take ({', '.join(parameters)}), got ({', '.join(found)}) from {package} {version_of(package)}"
        )


def parameter_names(function: Callable[..., Any]) -> list[str]:
    """Names of a function's parameters in their order, variadic ones with their stars."""
    return [_STARS.get(p.kind, "") + p.name for p in inspect.signature(function).parameters.values()]


def attribute_of(package: str, where: str, owner: Any, name: str) -> Any:
    """`owner`'s attribute of this name.

    Args:
        package: distribution whose version the message names.
        where: the owner's full name, for the message.

    Raises:
        IncompatibleVersion: there is none.
    """
    if not hasattr(owner, name):
        raise IncompatibleVersion(f"{where}.{name} is missing from {package} {version_of(package)}")
    return getattr(owner, name)


def version_of(package: str) -> str:
    """The version of an installed distribution, for messages."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"


def places(package: str, value: object) -> list[tuple[ModuleType, str]]:
    """Where the loaded modules of a package have `value`, under which name. Nothing is imported."""
    return [
        (module, name)
        for full_name, module in list(sys.modules.items())
        if full_name == package or full_name.startswith(f"{package}.")
        for name, found in list(getattr(module, "__dict__", {}).items())
        if found is value
    ]


class Patch:
    """Replacements for a package, there as a whole or not at all.

    Applying it twice, or undoing it twice, does nothing. What is undone is what this patch put there: an attribute that
    someone else has replaced since stays as it is. Modules of the package that were imported in between, and so have a
    replacement under a name of theirs, get the original.
    """

    def __init__(self, package: str, build: Callable[[], Sequence[Replacement]]) -> None:
        self._package = package
        self._build = build
        self._lock = threading.RLock()
        self._originals: list[Replacement] = []
        self._values: list[Replacement] = []

    @property
    def applied(self) -> bool:
        return bool(self._values)

    def apply(self) -> None:
        """Checks first, in `build`, and replaces then.

        Raises:
            ImportError, IncompatibleVersion: the other package is missing or differs; nothing has been replaced.
        """
        with self._lock:
            if self.applied:
                return
            values = list(self._build())
            self._originals = [Replacement(owner, name, getattr(owner, name)) for owner, name, _ in values]
            for owner, name, value in values:
                setattr(owner, name, value)
            self._values = values

    def undo(self) -> None:
        with self._lock:
            originals: dict[int, tuple[Any, Any]] = {}
            for (owner, name, value), original in zip(self._values, self._originals, strict=True):
                originals[id(value)] = (value, original.value)
                if getattr(owner, name) is value:
                    setattr(owner, name, original.value)
            for value, original_value in originals.values():
                for module, name in places(self._package, value):
                    setattr(module, name, original_value)
            self._originals, self._values = [], []

    @contextmanager
    def within(self) -> Iterator[None]:
        """Applied in the block, and after it as it was before."""
        before = self.applied
        self.apply()
        try:
            yield
        finally:
            if before:
                self.apply()
            else:
                self.undo()
