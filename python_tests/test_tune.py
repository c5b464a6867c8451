"""The tuner without a GPU: what is tried and fits, what it decides by which measurements, the tables it writes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from bench.tune import choose, problems, table
from bench.tune.candidates import Choice, candidates, default, fits, known, shared_bytes
from grpo_kernels.grouped_gemm import _fp8_config_triton as config

ENTRIES = [("product", family, size) for family in (89, 90, 100) for size in ("few", "many")]
ENTRIES += [("wgrad", family, size) for family in (90, 100) for size in ("aligned", "narrow")]


# --- candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "family", "size"), ENTRIES)
def test_candidates_fit(op: str, family: int, size: str) -> None:
    """The default comes first, and every one has a place in memory and in registers."""
    tried = candidates(op, family, size)
    assert tried[0] == default(op, family, size)
    assert len(set(tried)) == len(tried) > 3
    for choice in tried:
        assert fits(choice, family), choice
        assert known(op, family, size, choice)
        assert choice.block_m in ((64, 128) if op == "product" else (128,))
        stages = (choice.block_m + 128) * 128 * choice.num_stages
        assert stages * choice.on_each <= (227 if family >= 90 else 99) * 1024
        assert not choice.specialized or (family == 90 and choice.num_warps == 4 and size != "narrow")
    assert all(choice.mib == 16 and choice.on_each == 1 for choice in tried) or op == "product"


def test_everything_that_is_tuned_has_entries_and_the_other_way_round() -> None:
    tuned = [(group.op, family, group.size) for family in (89, 90, 100) for group in problems.groups(family)]
    assert sorted(tuned) == sorted(ENTRIES)
    assert problems.groups(80) == []
    families = {"8.0": 0, "8.9": 89, "9.0": 90, "10.3": 100, "12.0": 89}
    assert {capability: problems.family_of(capability) for capability in families} == families


def test_problems_are_of_their_class() -> None:
    for group in problems.GROUPS:
        for problem in group.problems:
            experts, rows, width, columns = problem.shape
            assert rows == experts * problem.rows
            assert width % 16 == columns % 16 == 0
            if group.op == "product":
                assert group.size == ("few" if problem.rows <= config.FEW_ROWS else "many")
            else:
                assert problem.rows % 128 == 0


@pytest.mark.parametrize(
    ("choice", "compiled"),
    [
        (Choice(128, 4, 5, True), 230032),
        (Choice(128, 4, 4, True), 197096),
        (Choice(64, 4, 4, True), 164136),
        (Choice(64, 4, 4, False), 98356),
        (Choice(128, 8, 6, False), 197184),
    ],
)
def test_shared_memory_is_what_compilers_take(choice: Choice, compiled: int) -> None:
    """Of any release and architecture, at most a KiB less."""
    assert compiled <= shared_bytes(choice) <= compiled + 1024


@pytest.mark.parametrize(
    ("choice", "family"),
    [
        (Choice(128, 4, 6, True), 90),  # memory of a program
        (Choice(64, 4, 4, False, 3), 90),  # memory of a multiprocessor
        (Choice(64, 4, 5, False), 89),
        (Choice(128, 4, 4, False), 90),  # sums: such a kernel spills
        (Choice(64, 4, 3, False), 89),
        (Choice(128, 8, 3, False, 2), 90),  # registers
    ],
)
def test_what_does_not_fit(choice: Choice, family: int) -> None:
    assert not fits(choice, family)
    assert not any(known(op, family, size, choice) for op, of, size in ENTRIES if of == family)


# --- decisions -------------------------------------------------------------------------------------------------------


def group(*times: list[tuple[float, float] | str | None], op: str = "product", size: str = "few") -> dict[str, Any]:
    """Of problems, each with (microseconds, the default's) by candidate; "..." is an error, None: other bits."""
    tried = candidates(op, 90, size)
    records = []
    for of_problem in times:
        lines: list[dict[str, Any]] = []
        for choice, found in zip(tried, of_problem, strict=False):
            line: dict[str, Any] = {"choice": list(choice)}
            if isinstance(found, str):
                line["error"] = found
            elif found is None:
                line |= {"held": False, "difference": 0.5}
            else:
                line |= {"held": True, "microseconds": found[0], "default_microseconds": found[1]}
            lines.append(line)
        records.append({"problem": f"problem {len(records)}", "candidates": lines})
    return {"op": op, "size": size, "complete": True, "problems": records}


def chosen(record: dict[str, Any]) -> int | None:
    found = choose.winner(record)
    tried = candidates(record["op"], 90, record["size"])
    return None if found is None else tried.index(Choice(*found["choice"]))


def test_the_fastest_over_all_problems_wins() -> None:
    record = group([(10, 10), (8, 10), (5, 10)], [(20, 20), (18, 20), (30, 20)])
    assert chosen(record) == 1
    assert choose.winner(record) == {
        "choice": list(candidates("product", 90, "few")[1]), "gain": 1.1785, "compared": 3,
    }  # fmt: skip
    assert chosen(group([(10, 10), (5, 10), (5, 10)])) == 1  # of equal ones the first


def test_what_gave_other_bits_or_failed_for_one_problem_cannot_win() -> None:
    record = group([(10, 10), (1, 10), None, (9, 10)], [(10, 10), "hung", (1, 10), (9, 10)])
    assert chosen(record) == 3
    said = choose.problems_of(record)
    assert len(said) == 2
    assert "other bits, by 5.0e-01" in said[0]
    assert "hung" in said[1]
    assert not choose.default_failed(record)


def test_noise_is_no_gain() -> None:
    assert chosen(group([(10, 10), (9.9, 10)])) == 0
    assert chosen(group([(10, 10.5), (9.6, 10)])) == 0  # the default differs from itself by as much
    assert chosen(group([(10.5, 10), (9.6, 10)])) == 0
    assert chosen(group([(10, 10.1), (9.6, 10)])) == 1


def test_nothing_is_decided_without_every_measurement() -> None:
    whole = group([(10, 10), (5, 10)])
    assert chosen(whole | {"complete": False}) is None
    assert chosen(group(["crashed", (5, 10)])) is None
    assert chosen(group([None, (5, 10)])) is None
    whole["problems"][0]["error"] = "out of memory"
    assert chosen(whole) is None
    assert choose.default_failed(whole)
    assert choose.default_failed(group([None, (5, 10)]))


# --- tables ----------------------------------------------------------------------------------------------------------


def results(*groups: dict[str, Any], family: int = 90) -> dict[str, Any]:
    machine = {"device": "NVIDIA H100 80GB HBM3", "triton": "3.8.0"}
    return {"schema": table.SCHEMA, "measured_on": machine, "family": family, "groups": list(groups)}


def saved(path: Path, found: dict[str, Any]) -> Path:
    path.write_text(table.results_text(found))
    assert json.loads(path.read_text()) == found
    return path


def module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("written", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_shipped_module_is_what_the_tuner_writes() -> None:
    assert table.PATH.read_text() == table.text(table.shipped())


def test_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Winners go in, everything else stays; launch_config takes them; a second time nothing changes."""
    faster, stays = group([(10, 10), (5, 10)]), group([(10, 10), (20, 10)], op="wgrad", size="narrow")
    wgrad = group([(10, 10), (5, 10)], op="wgrad", size="aligned")
    undecided = group([(10, 10), (1, 10)], size="many") | {"complete": False}
    file, target = saved(tmp_path / "tune.json", results(faster, stays, wgrad, undecided)), tmp_path / "written.py"
    text = table.apply([file], target)
    assert target.read_text() == text == table.apply([file, file], target)
    written, before = module(target), table.shipped()
    best = candidates("product", 90, "few")[1]
    assert {**before.product, (90, "few"): tuple(best)} == written.PRODUCT
    assert {**before.wgrad, (90, "aligned"): candidates("wgrad", 90, "aligned")[1][1:4]} == written.WGRAD
    words = "NVIDIA H100 80GB HBM3, Triton 3.8.0, the best of 2"
    keys = {("product", 90, "few"), ("wgrad", 90, "aligned"), ("wgrad", 90, "narrow")}
    assert dict.fromkeys(keys, words) == written.MEASURED
    monkeypatch.setattr(config, "PRODUCT", written.PRODUCT)
    assert config.launch_config(256, 1, 7168, 90)[:5] == best[:5]
    assert config.launch_config(257, 1, 7168, 90)[:5] == before.product[90, "many"][:5]
    assert table.applied(before, results(faster)).product != before.product  # and what it was given is not changed
    assert table.shipped() == before


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (results(group([(10, 10), (5, 10)]), family=0), "was not measured on a GPU"),
        (results() | {"schema": 2}, "is not a file of measurements with schema 1"),
        (results(group([(10, 10), (5, 10)]), family=89), "is no configuration that this version tries"),
    ],
)
def test_what_is_not_applied(found: dict[str, Any], says: str, tmp_path: Path) -> None:
    target = tmp_path / "written.py"
    with pytest.raises(ValueError, match=says):
        table.apply([saved(tmp_path / "tune.json", found)], target)
    assert not target.exists()


def test_what_is_no_json_is_not_applied(tmp_path: Path) -> None:
    (tmp_path / "tune.json").write_text('{"schema": 1')
    with pytest.raises(ValueError, match="is not JSON"):
        table.apply([tmp_path / "tune.json"], tmp_path / "written.py")
