"""The record of the gates: which sources it belongs to, which runs may change it, and how the command ends."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gates import __main__ as gates_main
from bench.gates import cuda_kernels, fingerprint, report, sweep
from bench.gates.gate import Gate, Measured

ROOT = Path(__file__).parents[1]


def test_flags_are_those_of_the_build() -> None:
    path = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "build.ninja"
    if not path.is_file() or ".cu.o:" not in path.read_text():
        pytest.skip("no build tree with CUDA beside the sources")
    for rule in re.findall(r"\.cu\.o: (.*?)\n\n", path.read_text(), re.DOTALL):
        flags, defines = (re.search(rf"^  {name} = (.*)$", rule, re.MULTILINE) for name in ("FLAGS", "DEFINES"))
        assert flags is not None
        assert defines is not None
        used = {flag for flag in flags.group(1).split() if "--generate-code" not in flag}
        assert used | set(defines.group(1).split()) == set(cuda_kernels.FLAGS)


def test_sources_for_one_architecture_are_compiled_for_it_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "csrc" / "experts" / "cuda.cu"
    (tmp_path / "CMakeLists.txt").write_text("set(SM90A_SOURCES csrc/experts/cuda.cu)  # wgmma\nset(SM100A_SOURCES)\n")
    monkeypatch.setattr(cuda_kernels, "ROOT", tmp_path)
    assert cuda_kernels.architecture_names(source) == {90: "90a"}
    assert cuda_kernels.architecture_names(source.with_name("other.cu")) == {80: "80", 90: "90", 100: "100"}


@pytest.mark.parametrize(
    ("name", "text", "same", "other"),
    [
        ("a.cu", "int x = 1;  // why", "int x =\n 1; /* new */", "int x = 2;"),
        ("a.py", "x = '#1'  # why\n", "# why\nx  = '#1'\n", "x = '#2'  # why\n"),
    ],
)
def test_fingerprints_see_code_and_no_comments(name: str, text: str, same: str, other: str, tmp_path: Path) -> None:
    codes = []
    for content in (text, same, other):
        (tmp_path / name).write_text(content)
        codes.append(fingerprint.code(tmp_path / name))
    assert codes[0] == codes[1] != codes[2]


def test_fingerprints_see_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    (tmp_path / "csrc" / "op").mkdir(parents=True)
    (tmp_path / "csrc" / "op" / "cuda.cu").write_text('#include <cmath>\n#include "op/a.h"\n')
    (tmp_path / "csrc" / "op" / "a.h").write_text('#include "op/b.h"\n#include "op/a.h"\n')
    (tmp_path / "csrc" / "op" / "b.h").write_text("int x = 1;\n")
    before = fingerprint.of("op", "nvcc 13.0")
    (tmp_path / "csrc" / "op" / "b.h").write_text("int x = 2;\n")
    assert fingerprint.of("op", "nvcc 13.0") != before


def test_fingerprints_follow_the_imports_of_triton_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    package = tmp_path / "grpo_kernels"
    (package / "op").mkdir(parents=True)
    (package / "op" / "_triton.py").write_text("from grpo_kernels.op._kernels_triton import f\n")
    (package / "op" / "_kernels_triton.py").write_text("from grpo_kernels import _a_triton as a\n")
    (package / "_a_triton.py").write_text("def g():\n    from grpo_kernels._b_triton import h\n")
    shared = {name: package / f"_{name}_triton.py" for name in ("b", "c")}
    for path in shared.values():
        path.write_text("x = 1\n")
    before = fingerprint.of("op", "Triton 3.8.0")
    shared["c"].write_text("x = 2\n")
    assert fingerprint.of("op", "Triton 3.8.0") == before
    shared["b"].write_text("x = 2\n")
    assert fingerprint.of("op", "Triton 3.8.0") != before


def _row(**changes: Any) -> dict[str, Any]:
    row = {"op": "a", "kernel": "k", "variant": "", "compiler": "Triton 3.8.0", "arch": 90, "registers": 1}
    return {**row, **changes}


@pytest.fixture
def gates_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs `python -m bench.gates` over made-up measurements; returns its status, and the compilers on record."""
    shape = {"op": "grpo_loss", "name": "specialisation 7", "architecture": 90}
    gate = Gate("loss_kernel", 128, 256)
    monkeypatch.setattr(report, "PATH", tmp_path / "gates.json")

    def run(*arguments: str, registers: int = 100, old: str = "nvcc 12.0") -> tuple[int, list[str]]:
        measured = Measured(registers, 0, 0, 0, {})
        rows = sweep.rows([sweep.Result(gate=gate, compiler="nvcc 13.0", measured=measured, **shape)])
        report.save(report.stamped([{**rows[0], "compiler": old}]), report.PATH)
        monkeypatch.setattr(sweep, "run", lambda *_: [dict(row) for row in rows])
        monkeypatch.setattr(gates_main, "_compilers", lambda _: list(gates_main.COMPILERS))
        monkeypatch.setattr(
            gates_main, "_rows_of_other_triton", lambda folder, _: [{**rows[0], "compiler": folder.name}]
        )
        monkeypatch.setattr("sys.argv", ["bench.gates", *arguments])
        status = gates_main.main()
        return status, [row["compiler"] for row in report.load(report.PATH)["rows"]]

    return run


def test_a_broken_limit_fails_the_command(gates_command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gates_command()[0] == 0
    assert "FAILS" not in capsys.readouterr().out
    assert gates_command(registers=129)[0] == 1
    out = capsys.readouterr().out
    text = "grpo_loss: loss_kernel, nvcc 13.0, sm_90: specialisation 7: 129 registers, at most 128 allowed"
    assert text in out.splitlines()
    assert "FAILS: 1" in out


def test_only_complete_runs_are_recorded(gates_command: Any, tmp_path: Path) -> None:
    old, new = "nvcc 12.0", "nvcc 13.0"
    assert gates_command("--quick")[1] == gates_command("--arch", "90")[1] == [old]
    assert gates_command("--sample", "4")[1] == [old]
    assert gates_command("--json", str(tmp_path / "elsewhere.json"))[1] == [old]
    assert report.load(tmp_path / "elsewhere.json")["rows"][0]["compiler"] == new
    assert gates_command()[1] == gates_command("--op", "grpo_loss")[1] == [old, new]
    other = tmp_path / "Triton 3.6.0" / "triton"
    other.mkdir(parents=True)
    with pytest.raises(SystemExit):
        gates_command("--beside", str(other.parent))
    (other / "__init__.py").write_text("")
    assert gates_command("--beside", str(other.parent))[1] == ["Triton 3.6.0", new]


def test_a_sample_is_a_part_and_changes_with_the_code() -> None:
    def sample(code: str) -> set[int]:
        return {i for i in range(400) if sweep.in_sample(code, 90, f"kernel {i}", 4)}

    one, other = sample("one"), sample("other")
    assert one == sample("one")
    assert 70 < len(one) < 130
    assert 70 < len(other) < 130
    assert len(one & other) < 50


def test_new_rows_replace_those_of_their_op_and_compiler(tmp_path: Path) -> None:
    old = [_row(), _row(kernel="gone"), _row(compiler="Triton 3.6.0"), _row(op="b")]
    rows = report.merged(old, [_row(registers=2)])
    assert rows == [_row(compiler="Triton 3.6.0"), _row(registers=2), _row(op="b")]
    report.save(rows, tmp_path / "gates.json")
    assert report.load(tmp_path / "gates.json") == {"rows": rows}
    assert report.load(tmp_path / "none.json") == {"rows": []}
