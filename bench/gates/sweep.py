"""Compiles everything that has a gate, on all cores, and sums it up: one row per gate, compiler and architecture."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, NamedTuple

from bench.gates import cuda_kernels, fingerprint, ops, triton_kernels
from bench.gates.gate import ARCHITECTURES, Gate, Measured, largest_block, resident_warps, violations

Row = dict[str, Any]


class Result(NamedTuple):
    """One compiled kernel. `name` says which specialisation it is."""

    op: str
    gate: Gate
    compiler: str
    architecture: int
    name: str
    measured: Measured


class MissingGate(RuntimeError):
    """A kernel was compiled that no gate knows."""


def cuda_results(chosen: Collection[str], architectures: Sequence[int], jobs: int) -> list[Result]:
    """Every kernel in every .cu file of these ops."""
    tasks: list[tuple[str, int, Future[dict[str, Measured]]]] = []
    with ThreadPoolExecutor(jobs) as pool:  # the work is in processes of their own
        for source in cuda_kernels.sources():
            for architecture, name in cuda_kernels.architecture_names(source).items():
                if cuda_kernels.op_of(source) in chosen and architecture in architectures:
                    future = pool.submit(cuda_kernels.compile_source, source, name)
                    tasks.append((cuda_kernels.op_of(source), architecture, future))
    results = []
    for op, architecture, future in tasks:
        for name, measured in future.result().items():
            gate = cuda_gate(op, name.split()[0])
            results.append(Result(op, gate, cuda_kernels.compiler(), architecture, name, measured))
    return results


def cuda_gate(op: str, kernel: str) -> Gate:
    """The gate of a CUDA C++ kernel."""
    gates: tuple[Gate, ...] = getattr(ops.modules().get(op), "CUDA", ())
    for gate in gates:
        if gate.kernel == kernel:
            return gate
    raise MissingGate(f"the kernel {kernel} of csrc/{op} has no gate in bench/gates/ops/{op}.py")


@functools.cache
def launches_for(op: str, quick: bool, architecture: int) -> list[triton_kernels.Launch]:
    """What the launchers of an op launch on an architecture; the same list in every process."""
    kernels = ops.modules()[op].TRITON
    launched = triton_kernels.record(lambda: kernels.launch(quick), architecture)
    return [launch for launch in launched if launch.specialisation.kernel in kernels.kernels(architecture)]


def triton_launches(op: str, quick: bool) -> list[triton_kernels.Launch]:
    """What they launch on any architecture, each specialisation once."""
    architectures = ops.modules()[op].TRITON.architectures()
    found = [launch for architecture in architectures for launch in launches_for(op, quick, architecture)]
    return list({launch.specialisation: launch for launch in found}.values())


def _compile(op: str, quick: bool, index: int, architecture: int) -> Measured:
    return triton_kernels.compile_launch(launches_for(op, quick, architecture)[index], architecture)


def in_sample(code: str, architecture: int, specialisation: str, sample: int) -> bool:
    """Whether a kernel is one of a `sample`-th of all, which are others whenever the fingerprint `code` changes."""
    words = f"{code} {architecture} {specialisation}"
    return int(hashlib.sha256(words.encode()).hexdigest(), 16) % sample == 0


def triton_results(
    chosen: Collection[str], architectures: Sequence[int], jobs: int, quick: bool, sample: int = 1
) -> list[Result]:
    """Every specialisation of the Triton kernels of these ops, or a `sample`-th of them, for every architecture, and
    for those that some kernels begin with if no choice was made."""
    compiler = triton_kernels.compiler()
    keys = []
    for op, module in ops.modules().items():
        if op in chosen and hasattr(module, "TRITON"):
            wanted = module.TRITON.architectures() if set(architectures) == set(ARCHITECTURES) else architectures
            code = fingerprint.of(op, compiler)
            keys += [
                (op, quick, i, a)
                for a in wanted
                for i, launch in enumerate(launches_for(op, quick, a))
                if sample == 1 or in_sample(code, a, launch.specialisation.text(), sample)
            ]
    results = []
    for (op, _, index, architecture), measured in zip(keys, _map(_compile, keys, jobs), strict=True):
        specialisation = launches_for(op, quick, architecture)[index].specialisation
        gate = ops.modules()[op].TRITON.gate(specialisation)
        results.append(Result(op, gate, compiler, architecture, specialisation.text(), measured))
    return results


def _map(function: Callable[..., Measured], keys: Sequence[tuple[Any, ...]], jobs: int) -> list[Measured]:
    """The function of every key, in processes; says now and then how far it is."""
    if jobs == 1 or len(keys) < 2:
        return [function(*key) for key in keys]
    found: list[Measured] = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for measured in pool.map(function, *zip(*keys, strict=True), chunksize=4):
            found.append(measured)
            if len(found) % 100 == 0:
                print(f"{triton_kernels.compiler()}: {len(found)} of {len(keys)}", file=sys.stderr, flush=True)
    return found


def rows(results: Iterable[Result]) -> list[Row]:
    """One row per gate, compiler and architecture: the worst of its specialisations."""
    groups: dict[tuple[str, str, str, str, int], list[Result]] = {}
    for result in results:
        key = (result.op, result.gate.kernel, result.gate.variant, result.compiler, result.architecture)
        groups.setdefault(key, []).append(result)
    return [_row(*key, group) for key, group in groups.items()]


def _row(op: str, kernel: str, variant: str, compiler: str, architecture: int, group: list[Result]) -> Row:
    failures = [f"{r.name}: {v}" for r in group for v in violations(r.gate, r.measured, architecture)]
    row: Row = {"op": op, "kernel": kernel, "variant": variant, "compiler": compiler, "arch": architecture}
    row["specialisations"] = len(group)
    for name in ("registers", "spills", "stack", "shared"):
        row[name] = max(getattr(r.measured, name) for r in group)
    row["register_limit"] = max(r.gate.register_limit(architecture) for r in group)
    row["shared_limit"] = max(min(r.gate.shared, largest_block(architecture)) for r in group)
    row["instructions"] = _instructions(group)
    row["warps"] = min(
        resident_warps(r.measured.registers, r.measured.shared, r.gate.threads, architecture) for r in group
    )
    row["failures"] = failures
    return row


def _instructions(group: list[Result]) -> dict[str, list[int]]:
    """Fewest and most of each instruction that a gate counts, where it counts it."""
    found: dict[str, list[int]] = {}
    for result in group:
        for rule in result.gate.instructions:
            found.setdefault(rule.label, []).append(rule.count(result.measured.opcodes))
    return {label: [min(counts), max(counts)] for label, counts in found.items()}


def run(chosen: Collection[str], architectures: Sequence[int] = ARCHITECTURES, jobs: int = 1, quick: bool = False,
        compilers: Sequence[str] = ("nvcc", "triton"), sample: int = 1) -> list[Row]:  # fmt: skip
    """Rows of these ops, for the compilers that are asked for."""
    results = []
    if "nvcc" in compilers:
        results += cuda_results(chosen, architectures, jobs)
    if "triton" in compilers:
        results += triton_results(chosen, architectures, jobs, quick, sample)
    return rows(results)
