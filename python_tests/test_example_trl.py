"""The demonstration with TRL: its table, what it takes, and one tiny run of each way."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from examples.trl import __main__, report
from examples.trl.settings import WAYS, Settings

TINY = Settings(vocab=64, width=16, samples=8, tokens=4, steps=3, learning_steps=1, threads=1)


def _result(seconds: float, loss: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "loss_seconds": seconds / 2,
        "megabytes": 100.0 * seconds,
        "losses": [0.5, loss],
        "gradient_norms": [2.0, 1.0],
        "rewards": [0.2, 0.6, 1.0],
    }


def test_the_table_compares_with_trl_as_it_is() -> None:
    results = {"stock": _result(3.0, 0.25), "patched": _result(1.0, 0.25), "fused": _result(0.5, 0.2505)}
    console = Console(file=io.StringIO(), width=120)
    console.print(report.table(results, TINY))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1.00 (1/3.0)" in text
    assert "50 MB (1/6.0)" in text
    assert "1e-03" in text
    assert "▂▅█" in text
    assert "0.20 -> 1.00" in text


def test_a_curve_has_a_bar_for_each_of_its_groups() -> None:
    assert report.curve([0.0, 1.0]) == "▁█"
    assert report.curve([0.0] * 21 + [1.0] * 19) == "▁" * 7 + "█" * 7


def test_without_trl_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert __main__.main([]) == 2
    assert "pip install 'trl>=1.16,<2'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--samples", "12"], ["--steps", "1"], ["--vocab", "10"], ["--width", "8"], ["--threads", "0"]]
)
def test_sizes_that_cannot_be_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.parse_arguments(arguments)
    assert f"{arguments[0][2:]} must be" in capsys.readouterr().err


@pytest.mark.trl
@pytest.mark.slow
def test_the_three_ways_train_alike() -> None:
    pytest.importorskip("trl", reason="needs TRL")
    from examples.trl import worker
    from grpo_kernels.integrations.trl import unpatch

    threads = torch.get_num_threads()
    try:
        results = {way: worker.run(way, TINY) for way in WAYS}
    finally:
        unpatch()
        torch.set_num_threads(threads)
    stock = results["stock"]
    assert max(map(abs, stock["losses"])) > 1e-3
    for way in ("patched", "fused"):
        for name in ("losses", "gradient_norms", "rewards"):
            assert report.difference(results[way][name], stock[name]) < 100 * torch.finfo(torch.float32).eps
        assert results[way]["seconds"] >= results[way]["loss_seconds"] > 0.0


def test_a_process_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(__main__.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="training with FusedGRPOTrainer failed"):
        __main__.run_in_process("fused", TINY)
