"""Options of the training example, wrong ones, and what Ctrl-C does to a run."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from examples.r1 import __main__, command_line, interrupt
from examples.r1.choices import PRESETS
from examples.r1.command_line import parse_arguments
from examples.r1.errors import RunError
from examples.r1.interrupt import Interrupted, interrupted, signals_handled, stop_requested
from examples.r1.settings import Settings
from grpo_kernels import GRPOLossConfig

# options ---------------------------------------------------------------------------------------------------------


def test_every_setting_has_an_option() -> None:
    assert parse_arguments([]) == Settings()
    words = "--seed 3 --group-size 4 --kl-coef 0.5 --clip 0.1 --model moe --no-shared-expert --preset dapo --weak-judge"
    found = parse_arguments([*words.split(), "--stages", "cold_start", "reward_model", "--report", "a.html"])
    assert found == Settings(
        seed=3,
        group_size=4,
        kl_coef=0.5,
        clip=0.1,
        model="moe",
        shared_expert=False,
        preset="dapo",
        weak_judge=True,
        stages=("cold_start", "reward_model"),
        report=Path("a.html"),
    )
    destinations = {action.dest for action in command_line.parser()._actions}
    assert {item.name for item in fields(Settings)} <= destinations


def test_every_preset_of_the_loss_is_an_option() -> None:
    with pytest.raises(ValueError) as error:
        GRPOLossConfig.preset("no such preset")
    assert {name for name in PRESETS if f"'{name}'" in str(error.value)} == set(PRESETS)
    assert str(error.value).count("'") == 2 * (len(PRESETS) + 1)
    for name in PRESETS:
        assert Settings(preset=name).preset == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preset gripo", r"argument --preset: invalid choice: 'gripo' \(choose from '?grpo'?, .*dapo"),
        ("--stages sft", "argument --stages: invalid choice: 'sft'"),
        ("--stages cold_start --weak-judge", "stages must have reward_model among them"),
        ("--stages diverse_rl cold_start", "stages must be some of .*in this order, got diverse_rl, cold_start"),
        ("--stages cold_start cold_start", "each once and in this order, got cold_start, cold_start"),
        ("--stages diverse_rl", "diverse_rl starts from rejection_sampling: run that too, or name the folder"),
        ("--stages diverse_rl --start-from nowhere", "start_from must be .*got no file nowhere/models/rejection"),
        ("--group-size 1", "group_size must be at least 2, got 1"),
        ("--prompts 0", "prompts must be at least 1, got 0"),
        ("--prompts many", "argument --prompts: invalid int value: 'many'"),
        ("--reasoning-rl-steps -1", "reasoning_rl_steps must be at least 0, got -1"),
        ("--threads 0", "threads must be at least 1, got 0"),
        ("--reasoning-temperature 0", "reasoning_temperature must be at least 0.01, got 0.0"),
        ("--diverse-temperature nan", "diverse_temperature must be at least 0.01, got nan"),
        ("--mtp 9", "mtp must be at most 8, got 9"),
        ("--sft-learning-rate nan", "sft_learning_rate must be positive and finite, got nan"),
        ("--kl-coef nan", "kl_coef must be at least 0, got nan"),
        ("--kl-coef inf", "kl_coef must be at least 0, got inf"),
        ("--judge-threshold 1.5", "judge_threshold must be between 0 and 1, got 1.5"),
        ("--clip -0.1", "clip_low must be a finite number at least 0, got -0.1"),
        ("--clip 0.1 --preset vespo", "clip_(low|high)=0.1 has no effect with surrogate='vespo'"),
        ("--width 30", "width must be a multiple of heads, which is 4, got 30"),
        ("--model moe --experts-per-token 9", "experts_per_token must be at most experts, which is 8, got 9"),
        ("--recipe bf16", "recipe 'bf16' is for experts: model must be 'moe', got 'dense'"),
        ("--expert-parallel", "expert_parallel shares out experts: model must be 'moe', got 'dense'"),
        ("--evaluation-prompts 100000", "evaluation_prompts must be at most 1000, got 100000"),
        ("--device tpu0x", "device must be cpu or cuda, got 'tpu0x'"),
        ("--device mps", "device must be cpu or cuda, got 'mps'"),
        ("--device cuda:99", "device must be one of the [0-9]+ GPUs that PyTorch finds, or cpu, got cuda:99"),
        ("--output README.md", "output must be a folder, got the file README.md"),
        ("--report docs", "report must be a file, got the folder docs"),
        ("--resum", "unrecognized arguments: --resum"),
    ],
)
def test_wrong_options_end_with_a_message(
    words: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("a file")
    (tmp_path / "docs").mkdir()
    with pytest.raises(SystemExit, match="2"):
        __main__.main(words.split())
    text = capsys.readouterr().err
    assert text.startswith("usage: python -m examples.r1 [options]\npython -m examples.r1: error: ")
    assert re.search(message, text), text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "docs"]  # nothing was begun


def test_what_a_run_cannot_do_is_told_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stuck(*_: object) -> None:
        raise RunError("[the judge] is too strict")

    monkeypatch.setattr(__main__, "run", stuck)
    assert __main__.main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "examples.r1: [the judge] is too strict\n"


def test_a_folder_inside_a_file_is_told_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert __main__.main(["--output", str(tmp_path / "file" / "run"), "--evaluation-prompts", "1"]) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err


# Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Python's own, also where tests run in the background of a shell, which ignores SIGINT."""
    before = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_the_first_signal_asks_and_the_second_stops(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interrupt, "SAME_PRESS", 0.0)
    before = signal.getsignal(number)
    with signals_handled():
        assert not stop_requested()
        os.kill(os.getpid(), number)
        assert stop_requested()
        assert interrupted().signal == number
        assert interrupted().saved
        assert "once more to stop at once" in capfd.readouterr().err
        with pytest.raises(Interrupted, match=number.name) as stop:
            os.kill(os.getpid(), number)
    assert (stop.value.exit_code, stop.value.saved) == (128 + number, False)
    assert signal.getsignal(number) == before
    assert not stop_requested()
    with signals_handled():
        assert not stop_requested()  # by a run before


def test_one_press_that_is_told_twice_is_one() -> None:
    with signals_handled():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted().signal == signal.SIGINT


def test_ignored_signals_stay_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with signals_handled():
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop_requested()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_run_in_another_thread_leaves_the_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    found = []

    def work() -> None:
        with signals_handled():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize(
    ("saved", "words", "ranks", "expected"),
    [
        (True, ["--seed", "3"], None, "python -m examples.r1 --seed 3 --output {} --resume"),
        (False, ["--resume"], None, "python -m examples.r1 --output {} --resume"),
        (True, [], "2", "torchrun --nproc-per-node 2 -m examples.r1 --output {} --resume"),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(
    saved: bool,
    words: list[str],
    ranks: str | None,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(*_: object) -> None:
        raise Interrupted(signal.SIGTERM, saved)

    monkeypatch.setattr(__main__, "run", stopped)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    output = tmp_path / "a folder"
    assert __main__.main([*words, "--output", str(output)]) == 143
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"stopped with a checkpoint in {output}" if saved else "stopped at once; to go on from")
    assert last == expected.format(f"'{output}'")
