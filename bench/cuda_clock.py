"""The GPU's own clock: CUDA graphs of calls over rotating inputs, timed with events."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import cuda

from .case import Inputs, Provider
from .clock import Runner, error_text, restore
from .machine import cache_bytes

_HEAD_START = 1_000_000  # clock cycles, some 0.6 ms: the launch of a graph of some thousand kernels
_WARM_UPS = 3


class CudaClock:
    """Makes the runners of one case.

    Their graphs share a memory pool. Each call drops its results during the capture, so the calls of a graph, and the
    graphs of all providers, reuse the same memory: no more than the hungriest call needs.
    """

    def __init__(self, sets: list[Inputs], pristine: Inputs) -> None:
        self._sets = sets
        self._pristine = pristine
        self._pool = cuda.graph_pool_handle()
        device = next(iter(pristine.values())).device
        self._scrub = torch.zeros(2 * cache_bytes("cuda") // 4, device=device)
        self._scrubbed = torch.zeros((), device=device)

    def runner(self, provider: Provider) -> Runner:
        """The provider as a graph; where it cannot be captured, as calls between two events, which a note says."""
        work = self._calls(provider)
        clock, note = "CUDA events", "no CUDA graph, which would do other work: launch gaps count"
        if provider.capturable:
            clock, note, work = self._captured(provider, work)
        runner = Runner(provider, lambda: self._seconds(provider, work), clock, note)
        runner.round()
        return runner

    def _captured(self, provider: Provider, calls: Callable[[], None]) -> tuple[str, str, Callable[[], None]]:
        """Clock, note, and the graph, or else the calls."""
        stream = cuda.current_stream()
        try:
            return "CUDA graph", "", self._graph(provider)
        except RuntimeError as error:
            # A capture that breaks off leaves its stream current, and its pool in use.
            cuda.set_stream(stream)
            self._pool = cuda.graph_pool_handle()
            cuda.synchronize()
            return "CUDA events", f"no CUDA graph, launch gaps count ({error_text(error)})", calls

    def _calls(self, provider: Provider) -> Callable[[], None]:
        """One call for each set of inputs; results are dropped at once."""

        def work() -> None:
            for inputs in self._sets:
                provider.run(inputs)

        return work

    def _graph(self, provider: Provider) -> Callable[[], None]:
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(_WARM_UPS):
                provider.run(self._sets[0])
        cuda.current_stream().wait_stream(side)
        restore(provider, self._sets, self._pristine)
        cuda.synchronize()
        gc.collect()
        graph = cuda.CUDAGraph()
        gc.disable()  # the destructors of other CUDA objects must not run during a capture
        try:
            with cuda.graph(graph, pool=self._pool):
                self._calls(provider)()
        finally:
            gc.enable()
        return graph.replay

    def _seconds(self, provider: Provider, work: Callable[[], None]) -> float:
        """Device seconds per call.

        The inputs leave the cache before the clock starts; `work` uses each set once, so that holds for small inputs
        too. The cache is filled by reading, since lines that were written would be written back during the measurement.
        All of it is queued while the device is kept busy: the launch of the graph is not in the time.
        """
        restore(provider, self._sets, self._pristine)
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        cuda.synchronize()
        cuda._sleep(_HEAD_START)
        torch.sum(self._scrub, dim=0, out=self._scrubbed)
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / len(self._sets)
