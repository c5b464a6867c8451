"""Parameters in parts, as ZeRO-3 keeps them: what its hooks do, for tests that do without DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grpo_kernels import FusedLMHead


class _BeforeBackward(torch.autograd.Function):
    """Gathers before the backward of the module whose outputs pass through it."""

    @staticmethod
    def forward(ctx: Any, gather: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.gather = gather
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.gather()
        return None, *grads


class PartitionedParameters:
    """What ZeRO-3 does: a parameter is whole between the hooks of its module and empty elsewhere."""

    def __init__(self, module: nn.Module, world: int) -> None:
        self.world = world
        self.shards: dict[nn.Parameter, Tensor] = {}
        self.shapes = {parameter: parameter.shape for parameter in module.parameters()}
        self.grads: dict[nn.Parameter, Tensor] = {}
        for parameter in self.shapes:
            self.shards[parameter] = self._mine(parameter.detach())
            parameter.register_post_accumulate_grad_hook(self._reduce)
        for child in module.modules():
            if list(child.parameters(recurse=False)):
                child.register_forward_pre_hook(self._before_forward)
                child.register_forward_hook(self._after_forward)
        self._release(module, recurse=True)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        parts = [torch.empty_like(self.shards[parameter]) for _ in range(self.world)]
        dist.all_gather(parts, self.shards[parameter])
        shape = self.shapes[parameter]
        return torch.cat(parts)[: shape.numel()].view(shape)

    def descend(self, rate: float) -> None:
        for parameter, grad in self.grads.items():
            self.shards[parameter] -= rate * self._mine(grad)

    def _mine(self, tensor: Tensor) -> Tensor:
        padded = nn.functional.pad(tensor.flatten(), (0, -tensor.numel() % self.world))
        return padded.chunk(self.world)[dist.get_rank()].clone()

    def _gather(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = self.whole(parameter)
            parameter.ds_status = SimpleNamespace(name="AVAILABLE")

    def _release(self, module: nn.Module, recurse: bool = False) -> None:
        for parameter in module.parameters(recurse):
            if isinstance(module, FusedLMHead):
                parameter.data.fill_(float("nan"))  # whoever kept the memory instead of the parameter finds out
            parameter.data = torch.empty(0)
            parameter.ds_status = SimpleNamespace(name="NOT_AVAILABLE")

    def _before_forward(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._gather(module)

    def _after_forward(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        outputs = output if isinstance(output, tuple) else (output,)
        self._release(module)
        outputs = _BeforeBackward.apply(lambda: self._gather(module), *outputs)
        return outputs if isinstance(output, tuple) else outputs[0]

    def _reduce(self, parameter: nn.Parameter) -> None:
        grad, parameter.grad = parameter.grad, None
        dist.all_reduce(grad)
        self.grads[parameter] = self.grads.get(parameter, 0.0) + grad / self.world
        parameter.data = torch.empty(0)
