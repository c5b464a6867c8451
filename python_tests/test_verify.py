"""grpo-kernels verify: what it prints and writes, and that it runs from the package alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import _dispatch, _extension
from grpo_kernels.cli import main, verify
from grpo_kernels.grpo_loss import choices as loss_config
from grpo_kernels.grpo_loss import presets
from grpo_kernels.testing import verification
from grpo_kernels.testing.accuracy import accuracy_error
from grpo_kernels.testing.verification import grpo_loss as loss_cases
from grpo_kernels.testing.verification import moe_router as router_cases
from grpo_kernels.testing.verification.report import Report

PACKAGE = Path(grpo_kernels.__file__).parent
ALONE = """
import sys
for name in ("rich", "numpy", "pytest", "hypothesis", "python_tests"):
    sys.modules[name] = None
import grpo_kernels
assert grpo_kernels.__file__.startswith(sys.argv[1]), grpo_kernels.__file__
from grpo_kernels.cli import main
sys.exit(main(["verify", "--device", "cpu", "--json", "results.json"]))
"""


def call(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `grpo-kernels verify`."""
    status = main(["verify", *options])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


# --- everything, from a copy of the package --------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    status: int
    lines: list[str]
    errors: str
    results: dict[str, Any]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The command as an installed wheel runs it: a folder with the package, no repository, torch and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE, folder / "grpo_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, str(folder)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # two threads on a busy core would wait for each other
        capture_output=True,
        text=True,
    )
    results = folder / "results.json"
    return Run(
        process.returncode,
        process.stdout.splitlines(),
        process.stderr,
        json.loads(results.read_text()) if results.is_file() else {},
    )


def test_this_machine_is_verified(whole_run: Run) -> None:
    assert whole_run.status == 0, "\n".join([*whole_run.lines, whole_run.errors])
    assert whole_run.lines[-1].startswith(f"verified: {len(_dispatch.public_ops())} ops, ")
    assert whole_run.results["summary"] == whole_run.lines[-1]
    assert whole_run.results["seconds"] > 0
    (comparisons,) = re.findall(r"(\d+) comparisons", whole_run.lines[-1])
    assert int(comparisons) < 60_000  # half a minute of a fast core, some minutes of a slow one
    assert not whole_run.errors


def test_the_table_has_a_row_for_every_op_backend_and_dtype(whole_run: Run) -> None:
    rows = [line.split() for line in whole_run.lines]
    for op in _dispatch.public_ops():
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            (row,) = [row for row in rows if row[:4] == [op, "reference", "cpu", dtype]]
            assert int(row[4]) > 0
            assert row[7] == "ok"
            assert float(row[5]) <= (0.0 if row[6] == "exact" else float(row[6]))
            if not _extension.cpu_problem():
                assert [op, "native", "cpu", dtype] in [row[:4] for row in rows]


def test_json_says_the_same(whole_run: Run) -> None:
    results = whole_run.results
    assert results["verified"] is True
    assert results["failures"] == []
    assert results["versions"]["grpo_kernels"] == grpo_kernels.__version__
    assert "cpu" in results["devices"]
    assert len([row for row in results["rows"] if row["verdict"] == "ok"]) == len(whole_run.lines) - 3
    (row,) = [
        row
        for row in results["rows"]
        if (row["op"], row["backend"], row["dtype"]) == ("token_log_probs", "reference", "bfloat16")
    ]
    assert 0 < row["error"] <= row["budget"]
    assert row["cases"] == sum(torch.bfloat16 in case.dtypes for case in verification.cases()["token_log_probs"])
    assert row["comparisons"] > 3 * row["cases"]


# --- what is checked -------------------------------------------------------------------------------------------------


def test_every_op_has_cases_with_names_of_their_own() -> None:
    for op, cases in verification.cases().items():
        assert cases, f"{op} has no cases in grpo_kernels.testing.verification"
        assert len({case.name for case in cases}) == len(cases)
        assert {dtype for case in cases for dtype in case.dtypes} >= set(verify.EVERY_DTYPE)


def test_every_variant_of_the_loss_is_among_the_cases() -> None:
    fields = list(loss_cases.VARIANTS.values())

    def used(name: str) -> set[Any]:
        return {options[name] for options in fields if name in options}

    assert used("surrogate") | {"ppo_clip"} == set(loss_config.SURROGATES)
    assert used("ratio_level") | {"token"} == set(loss_config.RATIO_LEVELS)
    assert used("sampler_correction") | {"none"} == set(loss_config.SAMPLER_CORRECTIONS)
    assert {name.rstrip("+") for name in used("kl_estimator")} | {"k3"} == set(loss_config.KL_ESTIMATORS)
    assert set(loss_cases.PRESETS) == set(presets._PRESETS)
    names = [case.name.split(", ") for case in loss_cases.CASES]
    for layout in ("padded", "packed"):
        assert {name[1] for name in names if name[-1] == layout} >= set(loss_config.REDUCTIONS)


@pytest.mark.parametrize("case", [case for case in loss_cases.CASES if "preset" not in case.name], ids=lambda c: c.name)
def test_no_case_of_the_loss_stands_on_an_edge(case: verification.Case) -> None:
    """A token at the bound of a clip would be decided by the rounding of the machine."""
    results = []
    for nudge in (0.0, 1e-6):
        inputs = case.make(torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(1)
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                inputs[name] = value.double() * (1 + nudge * noise)
        with grpo_kernels.backend("reference"):
            results.append(case.run(inputs))
    for name, expected in results[0].items():
        if name.startswith("gradient") or name == "loss":
            assert accuracy_error(results[1][name], expected) < 1e-3, name


@pytest.mark.parametrize("case", [c for c in router_cases.CASES if "ties" not in c.name], ids=lambda c: c.name)
def test_no_case_of_the_router_stands_on_an_edge(case: verification.Case) -> None:
    """Two experts that are nearly equal would be told apart by the rounding of the machine."""
    chosen = []
    for nudge in (0.0, 1e-5):
        inputs = case.make(torch.Generator().manual_seed(0))
        noise = torch.randn(inputs["logits"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        inputs["logits"] = inputs["logits"].double() + nudge * noise
        with grpo_kernels.backend("reference"):
            chosen.append(case.run(inputs)["topk_ids"])
    assert torch.equal(*chosen)


def test_an_op_without_cases_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    backends = _dispatch.Backends(cpu=("native",), cuda=("native",), interpretable=False)
    monkeypatch.setitem(_dispatch._registered, "forgotten", backends)
    status, out, _ = call(capsys, "--op", "forgotten", "--op", "best_of_group")
    assert status == 1
    assert "FAILED forgotten: this op has no cases" in out
    assert out.splitlines()[-1].startswith("FAILED: 1 of ")


# --- backends that are not there, options ----------------------------------------------------------------------------


def test_unavailable_backends_are_shown_and_no_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_extension, "cpu_problem", lambda: "the extension is not built (nobody did)")
    status, out, _ = call(capsys, "--op", "best_of_group", "--op", "informative_groups", "--dtype", "float32")
    assert status == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for op in ("best_of_group", "informative_groups"):
        assert f"{op} native cpu not available" in lines
    assert lines.count("not available: native on cpu: the extension is not built (nobody did)") == 1
    assert lines[-1].endswith("s; not available: native on cpu")
    assert lines[-1].startswith("verified: 2 ops, 2 backends, ")


def test_the_summary_names_what_a_gpu_lacks() -> None:
    device = torch.device("cuda", 1)
    report = Report()
    (case,) = [case for case in verification.cases()["best_of_group"] if case.name == "one, equal groups"]
    report.outcomes += verification.check(
        case, verification.targets("best_of_group", torch.device("cpu")), [torch.float32]
    )
    for op in ("best_of_group", "grpo_loss"):
        report.unavailable.append((verification.Target(op, "native", device), "the driver is too old"))
    assert report.verified()
    assert report.summary(1.6).endswith(" 2 s; not available: native on cuda:1")


def test_a_backend_that_cannot_run_leaves_nothing_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "--op", "grpo_loss", "--backend", "triton", "--device", "cpu")
    assert status == 1
    assert "grpo_loss has no triton kernel for this device" in out
    assert out.splitlines()[-1].startswith("FAILED: nothing to compare")
    assert call(capsys, "--case", "no such case")[0] == 1


def test_verbose_has_a_row_for_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--op", "best_of_group", "--backend", "reference", "--dtype", "float32", "--dtype", "bfloat16")
    status, out, _ = call(capsys, *options, "--verbose")
    assert status == 0
    for case in verification.cases()["best_of_group"]:
        assert sum(line.endswith(case.name) for line in out.splitlines()) == 2


def test_bad_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = call(capsys, "--device", "cuda:77")
    assert status == 2
    assert "there is no cuda:77; here are cpu" in err
    status, _, err = call(capsys, "--json", str(tmp_path / "missing" / "results.json"))
    assert status == 2
    assert "there is no folder" in err
    for option in ("--op", "--backend", "--dtype"):
        with pytest.raises(SystemExit) as stopped:
            call(capsys, option, "nonsense")
        assert stopped.value.code == 2


def test_progress_on_a_terminal_yields_everything(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, out, err = call(capsys, "--op", "best_of_group", "--dtype", "float32")
    assert status == 0
    assert "verifying" in err
    assert "verified: 1 ops" in out


@pytest.mark.parametrize(("width", "shown"), [(80, False), (140, True), (250, True)])
def test_a_narrow_terminal_gets_the_columns_that_matter(
    width: int, shown: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    options = ("--op", "group_advantages", "--dtype", "float32", "--backend", "reference", "--case", "infinite, ragged")
    status, out, _ = call(capsys, *options)
    assert status == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines()
    assert max(map(len, lines)) <= width
    assert any("group_advantages" in line and "float32" in line and "ok" in line for line in lines)
    assert ("infinite" in out) == shown
