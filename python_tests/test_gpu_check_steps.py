"""The commands of the phases that check everything on a GPU, and single steps: sanitizer, build, interpreter."""

from __future__ import annotations

import json
import os
import sys

import pytest

from bench.gpu_check import phases, steps
from bench.gpu_check import settings as settings_module
from bench.gpu_check.__main__ import main
from bench.gpu_check.phases import PHASES
from bench.gpu_check.settings import ROOT, Settings


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_phase_has_a_command(rehearse: bool, tmp_path) -> None:
    settings = Settings(rehearse, sys.executable, tmp_path, tmp_path, workers=3)
    machine = {"slug": "a-gpu", "capability": "90", "public": ["token_log_probs"], "packages": ["token_log_probs"]}
    phases.machine_file(settings).write_text(json.dumps(machine))
    for phase in PHASES:
        for limit in (phase.limit, 10.0):
            command = phase.command(settings, limit)
            assert all(isinstance(part, str) for part in command)
            assert command[:2] == [sys.executable, "-m"]
            for option in ("--deadline", "--seconds"):
                if option in command:
                    assert 0 < float(command[command.index(option) + 1]) < limit
        assert not [part for part in command if part.startswith("python_tests/") and not (ROOT / part).exists()]
        if rehearse:
            assert "cuda" not in command
    assert sum(max(p.reserve for p in PHASES if (p.group or p.name) == name)
               for name in {p.group or p.name for p in PHASES}) < settings_module.BUDGET / 2  # fmt: skip


def test_unknown_phases_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "everything"])
    assert "invalid choice: 'everything'" in capsys.readouterr().err


@pytest.mark.parametrize(("body", "status"), [("exit 0", 0), ("exit 7", 7)])
def test_the_sanitizer_is_run_or_said_to_be_missing(body: str, status: int, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert steps.sanitizer("memcheck", "cpu") == phases.SKIPPED
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho $PYTORCH_NO_CUDA_MEMORY_CACHING $*\n{body}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "0")
    assert steps.sanitizer("memcheck", "cpu") == status
    output = capfd.readouterr().out
    assert "not found on PATH" in output
    assert "1 --tool memcheck" in output
    assert "-m python_tests.gpu.small --device cpu" in output


@pytest.mark.parametrize(
    ("kernel", "status", "says"),
    [
        ("fp8_grouped_kernel", 7, "ours: fp8_grouped_kernel; of other libraries: none"),
        ("void at::native::fill<float>(int, T1)", 0, "ours: none; of other libraries: fill"),
        ("grpo_kernels::isa_cuda::group_advantages_kernel(int)", 7, "ours: group_advantages_kernel;"),
    ],
)
def test_the_sanitizer_counts_what_is_ours(kernel: str, status: int, says: str, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(steps, "_own_kernels", lambda: {"fp8_grouped_kernel", "group_advantages_kernel"})
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\necho '========= Invalid __global__ read of size 4 bytes'\n"
        f"echo '=========     at {kernel}+0x1b0 in a.py:12'\n"
        "echo 'grouped_gemm at 3+0x1'\necho '========= ERROR SUMMARY: 1 error'\nexit 7\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert steps.sanitizer("memcheck", "cpu") == status
    assert says in capfd.readouterr().out


def test_the_package_knows_its_kernels() -> None:
    assert {"fp8_grouped_kernel", "tile_table_kernel", "glu_quantize_kernel", "glu_kernel"} <= steps._own_kernels()
    assert all(name.isidentifier() for name in steps._own_kernels())


def test_a_rehearsal_leaves_the_built_module_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    package = tmp_path / "grpo_kernels"
    package.mkdir()
    assert steps._module_folder(tmp_path / "work", True) == package
    (package / f"_C{steps.sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    assert steps._module_folder(tmp_path / "work", True) == tmp_path / "work" / "module"
    assert steps._module_folder(tmp_path / "work", False) == package


def test_the_python_that_is_asked_for_is_found_from_any_folder(monkeypatch) -> None:
    """Phases run elsewhere, and put its folder on PATH."""
    monkeypatch.setenv("GK_PYTHON", os.path.relpath(sys.executable))
    assert settings_module.interpreter(rehearse=False) == os.path.abspath(sys.executable)
    monkeypatch.setenv("GK_PYTHON", "no-such-python")
    assert settings_module.interpreter(rehearse=False) == "no-such-python"
