"""The page of examples.r1 names the files, options, targets and settings that there are."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from examples.r1.command_line import parser
from examples.r1.settings import Settings
from examples.r1.stages import reward_model
from examples.r1.tasks import DigitSorting, SpellBackward

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "r1"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
FOREIGN_OPTIONS = {"--nproc-per-node", "--only", "--jobs", "--write"}  # of torchrun, check.py and sweep.py

_default = Settings()
FIGURES = (
    f"{DigitSorting.cold_examples} and {SpellBackward.cold_examples} noisy demonstrations of the two tasks; "
    f"{_default.cold_start_steps} steps of {_default.sft_batch}",
    f"{_default.reasoning_rl_steps} steps of {_default.prompts} prompts, {_default.group_size} samples of each",
    f"learns {reward_model.EXAMPLES:,} good answers",
    f"{_default.rejection_prompts} prompts of each task, {_default.rejection_group_size} samples of each",
    f"starts anew on these, {_default.rejection_sampling_steps} steps",
    f"{_default.diverse_rl_steps} steps, temperature {_default.diverse_temperature}",
    f"KL coefficient {_default.kl_coef}",
    f"separators {DigitSorting.foreign_share:.0%}".replace("%", " %"),
    f"of the words {SpellBackward.misread_share:.0%}".replace("%", " %"),
    f"at least {_default.judge_threshold}",
    f"`--dynamic-sampling` rounds ({_default.dynamic_sampling}",
    f"at most `--save-every` steps old ({_default.save_every})",
)


def test_all_files_are_on_the_page() -> None:
    table = PAGE.split("## The files")[1].split("\n## ")[0]
    named, folder = set(), ""
    for line in re.findall(r"^\|.*", table, flags=re.MULTILINE):
        folders = re.findall(r"^\| \*\*`(\w+/)`\*\*", line)
        folder = folders[0] if folders else folder
        named |= {folder + name for name in re.findall(r"`(\w+\.py)`", line.partition(" | ")[0])}
    there = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py")}
    assert named == {name for name in there if not name.endswith("/__init__.py")}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"python -m (examples\.r1\.[\w.]+)", PAGE))))
def test_commands_on_the_page_answer(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(name).main()
    assert f"usage: python -m {name} " in capsys.readouterr().out


def test_options_and_targets_on_the_page_exist() -> None:
    known = {name for action in parser()._actions for name in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", PAGE))
    assert len(named) > 20
    assert named - known == FOREIGN_OPTIONS
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", PAGE)) <= targets


@pytest.mark.parametrize("figure", FIGURES)
def test_settings_on_the_page_are_the_defaults(figure: str) -> None:
    assert figure in " ".join(PAGE.split())
