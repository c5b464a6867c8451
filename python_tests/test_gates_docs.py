"""The pages that are made from results: current, and never claiming more than was run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import docs, docs_benchmarks, docs_kernels
from bench.gates import cuda_kernels, fingerprint, ops, report

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", docs.PAGES)
def test_pages_are_what_the_results_say(page: str) -> None:
    assert docs.stale([page]) == {}, f"{page} is stale: run python -m bench.docs"


def test_every_kernel_was_compiled_by_every_compiler() -> None:
    """A kernel with a gate but without a row would be missing on the page."""
    rows = report.load()["rows"]
    wanted = {(op, gate.kernel) for op, module in ops.modules().items() for gate in getattr(module, "CUDA", ())}
    assert {(row["op"], row["kernel"]) for row in rows if row["compiler"].startswith("nvcc")} == wanted
    wanted = {(op, name) for op, m in ops.modules().items() if hasattr(m, "TRITON") for name in m.TRITON.constants}
    for compiler in {row["compiler"] for row in rows if row["compiler"].startswith("Triton")}:
        assert {(row["op"], row["kernel"]) for row in rows if row["compiler"] == compiler} == wanted
    assert all(f"`{row['kernel']}`" in (ROOT / "docs/kernels.md").read_text() for row in rows)


# --- the status of a kernel ------------------------------------------------------------------------------------------


def _gates_row(**changes: Any) -> dict[str, Any]:
    row = {"op": "grpo_loss", "kernel": "loss_kernel", "compiler": "nvcc 13.0", "registers": 118, "failures": []}
    row["specialisations"] = 1
    return {**row, "sources": fingerprint.of("grpo_loss", "nvcc 13.0"), **changes}


def test_what_was_compiled() -> None:
    rows = [_gates_row(), _gates_row(registers=100)]
    assert docs_kernels.compiled(rows) == "compile-verified: at most 118 registers, 0 spills, nvcc 13.0"
    assert docs_kernels.compiled(rows[:1]) == "compile-verified: 118 registers, 0 spills, nvcc 13.0"
    assert docs_kernels.compiled([*rows, _gates_row(sources="older")]) == "changed since it was compiled"
    assert docs_kernels.compiled([*rows, _gates_row(failures=["too much"])]) == "OVER ITS LIMITS with nvcc 13.0"
    older = _gates_row(failures=["too much"], compiler="nvcc 12.4")
    assert docs_kernels.compiled([*rows[:1], older]) == (
        "compile-verified: 118 registers, 0 spills, nvcc 13.0; OVER ITS LIMITS with nvcc 12.4"
    )
    assert docs_kernels.compiled([]) == ""


def _gpu(device: str = "NVIDIA H100 80GB HBM3", **row: Any) -> dict[str, dict[str, Any]]:
    ours = {"kind": "ours", "backend": "triton", "median_us": 10.0, "percent_of_copy": 83.4, **row}
    slower = {"kind": "ours", "backend": "triton", "median_us": 20.0, "percent_of_copy": 41.0}
    part = {"kind": "part", "median_us": 1.0, "percent_of_copy": 99.0}
    case = {"op": "token_log_probs", "case": "small", "rows": {"ours": ours, "forward alone": part}, "targets": []}
    other = {**case, "case": "large", "rows": {"ours": slower}}
    cases = [case, other] if not row else [case]
    return {"gpu.json": {"machine": {"device": device, "cuda": "13.0"}, "cases": cases}}


def test_what_ran_on_a_gpu() -> None:
    run_on = docs_kernels.run_on
    assert run_on("token_log_probs", "Triton", 90, _gpu()) == ["run on NVIDIA H100 80GB HBM3 at 83 % of copy"]
    assert run_on("token_log_probs", "Triton", 90, _gpu(percent_of_matmul=90.0, percent_of_copy=5.0)) == [
        "run on NVIDIA H100 80GB HBM3 at 5 % of copy, 90 % of matmul"
    ]
    files = _gpu()
    files["gpu.json"]["cases"][1]["rows"]["ours"]["accuracy"] = "gradient is off"
    (text,) = run_on("token_log_probs", "Triton", 90, files)
    assert text == "run on NVIDIA H100 80GB HBM3 at 83 % of copy, 1 of 2 rows FAILED"
    assert run_on("token_log_probs", "Triton", 80, _gpu()) == []
    assert run_on("token_log_probs", "CUDA C++", 90, _gpu()) == []
    assert run_on("grpo_loss", "CUDA C++", 90, _gpu()) == []


@pytest.mark.parametrize(
    "row",
    [{"accuracy": "gradient is off"}, {"error": "illegal memory access"}, {"backend": "reference"}, {"kind": "peer"}],
)
def test_what_failed_did_not_run(row: dict[str, Any]) -> None:
    assert docs_kernels.run_on("token_log_probs", "Triton", 90, _gpu(**row)) == []


def test_checks_of_a_gpu() -> None:
    files = _gpu()
    files["gpu.json"]["checks"] = [
        {"phase": phase, "verdict": verdict}
        for phase, verdict in (("build", "pass"), ("tests", "pass"), ("memcheck", "fail"), ("racecheck", "late"))
    ]
    line = "- NVIDIA H100 80GB HBM3: 2 of 4 phases of `make gpu-check` passed, fail: memcheck, late: racecheck."
    assert line in docs_kernels.text(files).splitlines()


def test_a_rehearsal_is_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    (tmp_path / "gates.json").write_text('{"rows": []}')
    (tmp_path / "a.json").write_text('{"machine": {}, "rehearsal": true}')
    (tmp_path / "b.json").write_text('{"machine": {}}')
    assert list(docs.results()) == ["b.json"]


def test_results_of_a_cpu_say_nothing_about_a_gpu() -> None:
    files = _gpu()
    del files["gpu.json"]["machine"]["cuda"]
    assert docs_kernels.run_on("token_log_probs", "Triton", 90, files) == []
    assert "No kernel of this version has run on a GPU yet." in docs_kernels.text(files)
    assert "No kernel of this version has run on a GPU yet." not in docs_kernels.text(_gpu())


def test_architectures_of_gpus() -> None:
    names = {"NVIDIA A100-SXM4-80GB": 80, "NVIDIA H200": 90, "NVIDIA B200": 100}
    assert {name: docs_kernels.architecture_of({"device": name}) for name in names} == names
    assert docs_kernels.architecture_of({"device": "NVIDIA L4", "capability": "8.9"}) == 89
    with pytest.raises(ValueError, match="which architecture is 'NVIDIA L4'"):
        docs_kernels.architecture_of({"device": "NVIDIA L4"})


def test_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("csrc/tested/cuda.cu", "csrc/untested/cuda.cu", "csrc/experts/cuda.cu"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    (tmp_path / "CMakeLists.txt").write_text("set(SM90A_SOURCES csrc/experts/cuda.cu)\n")
    for name, text in (("emulator/test_ops.py", "tested experts"), ("interpreter/test_tested_triton.py", "")):
        (tmp_path / "python_tests" / name).parent.mkdir(parents=True)
        (tmp_path / "python_tests" / name).write_text(text)
    monkeypatch.setattr(docs_kernels, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_kernels, "ROOT", tmp_path)
    assert docs_kernels.on_the_cpu("tested", "CUDA C++") == "emulated"
    assert docs_kernels.on_the_cpu("untested", "CUDA C++") == ""
    assert docs_kernels.on_the_cpu("experts", "CUDA C++") == ""  # the emulator knows no wgmma
    assert docs_kernels.on_the_cpu("tested", "Triton") == "interpreted"
    assert docs_kernels.on_the_cpu("untested", "Triton") == ""


# --- the tables of the benchmarks ------------------------------------------------------------------------------------

RECORD: dict[str, Any] = {
    "op": "grpo_loss",
    "case": "8x8",
    "rows": {
        "ours": {"kind": "ours", "median_us": 20.0, "extra_bytes": 2**20},
        "ours, in place": {"kind": "ours", "median_us": 10.0, "percent_of_copy": 61.0, "extra_bytes": 0},
        "eager": {"kind": "eager", "median_us": 34.0, "extra_bytes": 64 * 2**20},
        "torch.compile": {"kind": "compile", "accuracy": "off"},
    },
    "targets": [
        {"target": ">= 5x eager", "measured": 3.4, "met": False},
        {"target": ">= 3x eager", "measured": 3.4, "met": True},
        {"target": "unmeasured", "measured": None, "met": None},
    ],
}
MACHINE = {"device": "toaster", "torch": "2.13.0", "threads": 2, "copy_gigabytes_per_second": 25.5, "load_average": 1.0}


def test_tables_of_a_machine() -> None:
    text = docs_benchmarks.text({"toaster.json": {"machine": MACHINE, "skipped": ["a: b"], "cases": [RECORD]}})
    row = "| `grpo_loss` 8x8, in place | 10 us | 34 us | 3.4x | 61 % of copy | 0.0 / 64 MiB |"
    assert row in text.splitlines()
    assert "| `grpo_loss` 8x8 | >= 5x eager | 3.4 |" in text.splitlines()
    assert "1 of 2 targets are met. Missed:" in text
    assert "Not measured, the time was over: a: b." in text
    assert "Other work" not in text
    assert text.endswith("No GPU has been measured yet.")


def test_a_loaded_machine_and_a_case_that_was_not_timed() -> None:
    failed = {**RECORD, "rows": {"ours": {"kind": "ours", "error": "no"}}, "targets": []}
    machine = {**MACHINE, "load_average": 7.0, "cuda": "13.0"}
    text = docs_benchmarks.text({"toaster.json": {"machine": machine, "skipped": [], "cases": [failed]}})
    assert "Other work shared its cores (load average 7.0)." in text
    assert "| `grpo_loss` 8x8 | not timed |" in text.splitlines()
    assert "No GPU has been measured yet." not in text


def test_only_the_text_between_markers_changes() -> None:
    page = f"head\n{docs.BEGIN}\nold\n{docs.END}\ntail\n"
    new = docs.between_markers(page, "new\n")
    assert new == f"head\n{docs.BEGIN}\nnew\n{docs.END}\ntail\n"
    assert docs.between_markers(new, "new") == new
    for broken in ("no markers", page + docs.BEGIN):
        with pytest.raises(ValueError, match="needs one line"):
            docs.between_markers(broken, "new")


def test_a_stale_page_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "PAGES", {"page.md": lambda old: "new"})
    monkeypatch.setattr("sys.argv", ["bench.docs", "--check"])
    assert docs.main() == 1
    assert "page.md: stale" in capsys.readouterr().out
    assert not (tmp_path / "page.md").exists()
    monkeypatch.setattr("sys.argv", ["bench.docs"])
    assert docs.main() == 0
    assert (tmp_path / "page.md").read_text() == "new"
    monkeypatch.setattr("sys.argv", ["bench.docs", "--check"])
    assert docs.main() == 0
