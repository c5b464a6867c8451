"""The tests of the emulated kernels notice mistakes in the kernels: what they are worth."""

from __future__ import annotations

import faulthandler
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import pytest
import torch

from python_tests.emulator import build, test_group_advantages, test_grpo_loss, test_moe_permute, test_moe_router
from python_tests.emulator.checks import assert_same_in_every_order
from python_tests.emulator.mutants import Mutant, compile_mutant, with_a_trap_in_each_kernel, without_each_barrier
from python_tests.test_grpo_loss import cast, run

ADVANTAGES, LOSS, RECORDS = "group_advantages/cuda.cu", "grpo_loss/cuda.cu", "grpo_loss/cuda_records.h"
MAP, ROUTER = "moe_permute/cuda.cu", "moe_router/cuda.cu"
SLOW = pytest.mark.slow
PATIENCE = 240  # seconds

UNWRITTEN = [
    Mutant(ADVANTAGES, "store_value(a.mean, a.dtype, sample, s.mean);", ""),
    Mutant(ADVANTAGES, "store_value(a.std, a.dtype, sample, s.std);", ""),
    Mutant(ADVANTAGES, "a.scratch[sample] = 0.0;", ""),
    Mutant(ADVANTAGES, "a.scratch[sample] = centred(c, value);", ""),
    Mutant(ADVANTAGES, "if (threadIdx.x == 0) batch = s;", ""),
    Mutant(ADVANTAGES, "a.informative[sample_at(a.grouping, p)] = ", ""),
    Mutant(ADVANTAGES, "a.rank[sample] = ", ""),
    Mutant(LOSS, "segment_row_sums(a, blockIdx.x)[threadIdx.x] = total;", ""),
    Mutant(LOSS, "if (lane == j) warp_sums[warp][j] = sum;", ""),
    Mutant(LOSS, "if (threadIdx.x < kWarp) segment_record(a, blockIdx.x)[threadIdx.x] = value;", ""),
    Mutant(RECORDS, "if (threadIdx.x < kWarp) group_record(a, group)[threadIdx.x] = merged;", ""),
    Mutant(RECORDS, "if (threadIdx.x < kWarp) results[threadIdx.x] = totals;", ""),
    Mutant(LOSS, "static_cast<float*>(a.grad_log_probs)[output] = t.live ? gradient : 0.0f;", "(void)gradient;"),
    Mutant(LOSS, "static_cast<float*>(a.grad_entropy)[output] = gradient;", "(void)gradient;"),
    Mutant(LOSS, "static_cast<float*>(a.loss)[output] = t.live ? loss : 0.0f;", "(void)loss;"),
    Mutant(LOSS, "grad[i] += shared;", ";"),
    Mutant(LOSS, "atomicAdd(counters + 1, uint32_t(value));", ";"),
    Mutant(MAP, "counters[e] = 0;", ";"),
    Mutant(MAP, "a.workspace[int64_t(blockIdx.x) * experts + e] = ", ""),
    Mutant(MAP, "if (lane == kWarp - 1) sums[warp] = upto;", ""),
    Mutant(MAP, "a.offsets[e] = int32_t(start + segment);", ""),
    Mutant(MAP, "a.tokens_per_expert[e] = tokens;", ""),
    Mutant(MAP, "counters[w * experts + e] = row;", ""),
    Mutant(MAP, "a.row_id_map[slot] = ", ""),
    Mutant(MAP, "a.inv_map[row] = int32_t(slot);", ";"),
    Mutant(MAP, "a.inv_map[row] = -1;", ";"),
    Mutant(MAP, "a.inv_map[row] = -1;", ";", 1),
    Mutant(ROUTER, "p.piece_sequence[i] = int32_t(kNoPiece);", ";"),
    Mutant(ROUTER, "p.piece_sequence[i] = int32_t(kNoPiece);", ";", 1),
    Mutant(ROUTER, "p.sums[piece * experts + e] = float(total);", ""),
    Mutant(ROUTER, "p.chosen[piece * experts + e] = shared.chosen[e];", ""),
    Mutant(ROUTER, "shared.chosen[e] = 0;", ""),
    Mutant(ROUTER, "p.piece_live[piece] = total;", ""),
    Mutant(ROUTER, "shared.counts[e] = 0;", ";"),
    Mutant(ROUTER, "shared.sums[j * kWarp + lane_id()] = 0.0f;", ";"),
    Mutant(ROUTER, "if (lane_id() == 0) tallies[warp] = tally;", ""),
    Mutant(ROUTER, "p.counts[int64_t(blockIdx.x) * experts + e] = ", ""),
    Mutant(ROUTER, "p.z[blockIdx.x] = total.z;", ""),
    Mutant(ROUTER, "p.live[blockIdx.x] = total.live;", ""),
    Mutant(ROUTER, "p.mismatches[blockIdx.x] = total.mismatches;", ""),
    Mutant(ROUTER, "if (blockIdx.x == 0) *p.ticket = 0;", ""),
    Mutant(ROUTER, "chosen[s * experts + expert] = 0;", ";"),
    Mutant(ROUTER, "a.per_expert[expert] = count;", ";"),
    Mutant(ROUTER, "*a.live_tokens = live;", ""),
    Mutant(ROUTER, "columns[expert] = float(column);", ";"),
    Mutant(ROUTER, "p.slice_sums[2 * blockIdx.x + 1] = sequences;", ""),
    Mutant(ROUTER, "store_gradient(a, whole_gradient, token, rows[warp]);", ""),
]
TOO_MUCH = [Mutant(RECORDS, "k < count ? records", "k <= count ? records")]  # still inside the workspace
OUT_OF_BOUNDS = [
    Mutant(ADVANTAGES, "p < end;", "p <= end;"),
    Mutant(ADVANTAGES, "p < end;", "p <= end;", 1),
    Mutant(ADVANTAGES, "p < end;", "p <= end;", 2),
    Mutant(ADVANTAGES, "q < end;", "q <= end;"),
    Mutant(ADVANTAGES, "i < a.grouping.batch;", "i <= a.grouping.batch;"),
    Mutant(LOSS, "i < s.count; }", "i <= s.count; }"),
    Mutant(LOSS, "i < s.count; i += kThreads) {\n    const Token", "i <= s.count; i += kThreads) {\n    const Token"),
    Mutant(RECORDS, "row < a.layout.batch;", "row <= a.layout.batch;"),
    Mutant(MAP, "if (slot < slots.end) a.row_id_map", "if (slot <= slots.end) a.row_id_map"),
    Mutant(MAP, "row < a.rows;", "row <= a.rows;"),
    Mutant(ROUTER, "behind < a.rows.tokens ? behind : a.rows.tokens", "behind"),
    Mutant(ROUTER, "token >= a.rows.tokens", "token > a.rows.tokens"),
]
LATE = [  # what others may read is written after they were told that it is
    Mutant(
        RECORDS, "  __threadfence();\n  __syncthreads();\n  if (threadIdx.x == 0) last", "  if (threadIdx.x == 0) last"
    ),
    Mutant(RECORDS, "uint32_t(groups))) return;", "1u)) return;"),
    Mutant(ROUTER, "atomicAdd(p.ticket, 1u) + 1u == gridDim.x;", "atomicAdd(p.ticket, 1u) == 0u;"),
]


def _advantages() -> None:
    for options in ({}, {"normalize_by": "batch"}, {"aggregation": "normalize_then_sum"}, {"baseline": "second_best"}):
        test_group_advantages.test_every_option({"baseline": "mean", **options}, "ragged")
    test_group_advantages.test_every_option({"normalize_by": "batch"}, "equal")
    test_group_advantages.test_informative_groups_and_ranks(66, 33, torch.float32)


def _losses() -> None:
    lengths = ((1030, 5, 0), (3, 1, 0, 2) * 19, (33, 2000), test_grpo_loss.LENGTHS)
    for variant, reduction in (
        ("everything", "token_mean"),
        ("gspo", "none"),
        ("vespo_mask", "sequence_mean_token_mean"),
        ("gmpo_token_advantages", "sequence_mean_token_mean"),
    ):
        test_grpo_loss.check(variant, reduction, lengths, first_order=1)


def _same_bits() -> None:
    config = test_grpo_loss.config_of("everything", "token_mean")
    for lengths, orders in ((test_grpo_loss.LENGTHS, range(64)), ((3, 1, 0, 2) * 19, range(12))):
        inputs, options = test_grpo_loss.sample("everything", lengths, 1, "token_mean")
        inputs = cast(inputs, torch.float32)
        assert_same_in_every_order(partial(run, inputs, config, **options), orders)


def _maps() -> None:
    for experts, kind in ((31, "random"), (1024, "few"), (257, "random")):
        test_moe_permute.test_every_option(experts, kind)
    test_moe_permute.test_slots_around_a_tile(2 * test_moe_permute.TILE + 33)


def _routes() -> None:
    for gate, shape in (("mixtral", (12, 2, 1, 1)), ("deepseek_v3", (64, 8, 8, 4)), ("gpt_oss", (33, 5, 11, 4))):
        test_moe_router.test_every_gate(shape, gate)
        test_moe_router.test_every_order_gives_the_same_bits(gate, shape)
    test_moe_router.test_tokens_around_a_chunk(3 * test_moe_router.CHUNK + 5, "ragged")


TESTS: dict[str, list[Callable[[], None]]] = {
    ADVANTAGES: [_advantages],
    LOSS: [_losses, _same_bits],
    MAP: [_maps],
    ROUTER: [_routes],
}


def complaint(library: Path, source: str) -> str:
    """What the tests of a source say about a module, "" if they pass."""
    with mock.patch.object(build, "module", return_value=build.load(library)):
        for test in TESTS[source]:
            try:
                test()
            except (AssertionError, RuntimeError) as error:
                return f"{test.__name__}: {error}"
    return ""


def complaint_of_a_child(library: Path, source: str) -> str:
    """The same in a process of its own, which a mistake may crash, and whose stacks go with it."""

    def work(sender: Connection) -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        faulthandler.disable()  # a crash is an answer, and needs no stack on the terminal
        sender.send(complaint(library, source))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(sender,))
    child.start()
    sender.close()
    if not receiver.poll(PATIENCE):  # a process whose heap was overwritten may wait for itself
        child.kill()
        child.join()
        return f"no answer in {PATIENCE} seconds"
    try:
        return receiver.recv()
    except EOFError:
        child.join()
        if child.exitcode >= 0:  # neither a mistake in a kernel nor in its tests: one in this file
            raise
        return f"the process was ended by signal {-child.exitcode}"
    finally:
        child.join()


@SLOW
def test_the_kernels_as_they_are_pass() -> None:
    assert [complaint_of_a_child(build.built() / "_C.so", source) for source in TESTS] == [""] * len(TESTS)


def test_every_source_has_its_tests() -> None:
    """A new op is emulated, tested and mutated, or it is listed as one that only its own GPU can run."""
    lists = re.findall(r"^set\(SM\w+_SOURCES([^)]*)\)", (build.ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    left_out = {word.removeprefix("csrc/") for words in lists for word in words.split()}
    sources = {str(path.relative_to(build.ROOT / "csrc")) for path in (build.ROOT / "csrc").rglob("*.cu")} - left_out
    assert {
        path.removeprefix("csrc/") for path in build.commands() if path.startswith("csrc/") and path[-3:] == ".cu"
    } == sources
    assert set(TESTS) == sources - {"common/cuda_probe.cu"}
    for source in TESTS:
        assert (Path(__file__).parent / f"test_{source.partition('/')[0]}.py").is_file()
        text = (build.ROOT / "csrc" / source).read_text()
        assert text.count("__global__") == len(with_a_trap_in_each_kernel(source)) > 0
        assert "<<<" not in text


@SLOW
@pytest.mark.parametrize("mutant", [m for source in TESTS for m in with_a_trap_in_each_kernel(source)], ids=str)
def test_every_kernel_runs(mutant: Mutant, tmp_path: Path) -> None:
    assert "cudaErrorLaunchFailure: __trap" in complaint_of_a_child(compile_mutant(mutant, tmp_path), mutant.unit)


BARRIERS = [mutant for source in (*TESTS, RECORDS) for mutant in without_each_barrier(source)]
REPRESENTATIVE = [without_each_barrier(RECORDS)[0], UNWRITTEN[0]]


@pytest.mark.parametrize(
    "mutant",
    [
        *REPRESENTATIVE,
        *(
            pytest.param(mutant, marks=SLOW)
            for mutant in (*BARRIERS, *UNWRITTEN, *TOO_MUCH, *LATE)
            if mutant not in REPRESENTATIVE
        ),
    ],
    ids=str,
)
def test_a_mistake_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    assert complaint_of_a_child(compile_mutant(mutant, tmp_path), mutant.unit)


@pytest.mark.parametrize(
    "mutant", [OUT_OF_BOUNDS[0], *(pytest.param(mutant, marks=SLOW) for mutant in OUT_OF_BOUNDS[1:])], ids=str
)
def test_the_sanitizer_notices_a_read_out_of_bounds(mutant: Mutant, tmp_path: Path) -> None:
    library = compile_mutant(mutant, tmp_path, sanitize=True)
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(library), mutant.unit],
        env=build.sanitizer_environment(),
        cwd=build.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert Path(mutant.source).name in done.stderr


if __name__ == "__main__":
    print(complaint(Path(sys.argv[1]), sys.argv[2]))
