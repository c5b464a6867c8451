"""What is wrong with maps that do not belong together, in words. Looks at the data: on the CPU alone."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels._checks import position


def readable(tensor: Tensor) -> bool:
    """Whether looking at the data costs no synchronisation and compiles into no graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_rows(op: str, row_id_map: Tensor, rows: int) -> None:
    """Raises ValueError on the first slot whose row is not below `rows`."""
    _raise_first(op, "permutation.row_id_map", row_id_map, row_id_map >= rows, f"< R = {rows}, or negative for no row")


def check_slots(op: str, inv_map: Tensor, slots: int, name: str = "permutation.inv_map") -> None:
    """Raises ValueError on the first row whose slot is not below `slots`."""
    _raise_first(op, name, inv_map, inv_map >= slots, f"< T * K = {slots}, or negative for padding")


def check_maps(op: str, row_id_map: Tensor, inv_map: Tensor) -> None:
    """Raises ValueError where a row's slot, or a slot's row, is not there or does not name it in turn."""
    check_rows(op, row_id_map, inv_map.shape[0])
    check_slots(op, inv_map, row_id_map.numel())
    rows = row_id_map.reshape(-1)
    for name, given, inverse, wanted in (
        ("row_id_map", row_id_map, inv_map, "negative, or the row whose entry in inv_map is {}"),
        ("inv_map", inv_map, rows, "negative, or the slot whose entry in row_id_map is {}"),
    ):
        flat = given.reshape(-1)
        live = (flat >= 0).nonzero()[:, 0]
        wrong = torch.zeros_like(flat, dtype=torch.bool)
        wrong[live] = inverse[flat[live]] != live
        place = int(wrong.to(torch.uint8).argmax()) if flat.numel() else 0
        _raise_first(op, f"permutation.{name}", given, wrong, wanted.format(place))


def _raise_first(op: str, name: str, given: Tensor, wrong: Tensor, wanted: str) -> None:
    wrong = wrong.reshape(-1)
    if not wrong.any():
        return
    place = int(wrong.to(torch.uint8).argmax())
    where, value = position(name, given.shape, place), given.reshape(-1)[place].item()
    raise ValueError(f"{op}: {where} must be {wanted}, got {value}")
