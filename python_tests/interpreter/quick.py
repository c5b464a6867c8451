"""Triton's interpreter without what it does over and over.

Every call of a jitted function from another one replaces the operations of triton.language by the interpreter's, a
millisecond each time, although the launch has replaced them already and puts them back at its end.
"""

from __future__ import annotations

from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture
def replaced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls from kernels replace only what their launch has not."""
    done: set[tuple[bool, bool]] = set()
    launch, replace = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def languages(function: Any) -> tuple[bool, bool]:
        found = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        return tl in found, tl.core in found

    def launched(executor: Any, *arguments: Any, **options: Any) -> Any:
        done.clear()
        return launch(executor, *arguments, **options)

    def called(function: Any, *arguments: Any, **options: Any) -> Any:
        if languages(function.fn) not in done:
            done.add(languages(function.fn))
            replace(function.fn)
        return function.rewrite()(*arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", called)
