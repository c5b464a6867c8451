"""How a GPU deals out the tiles of FP8 products: the rules of the host, and a model of what the device does."""

from __future__ import annotations

import inspect
from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_kernels.grouped_gemm._fp8_config_triton import FEW_ROWS, launch_config, row_blocks, row_tiles, wgrad_config
from grpo_kernels.grouped_gemm._fp8_table_triton import PRODUCT, WGRAD
from python_tests.fp8_products import position, tile_list, walks

_SIZES = st.lists(st.sampled_from([0, 0, 1, 63, 64, 65, 127, 128, 129, 300]), min_size=1, max_size=12)


@given(
    sizes=_SIZES, behind=st.sampled_from([0, 1, 128, 200]), block_m=st.sampled_from([64, 128]), faults=st.integers(0, 3)
)
def test_every_row_is_in_one_tile(sizes: list[int], behind: int, block_m: int, faults: int) -> None:
    """Of its expert, or of none, also where offsets make no sense; and no more tiles than the table has room for."""
    offsets = torch.tensor(sizes).cumsum(0)
    rows = int(offsets[-1]) + behind
    if faults and rows:
        offsets[faults % len(sizes)] = [-5, 2**40, 0][faults - 1]
    ends = offsets.clamp(0, rows).cummax(0).values
    listed = tile_list(offsets.tolist(), rows, block_m)
    assert len(listed) <= row_tiles(rows, len(sizes), block_m)
    owners = [expert for expert, first, end in listed for _ in range(first, end)]
    assert [row for _, first, end in listed for row in range(first, end)] == list(range(rows))
    wanted = torch.bucketize(torch.arange(rows), ends, right=True)
    assert owners == torch.where(wanted < len(sizes), wanted, -1).tolist()
    assert all(0 < end - first <= block_m for _, first, end in listed)


@given(
    row_blocks=st.integers(0, 40), columns=st.integers(1, 20), group=st.integers(1, 50), programs=st.integers(1, 150)
)  # fmt: skip
def test_every_tile_is_formed_once(row_blocks: int, columns: int, group: int, programs: int) -> None:
    """And no program has two tiles more than another."""
    done = walks(row_blocks, columns, group, programs)
    counts = Counter(place for walk in done for place in walk)
    assert counts == {(row, column): 1 for row in range(row_blocks) for column in range(columns)}
    lengths = {len(walk) for walk in done}
    assert max(lengths) - min(lengths) <= 1


def test_neighbours_share_a_weight() -> None:
    """A group of row blocks goes through the columns before the next one does."""
    assert [position(item, 5, 2, 3) for item in range(10)] == [
        (0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (4, 0), (3, 1), (4, 1),
    ]  # fmt: skip


def test_launch_config_follows_from_what_the_host_knows() -> None:
    assert list(inspect.signature(launch_config).parameters) == ["rows", "experts", "width", "architecture"]
    many, few = 8 * FEW_ROWS + 1, 8 * FEW_ROWS
    for architecture, entries in ((89, 89), (90, 90), (100, 100), (103, 100), (120, 89)):
        assert launch_config(many, 8, 7168, architecture)[:5] == PRODUCT[entries, "many"][:5]
        assert launch_config(few, 8, 7168, architecture)[:5] == PRODUCT[entries, "few"][:5]
        for rows in (1, few, many, 1 << 20):
            config = launch_config(rows, 8, 7168, architecture)
            stages = (config.block_m + 128) * 128 * config.num_stages * config.on_each
            assert stages <= (227 if entries >= 90 else 99) * 1024
            assert config.num_warps == 4 or not config.specialized  # with eight Triton ignores it without a word
            assert entries == 90 or not config.specialized
    assert 1 <= launch_config(10, 1, 10**8, 90).group <= 1024
    assert [row_blocks(mib, 128, 7168) for mib in (0, 1, 16, 10**6)] == [1, 1, 18, 1024]
    assert [row_tiles(*of, 128) for of in ((0, 8), (1, 8), (129, 8), (1024, 8))] == [0, 2, 11, 17]


def test_wgrad_config() -> None:
    for architecture, entries in ((90, 90), (100, 100), (110, 100)):
        for narrow, rows in ((False, "aligned"), (True, "narrow")):
            config = wgrad_config(architecture, narrow)
            assert (config.block_m, *config[1:4]) == (128, *WGRAD[entries, rows])
            assert config.num_warps == (4 if config.specialized else 8)
            assert 256 * 128 * config.num_stages <= 227 * 1024
            assert not (config.specialized and (narrow or architecture != 90))
