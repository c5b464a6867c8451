"""The floors of the GPU kernels: that each kernel has one, that formulas hold, and how machine code is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import (
    bench_fp8_quantize,
    bench_grouped_gemm,
    bench_linear_log_probs,
    bench_moe_permute,
    bench_multi_token_prediction,
    bench_speculative_sampling,
    bench_token_log_probs,
)
from bench.case import Case
from bench.floors import estimate, machine, page, pipes, reading, record, sass
from bench.floors.floor import Floor, Part, value
from bench.gates import ops, triton_kernels

FLOORS = [(op, floor) for op, floors in record.floors().items() for floor in floors]
NAMES = [f"{op}: {floor.kernel}, {floor.form}" for op, floor in FLOORS]


def _floor(op: str, kernel: str, form: str = "") -> Floor:
    return next(floor for name, floor in FLOORS if (name, floor.kernel) == (op, kernel) and floor.form.startswith(form))


# --- the data --------------------------------------------------------------------------------------------------------


def test_every_kernel_has_a_floor() -> None:
    gated = {(op, gate.kernel) for op, module in ops.modules().items() for gate in getattr(module, "CUDA", ())}
    gated |= {(op, name) for op, m in ops.modules().items() if hasattr(m, "TRITON") for name in m.TRITON.constants}
    never_launched = {("common", "probe_kernel")}
    assert {(op, floor.kernel) for op, floor in FLOORS} == gated - never_launched
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize(("op", "floor"), FLOORS, ids=NAMES)
def test_formulas_hold_at_other_shapes(op: str, floor: Floor) -> None:
    larger = {name: 2 * number for name, number in floor.shape.items()}
    assert 0 < floor.bytes_moved() < floor.bytes_moved(larger)
    assert floor.operations_done() < floor.operations_done(larger) or floor.operations == "0"
    for part in floor.parts:
        assert value(part.passes, {**floor.shape, "m": 1}) > 0
    assert value(floor.programs, floor.shape) >= 1


@pytest.fixture(scope="module")
def readings() -> dict[tuple[str, str, str], Any]:
    return record.current(record.load())


@pytest.mark.parametrize(("op", "floor"), FLOORS, ids=NAMES)
def test_readings_are_of_these_sources(op: str, floor: Floor, readings: dict[tuple[str, str, str], Any]) -> None:
    row = readings.get((op, floor.kernel, floor.form))
    assert row is not None, "stale: run python -m bench.floors"
    assert row["spills"] == 0
    found = estimate.estimate(floor, row)
    if found.floor >= page.SHORT and found.ratio > estimate.SLACK:
        assert floor.finding, f"{found.bound} takes {found.ratio:.2f} times the floor: say why, and what would help"


def test_the_record_has_nothing_else() -> None:
    assert {(row["op"], row["kernel"], row["form"]) for row in record.load()} == {
        (op, floor.kernel, floor.form) for op, floor in FLOORS
    }


def test_a_changed_source_or_another_part_makes_a_reading_stale() -> None:
    op, floor = FLOORS[0]
    row = next(
        row for row in record.load() if (row["op"], row["kernel"], row["form"]) == (op, floor.kernel, floor.form)
    )
    assert list(record.current([row]).values()) == [row]
    assert not record.current([{**row, "sources": "older"}])
    assert not record.current([{**row, "selection": "another loop"}])
    assert not record.current([{**row, "form": "gone"}])


# --- beside the benchmarks -------------------------------------------------------------------------------------------


def _case(cases: list[Case], *words: str) -> Case:
    return next(case for case in cases if all(word in case.name for word in words))


def _assert_bytes(case: Case, *kernels: tuple[Floor, dict[str, float]]) -> None:
    """The benchmark leaves out what a row has once."""
    assert case.bytes_moved == pytest.approx(sum(floor.bytes_moved(shape) for floor, shape in kernels), rel=0.01)


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_bytes_of_token_log_probs(dtype: str, size: int) -> None:
    shape = {"N": 2048, "V": 32000, "b": size, "S": 8192 // size}
    kernels = [(_floor("token_log_probs", kernel, dtype), shape) for kernel in ("forward_kernel", "backward_kernel")]
    _assert_bytes(bench_token_log_probs.case("cpu", (8, 256, 32000), getattr(torch, dtype), True), *kernels)


def test_operations_of_linear_log_probs() -> None:
    case = _case(bench_linear_log_probs.cases("cpu"), "1024x1024x32000", "float32")
    shape = {"N": 1024, "H": 1024, "V": 32000, "S": 125}
    logits = _floor("linear_log_probs", "forward_kernel").operations_done(shape)
    assert _floor("linear_log_probs", "dlogits_kernel").operations_done(shape) == logits
    assert case.operations == 3 * logits  # once, and two products for the gradients


def test_operations_of_grouped_gemm() -> None:
    cases = [case for case in bench_grouped_gemm.cases("cpu") if case.op == "grouped_gemm"]
    for case in cases:
        rows, width, columns = (int(size) for size in case.name.split("E=")[1].split()[1].split("x"))
        shape = {"R": rows, "K": width, "N": columns, "E": 8}
        products = 3 if "bwd" in case.name else 1
        assert case.operations == products * _floor("grouped_gemm", "grouped_kernel").operations_done(shape)
    assert len(cases) > 2


@pytest.mark.parametrize(("form", "both"), [("1x128", False), ("1x128 and the transpose", True)])
def test_bytes_of_fp8_quantize(form: str, both: bool) -> None:
    floor = _floor("fp8_quantize", "quantize_tiles_kernel" if both else "quantize_rows_kernel", form)
    for rows, width in ((4096, 2048), (1000, 3000)):
        assert bench_fp8_quantize._bytes((rows, width), 2, False, both) == floor.bytes_moved({"M": rows, "K": width})


@pytest.mark.parametrize(("op", "kernel"), [("moe_permute", "permute_kernel"), ("moe_unpermute", "unpermute_kernel")])
def test_bytes_of_moe_permute(op: str, kernel: str) -> None:
    cases = [case for case in bench_moe_permute.cases("cpu") if case.op == op and case.name.endswith("bfloat16 fwd")]
    for case in cases:
        numbers = dict(word.split("=") for word in case.name.split() if "=" in word)
        shape = {name: int(numbers[name]) for name in "THK"}
        _assert_bytes(case, (_floor("moe_permute", kernel), shape))
    assert cases


def test_bytes_of_the_targets() -> None:
    (case,) = (case for case in bench_multi_token_prediction.cases("cpu") if case.bytes_moved)
    _assert_bytes(case, (_floor("multi_token_prediction", "targets_kernel"), {"T": 65536, "D": 3}))


def test_bytes_of_speculative_sampling() -> None:
    counted = bench_speculative_sampling._bytes(bench_speculative_sampling.Problem(8, 3, 129280, torch.bfloat16))
    shape = {"B": 8, "D": 3, "V": 129280, "S": 16, "Q": 256}
    kernels = [_floor("speculative_sampling", kernel) for kernel in ("statistics_kernel", "race_kernel")]
    assert counted == pytest.approx(sum(floor.bytes_moved(shape) for floor in kernels), rel=0.01)


# --- the machine code ------------------------------------------------------------------------------------------------

CODE = """
        /*0000*/                   MOV R0, c[0x0][0x210] ;
.L_x_0:
        /*0010*/              @!P1 LDG.E.128 R8, desc[UR14][R12.64] ;
        /*0020*/                   FMUL R4, R4, R5 ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/              @!P1 BRA `(.L_x_1) ;
        /*0050*/                   LDG.E.128 R8, desc[UR14][R12.64] ;
        /*0060*/                   FMNMX R9, R9, R10, !PT ;
.L_x_1:
        /*0070*/                   FADD R4, R8, R4 ;
        /*0080*/               @P0 BRA `(.L_x_0) ;
        /*0090*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
"""


def test_loops_and_the_way_through_them() -> None:
    blocks = sass.blocks_of(CODE)
    loop = sass.main_loop(blocks, r"LDG\.E\.128")
    path, markers = sass.path(blocks, r"LDG\.E\.128", loop, most=1)
    assert [i.opcode for i in path] == ["LDG.E.128", "FMUL", "MUFU.EX2", "BRA", "FADD", "BRA"]
    assert len(markers) == 1
    path, markers = sass.path(blocks, r"LDG\.E\.128", loop)
    assert (len(path), len(markers)) == (8, 2)
    path, _ = sass.path(blocks, r"STG\..*")
    assert [path[0].opcode, path[-1].opcode, len(path)] == ["MOV", "EXIT", 9]
    path, _ = sass.path(blocks, r"STG\..*", without=loop.blocks)
    assert [i.opcode for i in path] == ["MOV", "STG.E.U16", "EXIT"]
    with pytest.raises(ValueError, match="no loop has an instruction HGMMA"):
        sass.main_loop(blocks, r"HGMMA\..*")


def test_a_table_of_branches_has_all_its_targets() -> None:
    code = """
        /*0000*/                   BRX R90 -0x10 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*);
.L_x_1:
        /*0010*/                   FADD R0, R0, R0 ;
.L_x_2:
        /*0020*/                   EXIT ;
"""
    assert sorted(sass.blocks_of(code)[0].next) == [1, 2]


def test_loops_in_loops() -> None:
    code = """
.L_x_0:
        /*0000*/                   MUFU.EX2 R1, R1 ;
.L_x_1:
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
"""
    blocks = sass.blocks_of(code)
    inner = sass.main_loop(blocks, r"HGMMA\..*")
    outer = sass.main_loop(blocks, r"HGMMA\..*", level=1)
    assert inner.blocks < outer.blocks == sass.main_loop(blocks, r"MUFU\.EX2").blocks
    part = reading.read_part(Part(r"MUFU\.EX2", "1", without=r"HGMMA\..*"), blocks)
    assert part["work"] == {"issue": 2, "XU": 1}
    assert reading.read_part(Part(r"HGMMA\..*", "1"), blocks)["products"] == 2 * 64 * 256 * 16


@pytest.mark.parametrize(
    ("opcode", "unit"),
    [
        ("FFMA.FTZ", ("FMA", 1)), ("IMAD.WIDE.U32", ("FMA", 2)), ("MUFU.EX2", ("XU", 1)), ("FMNMX.NAN", ("ALU", 1)),
        ("F2FP.BF16.F32.PACK_AB", ("ALU", 1)), ("F2F.F64.F32", ("XU", 1)), ("DADD", ("FP64", 1)), ("BRA", ("", 0)),
        ("LDG.E.128", ("LSU", 4)), ("STG.E.64", ("LSU", 2)), ("LDS.U8", ("LSU", 1)), ("SHFL.BFLY", ("LSU", 1)),
    ],
)  # fmt: skip
def test_units(opcode: str, unit: tuple[str, float]) -> None:
    assert pipes.unit_of(opcode) == unit


@pytest.mark.parametrize(
    ("opcode", "width"),
    [
        ("LDG.E.128", ("load", 16)), ("LDG.E.U16", ("load", 2)), ("LDG.E", ("load", 4)), ("STG.E.64", ("store", 8)),
        ("LDG.E.U8.CONSTANT", ("load", 1)), ("LDS.128", None), ("FADD", None),
    ],
)  # fmt: skip
def test_widths(opcode: str, width: tuple[str, int] | None) -> None:
    assert reading.width_of(opcode) == width


def _path(*lines: str) -> list[sass.Instruction]:
    blocks = sass.blocks_of("\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines)))
    return [instruction for block in blocks for instruction in block.instructions]


def test_bytes_in_flight() -> None:
    first, second = "LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.64 R8, desc[UR4][R2.64]"
    assert reading.bytes_in_flight(_path(first, second, "FADD R0, R5, R9"), again=False) == 24
    assert reading.bytes_in_flight(_path(first, "FADD R0, R5, R1", second, "FADD R0, R9, R1"), again=False) == 16
    assert reading.bytes_in_flight(_path(first, "STG.E.128 desc[UR4][R2.64], R4", second), again=False) == 16
    # Asked for in one turn, and used in the next one after the next request.
    ahead = _path(second, "FADD R0, R4, R1", first)
    assert reading.bytes_in_flight(ahead, again=False) == reading.bytes_in_flight(ahead, again=True) == 24


# --- the estimate ----------------------------------------------------------------------------------------------------


def _reading(**changes: Any) -> dict[str, Any]:
    part = {"work": {"issue": 80, "XU": 8, "FMA": 40}, "markers": 1, "in_flight": 16}
    return {"threads": 256, "warps": 32, "tma": False, "parts": [part], **changes}


def _made(**changes: Any) -> Floor:
    given: dict[str, Any] = {
        "kernel": "k", "form": "", "shape": {"N": 1 << 30}, "read": "2*N", "written": "2*N", "operations": "N",
        "unit": "fp32", "programs": "N/2048", "rounds": 1, "parts": (Part("LDG", "N/256/m"),), **changes,
    }  # fmt: skip
    return Floor(**given)


def test_times() -> None:
    clocks = 132 * 1.7e9
    found = estimate.estimate(_made(), _reading())
    assert found.floor == found.times[estimate.MEMORY] == 4 * 2**30 / 3.0e12
    assert found.times[estimate.ISSUE] == pytest.approx(2**22 * 80 / (4 * clocks))
    assert found.times["MUFU"] == pytest.approx(2**22 * 8 * 32 / (16 * clocks))
    assert found.times["FMA"] == pytest.approx(2**22 * 40 / (4 * clocks))
    assert found.times[estimate.LOADS] == pytest.approx(2 * 2**30 * machine.LATENCY / (16 * 32 * 32 * 132))
    assert found.bound == estimate.MEMORY
    assert found.ratio == 1.0
    assert page.verdict(found) == "1.00"


def test_what_is_exposed_adds_to_the_products() -> None:
    parts = (Part("HGMMA", "N/256/m"), Part("STG", "N/1024/m", exposed=True))
    floor = _made(parts=parts, operations="4096*N", unit="bf16")
    row = _reading(parts=2 * _reading()["parts"], tma=True)
    found = estimate.estimate(floor, row)
    assert found.floor == 4096 * 2**30 / 800e12
    assert found.bound == "tensor cores"
    assert found.exposed == pytest.approx(max(found.times[estimate.ISSUE], found.times["MUFU"]) / 4)
    assert estimate.LOADS not in found.times


def test_few_programs_leave_multiprocessors_idle() -> None:
    found = estimate.estimate(_made(programs="33"), _reading())
    assert found.times[estimate.ISSUE] == pytest.approx(4 * 2**22 * 80 / (4 * 132 * 1.7e9))
    assert page.verdict(found).endswith("**over**")


def test_a_short_kernel_has_no_ratio() -> None:
    found = estimate.estimate(_made(shape={"N": 4096}, rounds=3), _reading())
    assert found.bound == estimate.CHAIN
    assert page.verdict(found) == "-"


def test_formulas_know_the_names_of_the_shape_alone() -> None:
    assert value("ceil(N/3) + min(N, 2)", {"N": 7}) == 5
    with pytest.raises(NameError):
        value("N*M", {"N": 7})


@pytest.mark.skipif(bool(triton_kernels.problem()), reason=f"Triton: {triton_kernels.problem()}")
def test_the_command_reads_what_is_on_record() -> None:
    op, kernel = "multi_token_prediction", "targets_kernel"
    row = reading.read_triton(op, _floor(op, kernel))
    assert row["parts"][0]["markers"] >= 1
    kept = next(kept for kept in record.load() if (kept["op"], kept["kernel"]) == (op, kernel))
    if kept["compiler"] == row["compiler"]:
        assert row == kept
