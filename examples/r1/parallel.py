"""One process or several: what the stages ask of the ranks, whichever it is.

Every rank reads all prompts of a step and samples its share of each group, so groups straddle ranks. What is random is
drawn for all ranks alike, and each takes its own part: a run is the same for any number of them, up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from examples.r1.errors import RunError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them. All of them make the same calls in the same order.

    A single process has no group: everything below gives back what it was given, and nothing waits.
    """

    rank: int
    world: int
    process_group: dist.ProcessGroup | None
    device: torch.device  # of this rank

    @classmethod
    def single(cls, device: str | torch.device = "cpu") -> Ranks:
        return cls(0, 1, None, torch.device(device))

    @classmethod
    @contextmanager
    def from_environment(cls, device: str) -> Iterator[Ranks]:
        """The ranks that `torchrun` started, on NCCL with a GPU each ("cuda"), or on gloo; else a single process.

        Raises:
            ValueError: something else than torchrun set WORLD_SIZE, or there are fewer GPUs than ranks.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            yield cls.single(device)
            return
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(
                f"WORLD_SIZE = {world} is set, {', '.join(missing)} not: several processes are started by "
                f"torchrun --nproc-per-node {world} -m examples.r1"
            )
        own = _own_device(device)
        # Rewards and counts are on the CPU whatever trains, so gloo is there beside NCCL.
        dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo")
        try:
            yield cls(dist.get_rank(), world, dist.group.WORLD, own)
        finally:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    # parts -----------------------------------------------------------------------------------------------------------

    def share(self, name: str, count: int) -> int:
        """How many of `count` things are each rank's. Raises RunError with their `name` if they cannot be shared."""
        if count % self.world != 0:
            raise RunError(f"{name} must be a multiple of {self.world}, the number of ranks, got {count}")
        return count // self.world

    def part(self, name: str, count: int) -> slice:
        """Which of `count` things are this rank's: equal parts in the order of the ranks. Raises as `share`."""
        share = self.share(name, count)
        return slice(self.rank * share, (self.rank + 1) * share)

    def own_group(self, group_size: int) -> int:
        """How many samples of every prompt this rank draws: an equal share; of groups of one, all."""
        return group_size if group_size == 1 else self.share("group_size", group_size)

    def own_prompts(self, values: Tensor, group_size: int) -> Tensor:
        """Of [N, ...], the prompts that this rank samples: all of them; of groups of one, an equal part."""
        return values[self.part("prompts", len(values))] if group_size == 1 else values

    def own_samples(self, values: Tensor, group_size: int) -> Tensor:
        """[N * G / world, ...], this rank's rows of [N * G, ...]: `own_group` samples of each of `own_prompts`."""
        if group_size == 1:
            return values[self.part("prompts", len(values))]
        groups = values.unflatten(0, (-1, self.world, self.own_group(group_size)))
        return groups[:, self.rank].flatten(0, 1)

    # together --------------------------------------------------------------------------------------------------------

    def sum_(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.process_group is not None:
            dist.all_reduce(values, group=self.process_group)
        return values

    def total(self, value: Tensor | float) -> float:
        """The sum over the ranks of one number."""
        return float(self.sum_(torch.as_tensor(value).detach().clone()))

    def any(self, flag: bool | Tensor) -> bool:
        """Whether it holds anywhere on any rank: for loops that must end together."""
        found = torch.as_tensor(flag).any()
        if self.process_group is not None:
            found = found.to(torch.int32)
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.process_group)
        return bool(found)

    def gather(self, values: Tensor) -> Tensor:
        """[world * B, ...], every rank's rows in the order of the ranks, from [B, ...] on each."""
        if self.process_group is None:
            return values
        gathered = values.new_empty((self.world * len(values), *values.shape[1:]))
        distributed: Any = dist
        gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor  # its older name
        gather(gathered, values.contiguous(), group=self.process_group)
        return gathered

    def gather_samples(self, values: Tensor, group_size: int) -> Tensor:
        """[N * G, ...] in the order of prompts and samples, from each rank's `own_samples` [N * G / world, ...]."""
        ranks = self.gather(values)
        if group_size == 1:
            return ranks
        return ranks.unflatten(0, (self.world, -1, self.own_group(group_size))).transpose(0, 1).flatten(0, 2)

    def from_main(self, function: Callable[[], Result]) -> Result:
        """What `function` returns on rank 0, on all ranks; if it raises there, all raise the same."""
        if self.process_group is None:
            return function()
        found: list[Any] = [None, None]
        if self.is_main:
            try:
                found[0] = function()
            except Exception as error:  # told to the others, who would wait for ever
                found[1] = error
        dist.broadcast_object_list(found, src=0, group=self.process_group)
        result, error = found
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        if self.process_group is not None:
            dist.barrier(group=self.process_group)


SINGLE = Ranks.single()
"""For what can be called without ranks."""


def _own_device(device: str) -> torch.device:
    """The GPU of this rank among those of its machine, or the CPU."""
    if torch.device(device).type != "cuda":
        return torch.device(device)
    index, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if index >= found:
        raise ValueError(f"every rank needs a GPU of its own, got {found} for rank {index} of this machine")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
