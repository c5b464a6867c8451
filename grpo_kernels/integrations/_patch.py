"""Replacing attributes of another package, so that it can be undone and so that another version of it is refused."""

from __future__ import annotations

import importlib.metadata
import inspect
import threading
from collections.abc import Callable, Sequence
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
    found = [_STARS.get(p.kind, "") + p.name for p in inspect.signature(function).parameters.values()]
    if found != list(parameters):
        raise IncompatibleVersion(
            f"{what} must take ({', '.join(parameters)}), got ({', '.join(found)}) from {package} {_version(package)}"
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"


class Patch:
    """A set of replacements that is there as a whole or not at all.

    Applying it twice, or undoing it twice, does nothing. What is undone is what this patch put there: an attribute that
    someone else has replaced since stays as it is.
    """

    def __init__(self, build: Callable[[], Sequence[Replacement]]) -> None:
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
            for (owner, name, value), original in zip(self._values, self._originals, strict=True):
                if getattr(owner, name) is value:
                    setattr(owner, name, original.value)
            self._originals, self._values = [], []
