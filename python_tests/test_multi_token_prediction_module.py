"""MultiTokenPrediction: the equations on each document in float64, what is trained, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grpo_kernels import MultiTokenPrediction
from grpo_kernels.multi_token_prediction.module import MTPLayer
from grpo_kernels.testing import assert_as_accurate
from python_tests.mtp_models import LAYOUTS, Block, H, Layout, V, build, document_by_document, layout

Forward = Callable[[Tensor, Tensor], Any]


def _inputs(where: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids and a table of embeddings."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(*where.shape, H, generator=generator, dtype=torch.float64)
    return hidden, torch.randint(V, where.shape, generator=generator), torch.randn(V, H, generator=generator).double()


def _call(mtp: MultiTokenPrediction, where: Layout, shift: int, **options: Any) -> tuple[Tensor, ...]:
    hidden, ids, table = _inputs(where)
    options = {"block_options": where.block_options(), **where.options, **options}
    outputs: tuple[Tensor, ...] = mtp(hidden, ids, lambda tokens: table[tokens], shift=shift, **options)
    return outputs


def _gradients(mtp: MultiTokenPrediction, total: Tensor, *inputs: Tensor) -> list[Tensor]:
    wanted = [*inputs, *mtp.parameters()]
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return [torch.zeros_like(of) if grad is None else grad for of, grad in zip(wanted, found, strict=True)]


def _largest_difference(mtp: MultiTokenPrediction, where: Layout, shift: int, **options: Any) -> float:
    """Between the module and the loop over documents: values of rows that have a token, gradients of all there is."""
    hidden, ids, table = (t.requires_grad_() if t.is_floating_point() else t for t in _inputs(where))
    options = {"block_options": where.block_options(), **where.options, **options}
    actual = mtp(hidden, ids, lambda tokens: table[tokens], shift=shift, **options)
    expected = document_by_document(mtp, hidden, ids, table, where, shift)
    generator = torch.Generator().manual_seed(3)
    worst, totals = 0.0, [torch.zeros((), dtype=torch.float64)] * 2
    for states, by_row in zip(actual, expected, strict=True):
        assert states.shape == hidden.shape
        for row, wanted in by_row.items():
            found = states.reshape(-1, H)[row]
            worst = max(worst, (found - wanted).abs().max().item())
            upstream = torch.randn(H, generator=generator, dtype=torch.float64)
            totals = [totals[0] + found @ upstream, totals[1] + wanted @ upstream]
    assert sum(map(len, expected)) > 0
    if totals[0].requires_grad:
        pairs = zip(*(_gradients(mtp, total, hidden, table) for total in totals), strict=True)
        worst = max(worst, *((a - b).abs().max().item() for a, b in pairs))
    return worst


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shift", [0, 1])
def test_values_and_gradients_of_every_layout(name: str, shift: int) -> None:
    assert _largest_difference(build(3), layout(name), shift) < 1e-12


@pytest.mark.parametrize(
    ("depths", "options"),
    [
        (1, {}),
        (1, {"order": "hidden_first"}),
        (2, {"final_norm": True}),
        (2, {"shared": True, "order": "hidden_first"}),
        (3, {"shared": True, "final_norm": True}),
    ],
    ids=str,
)
def test_values_and_gradients_of_every_option(depths: int, options: dict[str, Any]) -> None:
    assert _largest_difference(build(depths, **options), layout("packed"), 1) < 1e-12


def test_planted_faults_are_found() -> None:
    """What implementations get wrong, each far beyond the tolerance above."""
    packed, padded = layout("packed"), layout("left")
    rolled = {**packed.block_options(), "position_ids": packed.position_ids.roll(-1)}
    assert _largest_difference(build(2), packed, 1, block_options=rolled) > 1e-3
    leaking = {**packed.block_options(), "visible": torch.ones(17, 17).tril().bool()}
    assert _largest_difference(build(2), packed, 1, block_options=leaking) > 1e-3  # the document before is seen
    assert _largest_difference(build(2), packed, 1, cu_seqlens=(packed.options["cu_seqlens"] - 1).clamp(min=0)) > 1e-3
    assert _largest_difference(build(2), packed._replace(options={"positions": packed.position_ids.roll(1)}), 1) > 1e-3
    everything = {**padded.block_options(), "visible": torch.ones(6, 6).tril().bool()}
    assert _largest_difference(build(2), padded, 1, block_options=everything) > 1e-3  # padding is seen
    mtp = build(2)
    hidden, ids, table = _inputs(packed)
    expected = document_by_document(mtp, hidden, ids, table, packed, 1)
    for layer in mtp.layers:
        layer.order = "hidden_first"  # type: ignore[assignment]
    swapped = _call(mtp, packed, 1)[0]
    assert max((swapped[row] - state).abs().max().item() for row, state in expected[0].items()) > 1e-3


def test_the_final_norm_is_of_what_the_head_gets() -> None:
    """The next depth takes the states as they are."""
    where = layout("batch")
    plain, normed = build(2), build(2, final_norm=True)
    normed.load_state_dict(plain.state_dict(), strict=False)
    assert isinstance(normed.final_norm, nn.RMSNorm)
    for bare, head in zip(_call(plain, where, 1), _call(normed, where, 1), strict=True):
        assert torch.equal(head, normed.final_norm(bare))


def test_rows_without_a_token_have_a_zero_embedding() -> None:
    """Also where the id is negative; and no gradient goes to the table from them, not even 0 * NaN."""
    mtp = MultiTokenPrediction(H, [nn.Identity()], dtype=torch.float64)
    hidden = torch.randn(2, 3, H, dtype=torch.float64)
    ids = torch.tensor([[0, 5, -100], [7, 7, 7]])
    table = torch.randn(V, H, dtype=torch.float64)
    table[0] = float("nan")
    table.requires_grad_()
    (found,) = mtp(hidden, ids, lambda tokens: table[tokens])
    bare = mtp.layers[0](hidden, torch.zeros_like(hidden))
    assert torch.equal(found[[0, 0, 1], [1, 2, 2]], bare[[0, 0, 1], [1, 2, 2]])
    upstream = torch.ones_like(found)
    upstream[0, 1] = float("nan")
    (grad,) = torch.autograd.grad(found, table, upstream)
    assert grad[[5, 7]].abs().min() > 0
    assert torch.equal(grad[torch.arange(V)[(torch.arange(V) != 5) & (torch.arange(V) != 7)]], torch.zeros(V - 2, H))


@pytest.mark.parametrize("detach", ["none", "trunk", "frozen"])
def test_what_is_trained(detach: str) -> None:
    where = layout("packed")
    results = []
    for mode in ("none", detach):
        mtp = build(2, detach=mode, final_norm=True)
        hidden, ids, table = (t.requires_grad_() if t.is_floating_point() else t for t in _inputs(where))
        outputs = mtp(
            hidden, ids, lambda t, table=table: table[t], block_options=where.block_options(), **where.options
        )
        results.append((mtp, hidden, table, outputs))
    (_, _, _, expected), (mtp, hidden, table, outputs) = results
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert [output.requires_grad for output in outputs] == [detach != "frozen"] * 2
    if detach == "frozen":
        return
    full = _gradients(results[0][0], sum(output.square().sum() for output in expected), *results[0][1:3])
    found = _gradients(mtp, sum(output.square().sum() for output in outputs), hidden, table)
    assert all(grad.abs().max() > 0 for grad in full)
    if detach == "trunk":
        assert found[0].abs().max() == found[1].abs().max() == 0
        full, found = full[2:], found[2:]
    assert all(torch.equal(a, b) for a, b in zip(found, full, strict=True))


def _half_products(dtype: torch.dtype) -> tuple[MTPLayer, Tensor, Tensor, Tensor]:
    layer = MTPLayer(64, nn.Identity(), dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    return layer, *(torch.randn(40, 64, generator=generator).to(dtype) for _ in range(3))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_halves_are_as_exact_as_the_concatenation(dtype: torch.dtype) -> None:
    """Values and gradients within the budget of products of matrices, against the product with [n_e ; n_h]."""
    layer, embeds, hidden, upstream = _half_products(dtype)

    def concatenated(wide: torch.dtype) -> list[Tensor]:
        inputs = [t.detach().to(wide).requires_grad_() for t in (embeds, hidden, layer.eh_proj.weight)]
        output = torch.cat(inputs[:2], dim=-1) @ inputs[2].T
        return [output, *torch.autograd.grad(output, inputs, upstream.to(wide))]

    inputs = [embeds.requires_grad_(), hidden.requires_grad_(), layer.eh_proj.weight]
    output = layer._project(embeds, hidden)
    found = [output, *torch.autograd.grad(output, inputs, upstream)]
    names = ("x", "embeds", "hidden", "weight")
    for name, *of in zip(names, found, concatenated(torch.float64), concatenated(torch.float32), strict=True):
        assert of[0].dtype == dtype
        assert_as_accurate(*of, name=name)


def test_names_are_those_of_checkpoints() -> None:
    mtp = build(2, final_norm=True)
    own = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "block.qkv", "block.out")
    assert sorted(mtp.state_dict()) == sorted(["final_norm.weight", *(f"layers.{k}.{n}" for k in (0, 1) for n in own)])
    assert mtp.layers[0].eh_proj.weight.shape == (H, 2 * H)
    shared = build(3, shared=True)
    assert len({id(layer.block) for layer in shared.layers}) == 1
    assert len(list(shared.parameters())) == 3 * 3 + 2


def test_from_meta_and_back_to_the_first_parameters() -> None:
    mtp = MultiTokenPrediction(H, [Block()], device="meta", dtype=torch.float32)
    assert mtp.layers[0].eh_proj.weight.is_meta
    mtp = mtp.to_empty(device="cpu")
    for parameter in mtp.parameters():
        nn.init.constant_(parameter, 7.0)
    mtp.reset_parameters()
    layer = mtp.layers[0]
    assert torch.equal(layer.enorm.weight, torch.ones(H))
    assert torch.equal(layer.hnorm.weight, torch.ones(H))
    assert 0 < layer.eh_proj.weight.abs().max() <= (2 * H) ** -0.5
    assert torch.equal(layer.block.qkv, torch.full_like(layer.block.qkv, 7.0))
    assert "order='emb_first'" in repr(mtp)
    assert "detach='none'" in repr(mtp)


def test_copies_are_apart() -> None:
    mtp, where = build(2), layout("batch")
    expected = _call(mtp, where, 1)
    copied = copy.deepcopy(mtp)
    with torch.no_grad():
        for parameter in mtp.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(_call(copied, where, 1), expected, strict=True))


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **options: Tensor) -> Any:
        return checkpoint(self.block, x, use_reentrant=False, **options)


def test_checkpointed_blocks() -> None:
    where = layout("packed")
    plain, saved = build(2), build(2)
    for layer in saved.layers:
        layer.block = Checkpointed(layer.block)  # type: ignore[arg-type]
    totals = [sum(output.square().sum() for output in _call(mtp, where, 1)) for mtp in (plain, saved)]
    gradients = [
        torch.autograd.grad(total, list(mtp.parameters())) for total, mtp in zip(totals, (plain, saved), strict=True)
    ]  # type: ignore[call-overload]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_autocast_and_mixed_dtypes() -> None:
    """Products as autocast has them; without it, in the wider dtype of states and weight."""
    mtp = MultiTokenPrediction(H, [nn.Identity()])
    hidden, ids, table = torch.randn(2, 5, H), torch.arange(10).view(2, 5), torch.randn(V, H)
    exact = mtp(hidden, ids, lambda t: table[t])[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = mtp(hidden, ids, lambda t: table[t])[0]
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)
    table = table.bfloat16()
    narrow = mtp.bfloat16()(hidden.bfloat16(), ids, lambda t: table[t])[0]
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), exact, rtol=0.05, atol=0.05)
    layer = mtp.layers[0]
    assert layer._project(hidden, hidden).dtype == torch.float32  # type: ignore[operator]


def test_compiled_as_eager() -> None:
    """Whole graphs; one for all lengths of a layout and its positions."""
    mtp = MultiTokenPrediction(H, [nn.Linear(H, H), nn.Linear(H, H)], final_norm=nn.RMSNorm(H), detach="trunk")
    table = nn.Embedding(V, H)
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(mtp, fullgraph=True, backend=counting)
    for length in range(3, 9):
        hidden, ids = torch.randn(2, length, H), torch.arange(2 * length).view(2, length) % V
        for options in ({}, {"positions": torch.arange(length).expand(2, length)}):
            for a, b in zip(compiled(hidden, ids, table, **options), mtp(hidden, ids, table, **options), strict=True):
                assert torch.equal(a, b)
    assert len(graphs) <= 4
    torch._dynamo.reset()


def test_block_options_may_have_any_name() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, hidden: Tensor, embeds: float) -> Tensor:
            return x + hidden * embeds

    mtp, table = MultiTokenPrediction(H, [Named()]), nn.Embedding(V, H)
    hidden, added, ids = torch.randn(4, H), torch.randn(4, H), torch.arange(4)
    bare = MultiTokenPrediction(H, [nn.Identity()])
    bare.layers[0].load_state_dict(mtp.layers[0].state_dict())
    (actual,) = mtp(hidden, ids, table, block_options={"hidden": added, "embeds": 3.0})
    assert torch.equal(actual, bare(hidden, ids, table)[0] + added * 3.0)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)], ids=str)
def test_no_rows(shape: tuple[int, ...]) -> None:
    mtp, table = MultiTokenPrediction(H, [nn.Identity(), nn.Linear(H, H)]), nn.Embedding(V, H)
    hidden = torch.empty(*shape, H, requires_grad=True)
    results = mtp(hidden, torch.empty(shape, dtype=torch.int64), table)
    assert [result.shape for result in results] == [hidden.shape] * 2
    leaves = [hidden, *table.parameters(), *mtp.parameters()]
    gradients = torch.autograd.grad(sum(result.sum() for result in results), leaves)
    assert gradients[0].shape == hidden.shape
    assert not any(gradient.any() for gradient in gradients)


def test_a_shift_beyond_all_integers() -> None:
    mtp, table = MultiTokenPrediction(H, [nn.Identity()]), nn.Embedding(V, H)
    hidden, ids = torch.randn(4, H), torch.arange(4)
    with torch.no_grad():
        assert torch.equal(mtp(hidden, ids, table, shift=2**70)[0], mtp(hidden, ids, table, shift=4)[0])
