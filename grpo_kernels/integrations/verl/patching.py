"""`patch()`: verl's own `linear_cross_entropy` is replaced, wherever it was imported."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from grpo_kernels.integrations._patch import Patch, Replacement, attribute_of, check_signature, places
from grpo_kernels.integrations.verl import advantages, engine
from grpo_kernels.integrations.verl.head import linear_cross_entropy

_MODULE = "verl.utils.kernel.linear_cross_entropy"
HEAD_SIGNATURE = ("ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group")


class _Entries:
    """A dictionary's entries as attributes, which is what a Replacement replaces."""

    def __init__(self, table: dict[str, Any]) -> None:
        object.__setattr__(self, "_table", table)

    def __getattr__(self, name: str) -> Any:
        return self._table[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self._table[name] = value


def _build() -> list[Replacement]:
    from verl.trainer.ppo import core_algos
    from verl.utils.kernel import linear_cross_entropy as module

    function = attribute_of("verl", _MODULE, module, "LinearCrossEntropy")
    check_signature("verl", f"{_MODULE}.LinearCrossEntropy.forward", function.forward, HEAD_SIGNATURE)
    stock = attribute_of("verl", _MODULE, module, "linear_cross_entropy")
    made = [Replacement(holder, name, linear_cross_entropy) for holder, name in places("verl", stock)]
    made += engine.replacements()
    registry: dict[str, Any] = core_algos.ADV_ESTIMATOR_REGISTRY
    # verl passes the components of the reward to the estimator of this name alone.
    if "gdpo" in registry:
        made.append(Replacement(_Entries(registry), "gdpo", advantages.gdpo))
    return made


_PATCH = Patch("verl", _build)


def patch() -> None:
    """Puts the kernels in the place of verl's, in this process; a second call does nothing.

    - ``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``, and the name in every module of verl that has
      imported it: the head of ``use_fused_kernels=True`` with ``impl_backend="triton"`` (FSDP) and of Megatron.
    - Three methods of the FSDP engine, so that it takes temperatures of each sample and ``calculate_sum_pi_squared``
      together with those fused kernels.
    - The estimator "gdpo" in verl's registry.

    Raises:
        ImportError: verl is missing.
        IncompatibleVersion: it is not the verl that this was written for (0.9). Nothing has been replaced.
    """
    _PATCH.apply()


def unpatch() -> None:
    """Puts verl's own back. What someone else has replaced since stays."""
    _PATCH.undo()


def is_patched() -> bool:
    """Whether `patch` is in force in this process."""
    return _PATCH.applied


def patched() -> AbstractContextManager[None]:
    """A block in which `patch` is in force; after it all is as it was before."""
    return _PATCH.within()
