"""Putting the kernels in the place of TRL's, and back."""

from __future__ import annotations

import importlib
import inspect
from contextlib import AbstractContextManager
from typing import Any

from grpo_kernels.integrations._patch import (
    IncompatibleVersion,
    Patch,
    Replacement,
    attribute_of,
    check_signature,
    places,
    version_of,
)
from grpo_kernels.integrations.trl import head, logits
from grpo_kernels.integrations.trl.version import require_trl

_UTILS = "trl.trainer.utils"
_HEAD = "_ChunkedLogProbFunction"
_HEAD_PARAMETERS = (
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
)  # fmt: skip
_PARAMETERS = {
    "selective_log_softmax": ("logits", "index", "temperature", "row_mask"),
    "entropy_from_logits": ("logits", "chunk_size"),
    "selective_log_softmax_and_entropy": ("logits", "index", "entropy_requires_grad", "temperature", "row_mask"),
    "_supports_trl_loss_kernel": ("logits", "index", "row_mask"),
    "_use_triton": ("device",),
}
_OF_LOGITS = {
    "selective_log_softmax": logits.selective_log_softmax,
    "entropy_from_logits": logits.entropy_from_logits,
    "selective_log_softmax_and_entropy": logits.selective_log_softmax_and_entropy,
}


def patch() -> None:
    """Makes all trainers of TRL compute log-probs and entropies with the kernels, those that exist already, too.

    Replaced are what its fused head calls, by `linear_token_log_probs`, and `selective_log_softmax`,
    `entropy_from_logits` and `selective_log_softmax_and_entropy`, by `token_log_probs`: in `trl.trainer.utils` and in
    every module of TRL that has imported them or will. What the kernels do not compute as TRL does goes to TRL's own
    functions. A second call does nothing.

    Raises:
        ImportError: TRL is not installed.
        IncompatibleVersion: it is older than 1.16, or its functions take other parameters; nothing has been replaced.
    """
    _PATCH.apply()


def unpatch() -> None:
    """Puts back what `patch` replaced, unless someone else has replaced it since. A second call does nothing."""
    _PATCH.undo()


def is_patched() -> bool:
    """Whether `patch` is in force in this process."""
    return _PATCH.applied


def patched() -> AbstractContextManager[None]:
    """A block in which `patch` is in force; after it all is as it was before."""
    return _PATCH.within()


def _build() -> list[Replacement]:
    require_trl()
    utils = _import_utils()
    _check(utils)
    replacements = [
        Replacement(utils, _HEAD, head.fused_head(getattr(utils, _HEAD))),
        Replacement(utils, "_use_triton", head.scored_rows(utils._use_triton)),
    ]
    for function, build in _OF_LOGITS.items():
        value = build(utils)
        replacements += [Replacement(module, name, value) for module, name in places("trl", getattr(utils, function))]
    return replacements


def _import_utils() -> Any:
    try:
        return importlib.import_module(_UTILS)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{_UTILS}.".startswith(f"{error.name}."):
            raise
        raise IncompatibleVersion(f"trl {version_of('trl')} has no {error.name}") from error


def _check(utils: Any) -> None:
    """Raises unless all that is replaced, or called, has the expected form."""
    for name in (_HEAD, "is_triton_available", *_PARAMETERS):
        attribute_of("trl", _UTILS, utils, name)
    for name, parameters in _PARAMETERS.items():
        check_signature("trl", f"{_UTILS}.{name}", getattr(utils, name), parameters)
    forward = getattr(getattr(utils, _HEAD), "forward", None)
    if forward is None:
        raise IncompatibleVersion(f"{_UTILS}.{_HEAD} must be TRL's autograd function, got {getattr(utils, _HEAD)!r}")
    check_signature("trl", f"{_UTILS}.{_HEAD}.forward", forward, _HEAD_PARAMETERS)
    outputs = inspect.signature(forward).parameters["outputs"].default
    if outputs != head.OUTPUTS:
        raise IncompatibleVersion(f"{_UTILS}.{_HEAD} must return log-probs and {head.OUTPUTS}, got {outputs}")


_PATCH = Patch("trl", _build)
