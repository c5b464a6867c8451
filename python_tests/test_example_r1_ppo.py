"""PPO beside GRPO in the training example: what is counted is what is alive."""

from __future__ import annotations

import copy
import gc
import io
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from examples.r1.measuring import ppo_memory
from examples.r1.measuring.allocations import live_bytes, peak_bytes
from examples.r1.measuring.model_states import PRECISIONS, ModelStates, Row
from examples.r1.measuring.ppo_step import METHODS
from examples.r1.parallel import Ranks
from examples.r1.run import Run
from python_tests.r1_stages import CPU, one_thread, tiny_run

__all__ = ["one_thread"]

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"layers": 1},
    "moe": {"layers": 1, "model": "moe", "mtp": 1, "recipe": "bf16", "preset": "dapo"},
}
TRAINED = {"float32": (4, 4, 0, 8), "mixed precision": (2, 2, 4, 8)}  # bytes a parameter, of each kind
FROZEN = {"float32": (4, 0, 0, 0), "mixed precision": (2, 0, 0, 0)}


@pytest.fixture(scope="module")
def states() -> dict[str, ModelStates]:
    return {name: ppo_memory.compare(tiny_run(**options)) for name, options in MODELS.items()}


# counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_parameter_costs_what_its_precision_says(
    states: dict[str, ModelStates], model: str, precision: str
) -> None:
    run = tiny_run(**MODELS[model])
    policy = run.build_policy()
    plain = copy.deepcopy(policy)
    plain.mtp = None
    head, value = policy.head.weight.numel(), policy.config.width
    sizes = {
        "policy": _size(policy),
        "critic": _size(plain) - head + value,
        "reference": _size(plain),
        "reward model": _size(run.build_judge()),
    }
    for method, parts in (("ppo", sizes.keys()), ("grpo", sizes.keys() - {"critic"})):
        rows = states[model].of(precision, method)
        assert rows.keys() == parts
        for name, row in rows.items():
            trained = name in ("policy", "critic")
            kinds = (TRAINED if trained else FROZEN)[precision]
            found = (row.weights, row.gradients, row.master_weights, row.moments)
            assert row.parameters == sizes[name]
            assert found == tuple(row.parameters * kind for kind in kinds)
    # Adam's counter for each parameter, and in each MoE layer of the policy a float32 bias for each expert.
    biases = 4 * run.settings.experts * len(policy.moe_layers)
    assert states[model].of(precision, "ppo")["policy"].rest == 4 * len(list(policy.parameters())) + biases
    assert states[model].of(precision, "grpo")["reference"].rest == biases


def _size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("model", MODELS)
def test_the_allocator_has_handed_out_what_was_counted(states: dict[str, ModelStates], model: str) -> None:
    found = states[model].allocations
    assert [(one.precision, one.method) for one in found] == [(p, m) for p in PRECISIONS for m in METHODS]
    for one in found:
        rows = states[model].of(one.precision, one.method).values()
        assert one.allocated == one.counted == sum(row.total for row in rows) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_the_allocator_of_a_gpu_has_handed_out_what_was_counted_in_blocks_of_512_bytes(method: str, model: str) -> None:
    device = torch.device("cuda")
    run = replace(tiny_run(**MODELS[model]), device=device, ranks=Ranks.single(device))
    METHODS[method](run, True)  # what libraries keep from their first use on
    parts, allocated = live_bytes(partial(METHODS[method], run, True), device)
    tensors = [tensor for part in parts.values() for kind in ppo_memory.states(part).values() for tensor in kind]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor.is_cuda}
    assert allocated == sum(-(-storage.nbytes() // 512) * 512 for storage in storages.values()) > 0


@pytest.mark.parametrize(("method", "mixed"), [("ppo", True), ("grpo", False)])
def test_a_census_of_live_storages_finds_what_was_counted(method: str, mixed: bool) -> None:
    """The copies of weights in FP8 that a pass keeps are gone after the optimiser's step."""
    run = tiny_run(**{**MODELS["moe"], "recipe": "fp8_block128"})
    METHODS[method](run, mixed)  # what libraries keep from their first use on
    before = _alive()
    parts = METHODS[method](run, mixed)
    after = _alive()
    born = {pointer: size for pointer, size in after.items() if pointer not in before}
    seen = set[int]()
    counted = sum(ppo_memory.count(kind, seen) for part in parts.values() for kind in ppo_memory.states(part).values())
    assert born.keys() == seen
    assert sum(born.values()) == counted > 0


def _alive() -> dict[int, int]:
    """Bytes of every storage that a tensor of this process refers to."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    tensors += [found.grad for found in tensors if found.is_leaf and found.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if _has_memory(storage)}


def _has_memory(storage: torch.UntypedStorage) -> bool:
    """Of what torch.compile leaves behind nobody may even ask."""
    try:
        return storage.nbytes() > 0 and storage.data_ptr() != 0
    except RuntimeError:
        return False


def test_a_storage_counts_once_and_whole() -> None:
    whole, seen = torch.zeros(1000), set[int]()
    assert ppo_memory.count((whole[:10], whole.view(10, 100), whole), seen) == 4000
    assert ppo_memory.count((whole,), seen) == 0
    assert ppo_memory.count((torch.zeros(0), torch.zeros(3, dtype=torch.bfloat16)), seen) == 6


def test_allocations_are_those_that_stay_and_those_of_the_peak() -> None:
    dropped = [torch.zeros(500)]

    def work() -> Tensor:
        _ = torch.zeros(3000) + 1.0
        dropped.clear()
        return torch.zeros(1000)

    kept, live = live_bytes(work, CPU)
    assert (len(kept), live) == (1000, 4000)  # the release of what was there before is not counted
    assert peak_bytes(lambda: torch.zeros(3000).exp(), CPU) == 2 * 12000


def test_a_release_is_not_counted_with_the_size_that_its_address_had_before() -> None:
    seen, size = live_bytes(lambda: [torch.zeros(500) for _ in range(100)], CPU)
    addresses = {tensor.data_ptr() for tensor in seen}
    seen.clear()  # where no profiler looks on: the sizes stay in its table
    others = [torch.zeros(500) for _ in range(1000)]
    again = [tensor for tensor in others if tensor.data_ptr() in addresses]
    others.clear()
    assert size == 100 * 2000
    assert again

    def work() -> Tensor:
        again.clear()
        return torch.zeros(1000)

    kept, live = live_bytes(work, CPU)
    assert (len(kept), live) == (1000, 4000)


def test_savings_are_sums_of_the_rows_that_each_method_holds() -> None:
    def row(precision: str, method: str, part: str, weights: int) -> Row:
        return Row(precision, method, part, 1, weights, 0, 0, 0, 0)

    # The arithmetic of large models, bytes a parameter: 36 against 20 and 18 in mixed precision.
    rows = tuple(
        row(precision, method, part, size)
        for precision, sizes in zip(PRECISIONS, ((16, 16, 4, 4), (16, 16, 2, 2)), strict=True)
        for method in METHODS
        for part, size in zip(("policy", "critic", "reference", "reward model"), sizes, strict=True)
        if (method, part) != ("grpo", "critic")
    )
    found = [(saving.ppo, saving.grpo) for saving in ModelStates("", "cpu", rows, ()).savings()]
    assert found == [(36, 20), (40, 24), (40, 20), (34, 18), (36, 20), (36, 18)]
    assert ModelStates("", "cpu", rows, ()).savings()[-1].share == 0.5


# what it shows ---------------------------------------------------------------------------------------------------


def test_figures_come_back_from_json(states: dict[str, ModelStates]) -> None:
    content = json.loads(json.dumps(states["moe"].as_json()))
    assert ModelStates.from_json(content) == states["moe"]
    assert [saving["share"] for saving in content["savings"]] == [one.share for one in states["moe"].savings()]


def test_the_table_and_the_facts_say_what_was_measured(states: dict[str, ModelStates]) -> None:
    console = Console(file=io.StringIO(), width=80)
    ppo_memory.show(states["moe"], console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "moe, width 16, 1 layer, 4 experts, 1 layer of drafts" in text
    assert "…" not in text
    assert "2+2+4+8" in text
    assert "The allocator (cpu) has handed out the same bytes." in text
    savings = states["moe"].savings()
    assert all(f"{saving.share:.1%}" in text for saving in savings)
    words = " ".join(text.split())
    assert f"Measured here: {savings[0].share:.1%} as the example trains" in words
    assert f"{savings[-1].share:.1%} in mixed precision if PPO holds a reward model" in words
    assert '"about 50 %"' in words
    assert "No published paper gives a figure" in words


def test_it_runs_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "ppo.json"
    options = ["--width", "16", "--heads", "2", "--layers", "1", "--mtp", "1", "--threads", "1", "--save", str(saved)]
    monkeypatch.setattr(sys, "argv", ["ppo_memory", *options])
    monkeypatch.setattr(Run, "prepare", lambda settings: replace(tiny_run(), settings=settings))
    assert ppo_memory.main() == 0
    assert "dense, width 16, 1 layer, 1 layer of drafts" in capsys.readouterr().out
    content = json.loads(saved.read_text(encoding="utf-8"))
    assert content["machine"]["torch"] == torch.__version__
    assert ModelStates.from_json(content).model == "dense, width 16, 1 layer, 1 layer of drafts"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", "30", "--heads", "4"], "width"),
        (["--recipe", "fp8_block128"], "recipe"),
        (["--model", "sparse"], "invalid choice: 'sparse'"),
    ],
)
def test_wrong_options_are_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        ppo_memory.parse_arguments(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
