"""The GPU's clock against a fake of torch.cuda that writes down what is asked of it, in order."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from bench import clock, cuda_clock, memory
from bench.case import Case, Inputs, Provider
from bench.cuda_clock import CudaClock
from bench.measure import Effort, measure


@dataclass
class FakeCuda:
    """Streams are names; a graph is the list of calls that were made while it was captured."""

    log: list[str] = field(default_factory=list)
    stream_now: str = "main"
    captured: list[str] | None = None
    broken: str = ""  # why captures break off
    pools: int = 0

    def write(self, event: str) -> None:
        (self.log if self.captured is None else self.captured).append(event)

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    def current_stream(self) -> Any:
        return FakeStream(self, self.stream_now)

    def set_stream(self, stream: FakeStream) -> None:
        self.stream_now = stream.name

    def Stream(self) -> FakeStream:
        return FakeStream(self, "side")

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.stream_now = self.stream_now, stream.name
        yield
        self.stream_now = before

    def synchronize(self) -> None:
        self.write("synchronize")

    def _sleep(self, cycles: int) -> None:
        self.write("sleep")

    def CUDAGraph(self) -> FakeGraph:
        return FakeGraph(self)

    @contextmanager
    def graph(self, graph: FakeGraph, pool: int) -> Iterator[None]:
        self.write(f"capture in pool {pool}")
        assert not gc.isenabled()
        self.stream_now, self.captured = "capture", graph.calls
        try:
            yield
            if self.broken:
                raise RuntimeError(self.broken)
        finally:
            self.captured = None  # an error leaves the stream current, as torch.cuda.graph does
        self.stream_now = "main"

    def Event(self, enable_timing: bool) -> FakeEvent:
        return FakeEvent(self)


@dataclass
class FakeStream:
    cuda: FakeCuda
    name: str

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.write(f"{self.name} waits for {other.name}")


@dataclass
class FakeGraph:
    cuda: FakeCuda
    calls: list[str] = field(default_factory=list)

    def replay(self) -> None:
        for call in self.calls:
            self.cuda.write(f"replay {call}")


@dataclass
class FakeEvent:
    cuda: FakeCuda
    at: int = 0

    def record(self) -> None:
        self.cuda.write("event")
        self.at = len(self.cuda.log)

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        """Milliseconds: six for each entry between the events."""
        return 6.0 * (end.at - self.at - 1)


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(cuda_clock, "cuda", fake)
    monkeypatch.setattr(cuda_clock, "cache_bytes", lambda device: 1024)
    real = torch.sum

    def scrub(*arguments: Any, **options: Any) -> torch.Tensor:
        fake.write("scrub")
        return real(*arguments, **options)

    monkeypatch.setattr(cuda_clock.torch, "sum", scrub)
    return fake


def sets() -> list[Inputs]:
    return [{"x": torch.full((2,), float(index))} for index in range(3)]


def pristine() -> Inputs:
    return {"x": torch.full((2,), 9.0)}


def _nothing(inputs: Inputs) -> None:
    pass


def provider(cuda: FakeCuda, overwrites: tuple[str, ...] = (), work: Callable[[Inputs], None] = _nothing) -> Provider:
    def run(inputs: Inputs) -> list[torch.Tensor]:
        work(inputs)
        cuda.write(f"{cuda.stream_now}: {inputs['x'][0]:g}")
        return [torch.zeros(1)]

    return Provider("p", run, "peer", overwrites=overwrites)


def test_the_fake_invents_nothing() -> None:
    asked = {name for name in vars(FakeCuda) if not name.startswith("__")} - {"write"}
    asked -= set(FakeCuda.__dataclass_fields__)
    assert {"CUDAGraph", "Event", "_sleep", "graph_pool_handle"} < asked
    assert [name for name in asked if not hasattr(torch.cuda, name)] == []


def test_one_call_a_set_is_captured_after_the_warm_up(cuda: FakeCuda) -> None:
    runner = CudaClock(sets(), pristine()).runner(provider(cuda))
    assert (runner.clock, runner.note) == ("CUDA graph", "")
    warm_up = ["side waits for main", "side: 0", "side: 0", "side: 0", "main waits for side", "synchronize"]
    replay = [f"replay capture: {index}" for index in range(3)]
    rounds = ["synchronize", "sleep", "scrub", "event", *replay, "event"]
    assert cuda.log == [*warm_up, "capture in pool 1", *rounds]
    assert gc.isenabled()


def test_a_round_times_the_replay_alone_and_returns_seconds_a_call(cuda: FakeCuda) -> None:
    runner = CudaClock(sets(), pristine()).runner(provider(cuda))
    cuda.log.clear()
    assert runner.round() == pytest.approx(6e-3)  # three calls of six milliseconds, three sets
    assert cuda.log[:3] == ["synchronize", "sleep", "scrub"]


def test_the_scrub_reads_twice_the_cache(cuda: FakeCuda) -> None:
    scrub = CudaClock(sets(), pristine())._scrub
    assert scrub.numel() * scrub.element_size() == 2 * 1024


def test_overwritten_inputs_are_restored_before_the_capture_and_before_every_round(cuda: FakeCuda) -> None:
    seen = []

    def overwrite(inputs: Inputs) -> None:
        seen.append(inputs["x"][0].item())
        inputs["x"].fill_(-1.0)

    all_sets = sets()
    runner = CudaClock(all_sets, pristine()).runner(provider(cuda, overwrites=("x",), work=overwrite))
    assert seen == [0.0, -1.0, -1.0, 9.0, 9.0, 9.0]  # three warm-ups on the first set, then the capture
    for inputs in all_sets:
        inputs["x"].fill_(-1.0)
    runner.round()
    assert [inputs["x"].tolist() for inputs in all_sets] == [[9.0, 9.0]] * 3


def test_providers_of_a_case_share_one_memory_pool(cuda: FakeCuda) -> None:
    device_clock = CudaClock(sets(), pristine())
    device_clock.runner(provider(cuda))
    device_clock.runner(provider(cuda))
    assert [entry for entry in cuda.log if "pool" in entry] == ["capture in pool 1"] * 2


def test_what_cannot_be_captured_is_timed_with_events_and_the_row_says_so(cuda: FakeCuda) -> None:
    device_clock = CudaClock(sets(), pristine())
    cuda.broken = "operation not permitted\nwhen stream is capturing"
    runner = device_clock.runner(provider(cuda))
    assert runner.clock == "CUDA events"
    assert "operation not permitted when stream is capturing" in runner.note
    cuda.log.clear()
    assert runner.round() == pytest.approx(6e-3)
    assert cuda.log == ["synchronize", "sleep", "scrub", "event", "main: 0", "main: 1", "main: 2", "event"]
    cuda.broken = ""
    cuda.log.clear()
    device_clock.runner(provider(cuda))
    assert "capture in pool 2" in cuda.log  # the first pool may still be in use by what broke off
    assert gc.isenabled()


def test_what_finds_something_kept_is_not_captured(cuda: FakeCuda) -> None:
    plain = provider(cuda)
    runner = CudaClock(sets(), pristine()).runner(Provider("p", plain.run, "ours", capturable=False))
    assert runner.clock == "CUDA events"
    assert "would do other work" in runner.note
    calls = ["main: 0", "main: 1", "main: 2"]
    assert cuda.log == ["synchronize", "sleep", "scrub", "event", *calls, "event"]


def test_a_provider_that_cannot_run_at_all_raises(cuda: FakeCuda) -> None:
    def fail(inputs: Inputs) -> None:
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        CudaClock(sets(), pristine()).runner(provider(cuda, work=fail))
    assert cuda.stream_now == "main"


# --- what a run does with it ------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_gpu(cuda: FakeCuda, monkeypatch) -> FakeCuda:
    """A run that takes the CPU for a GPU with 64 KiB to spare; each call of a provider is one byte of peak memory."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(clock, "cache_bytes", lambda device: 64)
    monkeypatch.setattr(clock, "free_bytes", lambda device: 65536)
    monkeypatch.setattr(memory, "peak_cuda", lambda case, provider, inputs: len(provider.run(inputs)))
    return cuda


def _case(ours: Provider, **fields: Any) -> Case:
    def make(device: str, size: str) -> Inputs:
        return {"x": torch.ones(4)}

    eager = Provider("eager", lambda inputs: (inputs["x"] + 1,), "eager")
    return Case("group_advantages", "4", make, (ours, eager), bytes_moved=32, **fields)


_EFFORT = Effort(seconds=0.01, minimum_rounds=2, maximum_rounds=2)


def test_cases_are_timed_by_graphs_and_their_memory_is_measured_on_the_way(on_a_gpu: FakeCuda) -> None:
    def in_place(inputs: Inputs) -> list[torch.Tensor]:
        return [inputs["x"].add_(1)]

    record = measure(_case(Provider("ours", in_place, "ours", overwrites=("x",)), memory=16), "cuda", _EFFORT)
    assert "error" not in record
    for row in record["rows"].values():
        assert (row["clock"], row["extra_bytes"], len(row["seconds"])) == ("CUDA graph", 1, 2)
        assert "accuracy" not in row
    assert on_a_gpu.log.count("capture in pool 1") == 2


def test_host_costs_stay_on_the_wall_clock(on_a_gpu: FakeCuda) -> None:
    ours = Provider("ours", lambda inputs: (inputs["x"] + 1,), "ours")
    record = measure(_case(ours, clock="host"), "cuda", _EFFORT)
    assert {row["clock"] for row in record["rows"].values()} == {"wall clock"}
    assert on_a_gpu.log == []


def test_a_provider_that_runs_out_of_memory_later_is_reported_alone(on_a_gpu: FakeCuda) -> None:
    calls = []

    def run_out(inputs: Inputs) -> list[torch.Tensor]:
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("no memory")
        return [inputs["x"] + 1]

    rows = measure(_case(Provider("ours", run_out, "ours"), memory=16), "cuda", _EFFORT)["rows"]
    assert rows["ours"]["error"] == "OutOfMemoryError: no memory"
    assert "seconds" not in rows["ours"]
    assert len(rows["eager"]["seconds"]) == 2
