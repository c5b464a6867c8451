"""The gates, one module per op: `CUDA` (of the kernels in csrc/<op>) and `TRITON` (its launchers and their gates)."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def modules() -> dict[str, ModuleType]:
    """Name of the op -> its module."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}
