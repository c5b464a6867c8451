"""The tuner without a GPU: what is tried and fits, what it decides by which measurements, the tables it writes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from bench.tune import choose, compiled, problems, table, tiles
from bench.tune.candidates import Choice, candidates, choice_of, default, fits, known, shared_bytes
from bench.tune.tiles import Tiles
from grpo_kernels.grouped_gemm import _config_triton as grouped_config
from grpo_kernels.grouped_gemm import _fp8_config_triton as config
from grpo_kernels.grouped_gemm import _fp8_table_triton as fp8_table
from grpo_kernels.grouped_gemm import _table_triton as grouped_table
from grpo_kernels.linear_log_probs import _config_triton as linear_config
from grpo_kernels.linear_log_probs import _table_triton as linear_table

ENTRIES = [("product", family, size) for family in (89, 90, 100) for size in ("few", "many")]
ENTRIES += [("wgrad", family, size) for family in (90, 100) for size in ("aligned", "narrow")]
TILES = [(group.op, group.size) for group in problems.GROUPS if group.op in tiles.OPS]


# --- candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "family", "size"), ENTRIES)
def test_candidates_fit(op: str, family: int, size: str) -> None:
    """The default comes first, and every one has a place in memory and in registers."""
    tried = [choice for choice in candidates(op, family, size) if isinstance(choice, Choice)]
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


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize(("op", "size"), TILES)
def test_tiles_fit(op: str, architecture: int, size: str) -> None:
    """The default comes first, all sums have its order, and a slice of a head's gradients holds whole tiles."""
    tried = tiles.candidates(op, architecture, size)
    assert tried[0] == default(op, architecture, size)
    assert len(set(tried)) == len(tried) > 1
    for choice in tried:
        assert tiles.fits(choice, architecture, size), choice
        assert known(op, architecture, size, choice)
        assert choice.block_k == tried[0].block_k
        assert linear_config.COLUMNS % choice.block_n == 0
        assert choice.block_n % choice.pieces == 0
        assert choice.block_n // choice.pieces >= 16
        assert choice.on_each * choice.num_warps <= 16
        sums = choice.block_m * choice.block_n // (32 * choice.num_warps)
        assert sums <= 128, "of a thread"
    assert not known(op, architecture, size, tried[0]._replace(num_stages=9))


def test_everything_that_is_tuned_has_entries_and_the_other_way_round() -> None:
    of_fp8 = [group for group in problems.GROUPS if group.op not in tiles.OPS]
    tuned = [(g.op, family, g.size) for family in (89, 90, 100) for g in problems.groups(family) if g in of_fp8]
    assert sorted(tuned) == sorted(ENTRIES)
    assert [group.op for group in problems.groups(80) if group in of_fp8] == []
    assert {group.op for group in problems.groups(80)} == set(tiles.OPS)
    assert problems.groups(75) == []
    assert len({group.text for group in problems.GROUPS}) == len(problems.GROUPS)


def test_problems_are_of_their_class() -> None:
    for group in problems.GROUPS:
        for problem in group.problems:
            if group.op in ("forward", "dlogits"):
                flags = {"rank": 8 if "lora" in group.size else 0, "capped": "capped" in group.size}
                size = linear_config.table_class(tiles.element_size(group.size), **flags)
                assert size == group.size
                continue
            experts, rows, width, columns = problem.shape
            assert rows == experts * problem.rows
            assert width % 16 == columns % 16 == 0
            if group.op == "product":
                assert group.size == ("few" if problem.rows <= config.FEW_ROWS else "many")
            elif group.op == "wgrad":
                assert problem.rows % 128 == 0
            else:
                size = grouped_config.table_class(rows, experts, tiles.element_size(group.size))
                assert size == group.size
    assert linear_config.table_class(2, 8, True) == ""


# --- entries of the tables -------------------------------------------------------------------------------------------


def test_what_is_not_measured_takes_the_heuristics() -> None:
    """The tables are data about GPUs that someone has measured on: of the others they say nothing."""
    keys = set(grouped_table.MEASURED) | set(linear_table.MEASURED)
    entries = {(op, *key) for op, found in tiles.TABLES.items() for key in found}
    assert keys == entries
    of_fp8 = {("product", *key) for key in fp8_table.PRODUCT} | {("wgrad", *key) for key in fp8_table.WGRAD}
    assert set(fp8_table.MEASURED) <= of_fp8


def test_an_entry_of_a_head_holds_for_its_class_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = (64, 128, 64, 4, 4, 3, 2, 8)
    before = linear_config.launch_config(128256, 4096, 2, 90, "tma")
    monkeypatch.setitem(linear_table.FORWARD, (90, "16-bit plain"), entry)
    found = linear_config.launch_config(128256, 4096, 2, 90, "tma")
    assert found == (64, 128, 64, 16, 4, 4, 3, 2, None, 126, 8, (8 << 20) // (64 * 4096 * 2))
    assert found.splits == -(-128256 // (found.tiles_per_split * 128))
    for change in (
        {"architecture": 100}, {"loads": "scalar"}, {"element_size": 4}, {"rank": 8}, {"capped": True},
        {"kernel": "dlogits"},
    ):  # fmt: skip
        arguments: dict[str, Any] = {
            "vocab": 128256, "width": 4096, "element_size": 2, "architecture": 90, "loads": "tma", **change
        }  # fmt: skip
        with_entry = linear_config.launch_config(**arguments)
        monkeypatch.delitem(linear_table.FORWARD, (90, "16-bit plain"))
        assert with_entry == linear_config.launch_config(**arguments), change
        monkeypatch.setitem(linear_table.FORWARD, (90, "16-bit plain"), entry)
    monkeypatch.setitem(linear_table.DLOGITS, (90, "16-bit plain"), before[:3] + before[4:8] + (16,))
    assert linear_config.launch_config(128256, 4096, 2, 90, "tma", kernel="dlogits") == before


def test_an_entry_of_experts_holds_for_its_class_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    many, few = (8 * 1024, 8, 4096, 2), (8 * 96, 8, 4096, 2)
    before = [grouped_config.launch_config(*sizes, 90, "tma") for sizes in (many, few)]
    monkeypatch.setitem(grouped_table.GROUPED, (90, "16-bit many"), (256, 128, 64, 2, 8, 4, 1, 32))
    monkeypatch.setitem(grouped_table.WGRAD, (90, "16-bit few"), (64, 128, 64, 2, 4, 4, 2, 0))
    assert grouped_config.launch_config(*many, 90, "tma") == (256, 128, 64, 2, 8, 4, 1, 16)
    assert grouped_config.launch_config(*few, 90, "tma") == before[1]
    assert grouped_config.launch_config(*many, 100, "tma") == before[0]
    assert grouped_config.launch_config(*many, 90, "scalar").block_n == 64
    assert grouped_config.wgrad_config(8 * 96, 8, 2, 90, "tma") == (64, 128, 64, 2, 4, 4, 2, 1)
    assert grouped_config.wgrad_config(8 * 97, 8, 2, 90, "tma")[:3] == (128, 256, 64)


@pytest.mark.skipif(bool(compiled.triton_kernels.problem()), reason="Triton kernels cannot be compiled here")
@pytest.mark.parametrize(
    ("op", "architecture", "size", "choice", "says"),
    [
        ("grouped", 90, "16-bit few", Tiles(64, 128, 64, 2, 4, 3, 3), ""),
        ("grouped", 90, "16-bit many", Tiles(128, 256, 64, 4, 4, 4), "spills"),
    ],
)
def test_candidates_compile(op: str, architecture: int, size: str, choice: Tiles, says: str) -> None:
    """A sample of what `--compile` does: one that is tried, and one that is in no list."""
    assert known(op, architecture, size, choice) == (not says)
    found = compiled.problems(choice, compiled.compile_choice(op, architecture, size, choice), architecture)
    assert says in " ".join(found)
    assert bool(found) == bool(says)


def test_programs_that_share_a_multiprocessor_have_to_fit() -> None:
    measured = compiled.Measured(registers=255, spills=0, stack=0, shared=98328, opcodes={})
    assert compiled.problems(Tiles(128, 128, 64, 4, 4, 3, 2), measured, 90) == []
    (words,) = compiled.problems(Tiles(128, 128, 64, 4, 8, 3, 2), measured, 90)
    assert "registers of all programs" in words
    assert len(compiled.problems(Tiles(128, 128, 64, 4, 4, 3, 3), measured, 90)) == 2


@pytest.mark.parametrize(
    ("choice", "bytes_compiled"),
    [
        (Choice(128, 4, 5, True), 230032),
        (Choice(128, 4, 4, True), 197096),
        (Choice(64, 4, 4, True), 164136),
        (Choice(64, 4, 4, False), 98356),
        (Choice(128, 8, 6, False), 197184),
    ],
)
def test_shared_memory_is_what_compilers_take(choice: Choice, bytes_compiled: int) -> None:
    """Of any release and architecture, at most a KiB less."""
    assert bytes_compiled <= shared_bytes(choice) <= bytes_compiled + 1024


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


def group(
    *times: list[tuple[float, float] | str | None], op: str = "product", size: str = "few", architecture: int = 90
) -> dict[str, Any]:
    """Of problems, each with (microseconds, the default's) by candidate; "..." is an error, None: other bits."""
    tried = candidates(op, architecture, size)
    records = []
    for of_problem in times:
        lines: list[dict[str, Any]] = []
        for choice, found in zip(tried, of_problem, strict=False):
            line: dict[str, Any] = {"choice": list(choice)}
            if isinstance(found, str):
                line["error"] = found
            elif found is None:
                line |= {"held": False, "why": "other bits", "difference": 0.5}
            else:
                line |= {"held": True, "microseconds": found[0], "default_microseconds": found[1]}
            lines.append(line)
        records.append({"problem": f"problem {len(records)}", "candidates": lines})
    return {"op": op, "size": size, "complete": True, "problems": records}


def chosen(record: dict[str, Any]) -> int | None:
    found = choose.winner(record)
    tried = candidates(record["op"], 90, record["size"])
    return None if found is None else tried.index(choice_of(record["op"], found["choice"]))


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


def results(*groups: dict[str, Any], architecture: int = 90) -> dict[str, Any]:
    machine = {"device": "NVIDIA H100 80GB HBM3", "triton": "3.8.0"}
    return {"schema": table.SCHEMA, "measured_on": machine, "architecture": architecture, "groups": list(groups)}


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


@pytest.mark.parametrize("module_of_tables", table.MODULES, ids=lambda found: found.path.parent.name + found.path.stem)
def test_the_shipped_modules_are_what_the_tuner_writes(module_of_tables: table.Module) -> None:
    written = (table.ROOT / module_of_tables.path).read_text()
    assert written == table.text(module_of_tables, table.shipped())


def test_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Winners go in, everything else stays; launch_config takes them; a second time nothing changes."""
    faster, stays = group([(10, 10), (5, 10)]), group([(10, 10), (20, 10)], op="wgrad", size="narrow")
    wgrad = group([(10, 10), (5, 10)], op="wgrad", size="aligned")
    undecided = group([(10, 10), (1, 10)], size="many") | {"complete": False}
    head = group([(10, 10), (5, 10)], op="forward", size="16-bit plain")
    experts = group([(10, 10), (5, 10)], op="grouped_wgrad", size="16-bit few")
    file = saved(tmp_path / "tune.json", results(faster, stays, wgrad, undecided, head, experts))
    paths = [module_of_tables.path for module_of_tables in table.MODULES]
    assert table.apply([file], tmp_path) == paths
    assert table.apply([file, file], tmp_path) == []
    fp8, grouped, linear = (module(tmp_path / path) for path in paths)
    before = table.shipped()
    best = candidates("product", 90, "few")[1]
    assert {**before.entries["product"], (90, "few"): tuple(best)} == fp8.PRODUCT
    assert {**before.entries["wgrad"], (90, "aligned"): candidates("wgrad", 90, "aligned")[1][1:4]} == fp8.WGRAD
    words = "NVIDIA H100 80GB HBM3, Triton 3.8.0, the best of 2"
    keys = {("product", 90, "few"), ("wgrad", 90, "aligned"), ("wgrad", 90, "narrow")}
    assert dict.fromkeys(keys, words) == fp8.MEASURED
    second = candidates("forward", 90, "16-bit plain")[1]
    assert {(90, "16-bit plain"): tuple(second)} == linear.FORWARD
    assert {("forward", 90, "16-bit plain"): words} == linear.MEASURED
    assert {} == linear.DLOGITS == grouped.GROUPED
    assert {(90, "16-bit few"): tuple(candidates("grouped_wgrad", 90, "16-bit few")[1])} == grouped.WGRAD
    monkeypatch.setattr(config, "PRODUCT", fp8.PRODUCT)
    assert config.launch_config(256, 1, 7168, 90)[:5] == best[:5]
    assert config.launch_config(257, 1, 7168, 90)[:5] == before.entries["product"][90, "many"][:5]
    assert table.applied(before, results(faster)).entries != before.entries  # and what it was given is not changed
    assert table.shipped() == before


def test_products_of_fp8_share_the_entries_of_their_family(tmp_path: Path) -> None:
    """Other products do not: an entry is for the architecture that was measured."""
    of_fp8 = group([(10, 10), (5, 10)], op="wgrad", size="narrow", architecture=103)
    head = group([(10, 10), (5, 10)], op="forward", size="16-bit plain", architecture=103)
    found = table.applied(table.shipped(), results(of_fp8, head, architecture=103))
    assert set(found.measured) - set(table.shipped().measured) == {
        ("wgrad", 100, "narrow"), ("forward", 103, "16-bit plain"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (results(group([(10, 10), (5, 10)]), architecture=0), "was not measured on a GPU"),
        (results() | {"schema": 1}, "is not a file of measurements with schema 2"),
        (results(group([(10, 10), (5, 10)]), architecture=89), "is no configuration that this version tries"),
    ],
)
def test_what_is_not_applied(found: dict[str, Any], says: str, tmp_path: Path) -> None:
    target = tmp_path / "written"
    with pytest.raises(ValueError, match=says):
        table.apply([saved(tmp_path / "tune.json", found)], target)
    assert not target.exists()


def test_what_is_no_json_is_not_applied(tmp_path: Path) -> None:
    (tmp_path / "tune.json").write_text('{"schema": 2')
    with pytest.raises(ValueError, match="is not JSON"):
        table.apply([tmp_path / "tune.json"], tmp_path)
