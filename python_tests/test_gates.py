"""The gates of every compiled kernel: that each kernel has one, that it holds, and that it can fail."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from bench.gates import binary, cuda_kernels, ops, report, sweep, triton_kernels
from bench.gates.gate import NO_BARRIER, NO_FLOAT_ATOMICS, WIDE_LOADS, WIDE_STORES, Gate, Measured, violations
from python_tests import gated_kernels

ROOT = Path(__file__).parents[1]
TRITON_OPS = {op: module.TRITON for op, module in ops.modules().items() if hasattr(module, "TRITON")}

needs_triton = pytest.mark.skipif(bool(triton_kernels.problem()), reason=f"Triton: {triton_kernels.problem()}")
needs_nvcc = pytest.mark.skipif(bool(cuda_kernels.problem()), reason=f"nvcc: {cuda_kernels.problem()}")


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{report.kernel_name(row)} sm_{row['arch']}: {text}" for row in rows for text in row["failures"]]


# --- no kernel without a gate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", cuda_kernels.sources(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_cuda_kernel_has_a_gate(source: Path) -> None:
    gates = {gate.kernel for gate in ops.modules()[cuda_kernels.op_of(source)].CUDA}
    declared = [cuda_kernels.declared_kernels(path.read_text()) for path in source.parent.glob("*.cu")]
    assert set().union(*declared) == gates


def test_kernels_are_found_in_a_source() -> None:
    text = """
    __global__ void plain(const Args a) {}
    // __global__ void in_a_comment();
    template <typename T, int N> __global__ void __launch_bounds__(kWarps * (kWarp + 1)) with_bounds(T* x) {}
    extern "C" __global__ __launch_bounds__(128, 2) void c_linkage(int x);
    """
    assert cuda_kernels.declared_kernels(text) == {"plain", "with_bounds", "c_linkage"}


def test_a_kernel_without_a_gate_is_an_error() -> None:
    with pytest.raises(sweep.MissingGate, match="new_kernel of csrc/grpo_loss has no gate"):
        sweep.cuda_gate("grpo_loss", "new_kernel")


def test_every_triton_kernel_has_a_gate() -> None:
    for folder in {path.parent for path in (ROOT / "grpo_kernels").rglob("*.py")}:
        declared = triton_kernels.declared_kernels(folder) if folder.name != "grpo_kernels" else set()
        assert declared == set(TRITON_OPS[folder.name].constants if folder.name in TRITON_OPS else ()), folder


@needs_triton
@pytest.mark.parametrize("op", TRITON_OPS)
def test_launchers_give_every_constant_each_of_its_values(op: str) -> None:
    """A constant that is new, or a value that no recorded launch has, is code that no gate sees."""
    kernels = TRITON_OPS[op]
    launches = sweep.triton_launches(op, False)
    assert {launch.specialisation.kernel for launch in launches} == kernels.constants.keys()
    for kernel, constants in kernels.constants.items():
        mine = [launch for launch in launches if launch.specialisation.kernel == kernel]
        assert {param.name for param in mine[0].function.params if param.is_constexpr} == constants.keys()
        for name, values in constants.items():
            assert {launch.specialisation.constant(name) for launch in mine} == values, (kernel, name)


@needs_triton
def test_log_prob_kernels_are_compiled_in_every_combination() -> None:
    shape = {"SLOTS", "WIDTH", "NEIGHBOURS", "BLOCKS"}
    for kernel, constants in TRITON_OPS["token_log_probs"].constants.items():
        of = [
            s.specialisation
            for s in sweep.triton_launches("token_log_probs", False)
            if s.specialisation.kernel == kernel
        ]
        flags = {name: sorted(values) for name, values in constants.items() if name not in shape}
        wanted = set(itertools.product(*flags.values()))
        assert {tuple(s.constant(name) for name in flags) for s in of if s.constant("NEIGHBOURS")} == wanted
        full = {values for values in wanted if (values[0], values[1]) == (True, 2)}  # with a mask, a temperature a row
        assert {tuple(s.constant(name) for name in flags) for s in of if not s.constant("NEIGHBOURS")} >= full
        types = {
            name: {kind for s in of for n, kind, _ in s.arguments if n == name} for name in ("logits", "token_ids")
        }
        assert types == {"logits": {"*bf16", "*fp16", "*fp32"}, "token_ids": {"*i32", "*i64"}}
        strides = {kind for s in of for n, kind, _ in s.arguments if n == "outer_stride"}
        assert strides == {"i32", "i64"}
        for dtype in types["logits"]:
            rows = [s.aligned("inner_stride") for s in of if s.arguments[0][1] == dtype]
            assert set(rows) == {False, True}


# --- the gates hold --------------------------------------------------------------------------------------------------


@needs_nvcc
def test_cuda_kernels_keep_their_limits() -> None:
    rows = sweep.run(ops.modules(), (90,), compilers=["nvcc"])
    assert {row["kernel"] for row in rows} == {
        gate.kernel for m in ops.modules().values() for gate in getattr(m, "CUDA", ())
    }
    assert _names(rows) == []


@needs_triton
@pytest.mark.parametrize("architecture", [80, 89, 90, 100])
def test_triton_kernels_keep_their_limits(architecture: int) -> None:
    chosen = {op: kernels for op, kernels in TRITON_OPS.items() if kernels.kernels(architecture)}
    rows = sweep.run(chosen, (architecture,), quick=True, compilers=["triton"])
    assert {row["kernel"] for row in rows} == set().union(*(k.kernels(architecture) for k in chosen.values()))
    assert _names(rows) == []


@needs_triton
def test_the_triton_that_was_asked_for_is_the_one_that_compiles() -> None:
    """`make test-slow` runs this file once more with the oldest supported release."""
    import triton

    assert triton.__version__ == os.environ.get("GK_EXPECTED_TRITON", triton.__version__)
    assert tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
    assert triton_kernels.compiler() == f"Triton {triton.__version__}"


@needs_triton
def test_launch_config_depends_on_the_row_alone() -> None:
    from grpo_kernels.token_log_probs._kernels_triton import launch_config

    assert launch_config(32000, 2, True) == (512, 8, True, 16, 4)
    assert launch_config(32000, 4, True) == (512, 4, True, 16, 4)
    assert launch_config(32000, 4, False) == (512, 4, False, 16, 4)
    assert launch_config(50257, 2, True) == (512, 8, False, 16, 4)
    assert launch_config(1, 2, True) == (32, 8, False, 1, 4)
    for vocab in (1, 100, 1000, 5000, 200000):
        for size in (2, 4):
            config = launch_config(vocab, size, True)
            assert config.width * size == 16
            assert config.slots & (config.slots - 1) == 0
            assert config.slots * config.width <= 4096


# --- and can fail ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> dict[str, Measured]:
    """CUDA kernels with known faults."""
    source = Path(__file__).with_name("gated_kernels.cu")
    found = cuda_kernels.compile_source(source, "90")
    squeezed = cuda_kernels.compile_source(source, "90", ("-maxrregcount=24",))
    return {**found, "spills": squeezed["many_registers"]}


@needs_nvcc
@pytest.mark.parametrize(
    ("kernel", "gate", "complaint"),
    [
        ("streams", Gate("", 40, 256, 0, (WIDE_LOADS, WIDE_STORES, NO_BARRIER)), None),
        ("counts", Gate("", 40, 256), None),
        ("streams", Gate("", 1, 256), "registers, at most 1 allowed"),
        ("many_registers", Gate("", 255, 256), None),
        ("spills", Gate("", 255, 256), "bytes of spills, at most 0 allowed"),
        ("uses_stack", Gate("", 255, 256), "bytes of stack, at most 0 allowed"),
        ("narrow", Gate("", 40, 256, 0, (WIDE_LOADS,)), "0 instructions LDG.128, at least 1 wanted"),
        ("narrow", Gate("", 40, 256, 0, (WIDE_STORES,)), "0 instructions STG.128, at least 1 wanted"),
        ("shares", Gate("", 40, 256, 32767), "32768 bytes of shared memory, at most 32767 allowed"),
        ("shares", Gate("", 40, 256, 32768), None),
        ("shares", Gate("", 40, 256, 32768, (NO_BARRIER,)), "1 instructions BAR, at most 0 allowed"),
        ("adds_floats", Gate("", 40, 256), "1 instructions float atomics, at most 0 allowed"),
        ("adds_doubles", Gate("", 40, 256), "1 instructions float atomics, at most 0 allowed"),
    ],
)
def test_a_cuda_kernel_is_judged(planted: dict[str, Measured], kernel: str, gate: Gate, complaint: str | None) -> None:
    found = violations(gate, planted[kernel], 90)
    if complaint is None:
        assert found == []
    else:
        assert [text for text in found if complaint in text], found


@needs_triton
@pytest.mark.parametrize("architecture", [80, 100])
@pytest.mark.parametrize(
    ("options", "gate", "complaints"),
    [
        ({}, Gate("", 255, 128, 0, (WIDE_LOADS, WIDE_STORES, NO_BARRIER)), []),
        ({"maxnreg": 32}, Gate("", 255, 128), ["bytes of spills", "bytes of stack"]),
        ({"SUM": True}, Gate("", 255, 128, 0, (NO_BARRIER,)), ["bytes of shared memory", "instructions BAR"]),
        ({"stride": 3}, Gate("", 255, 128, 0, (WIDE_LOADS, WIDE_STORES)), ["LDG.128", "STG.128"]),
    ],
    ids=["sound", "spills", "shares", "narrow"],
)
def test_a_triton_kernel_is_judged(
    options: dict[str, Any], gate: Gate, complaints: list[str], architecture: int
) -> None:
    (launch,) = triton_kernels.record(lambda: gated_kernels.launch(**options))
    found = violations(gate, triton_kernels.compile_launch(launch, architecture), architecture)
    assert len(found) == len(complaints), found
    for text, complaint in zip(found, complaints, strict=True):
        assert complaint in text


def test_no_kernel_may_have_more_shared_memory_than_a_block_has() -> None:
    gate = Gate("", 255, 128, shared=10**6)
    for architecture, limit in ((80, 166912), (90, 232448), (100, 232448)):
        assert violations(gate, Measured(32, 0, 0, limit, {}), architecture) == []
        (text,) = violations(gate, Measured(32, 0, 0, limit + 1, {}), architecture)
        assert f"at most {limit} allowed" in text


def test_opcodes_and_what_they_move() -> None:
    opcodes = binary.opcodes_of(
        "/*0000*/  LDC R1, c[0x0][0x37c] ;\n/*0010*/  @!P0 STL.128 [R1], R4 ;\n/*0020*/  @UP0 UIADD3 UR4, UR5, 1 ;\n"
        "/*00b0*/  @P1 LDL R2, [R1+0x8] ;\n/*00c0*/  LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;\n"
        "/*00d0*/  LDL.LU.64 R2, [R1] ;"
    )
    assert opcodes == {"LDC": 1, "STL.128": 1, "UIADD3": 1, "LDL": 1, "LDG.E.128.CONSTANT": 1, "LDL.LU.64": 1}
    assert binary.local_bytes(opcodes) == 16 + 4 + 8
    assert WIDE_LOADS.count(opcodes) == 1
    floating = ("RED.E.ADD.F32.FTZ.RN", "ATOMG.E.ADD.F64.RN.STRONG.GPU", "RED.E.ADD.BF16_V2.RN", "RED.E.ADD.F16x2.RN")
    assert NO_FLOAT_ATOMICS.count(dict.fromkeys(floating, 1)) == 4
    assert NO_FLOAT_ATOMICS.count({"REDG.E.ADD.STRONG.GPU": 1, "ATOMS.ADD": 1, "ATOMG.E.ADD.64": 1}) == 0


def test_names_of_kernels() -> None:
    scoped = (
        "_ZN12grpo_kernels8isa_cuda39_GLOBAL__N__b3d9b641_7_cuda_cu_7a5e627117group_rank_kernelENS_13GroupRankArgsE"
    )
    assert binary.function_name(scoped) == "group_rank_kernel"
    assert binary.function_name("_Z6streamPKfPf") == "stream"
    assert binary.function_name("_ZN2ab4tileILi128EEEvPf") == "tile"
    assert binary.function_name("forward_kernel") == "forward_kernel"
