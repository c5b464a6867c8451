"""The backward where the forward has computed the derivative: stored gradients times the upstream scalar."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels._direct import is_direct

try:
    from torch._C._autograd import _get_current_graph_task_keep_graph as _keeps_graph
except ImportError:  # a name that PyTorch promises to nobody; without it every gradient is a product

    def _keeps_graph() -> bool:
        return True


def times_upstream(
    grad_log_probs: Tensor | None, grad_entropy: Tensor | None, scale: Tensor, upstream: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of log_probs and entropy, as the op stored them, times its [2] scale and the 0-d upstream gradient.

    A gradient that is final as it was stored is returned itself, which saves a pass over memory.
    """
    final = _is_final(scale, upstream)
    factors = scale if final else upstream * scale
    if grad_log_probs is not None and not final:
        grad_log_probs = grad_log_probs * factors[0]
    return grad_log_probs, None if grad_entropy is None else grad_entropy * factors[1]


def _is_final(scale: Tensor, upstream: Tensor) -> bool:
    """Whether nothing is left to multiply the gradient of log_probs by, where asking does not wait for a device.

    Never where the graph is kept: the gradient of a second backward must not be what the caller changed after the
    first.
    """
    if upstream.device.type != "cpu" or torch.compiler.is_compiling() or _keeps_graph():
        return False
    return is_direct((scale, upstream)) and upstream.item() == 1.0 and scale.tolist()[0] == 1.0
