"""Compiles the kernels of the floors for sm_90, reads their machine code, and writes bench/results/floors.json."""

from __future__ import annotations

import argparse
import sys

from bench.floors import reading, record, table
from bench.gates import cuda_kernels, triton_kernels


def main() -> int:
    floors = record.floors()
    parser = argparse.ArgumentParser(prog="python -m bench.floors", description=__doc__)
    parser.add_argument("--op", action="append", choices=list(floors), help="only this op; may be repeated")
    arguments = parser.parse_args()
    if problem := triton_kernels.problem() or cuda_kernels.problem():
        parser.error(problem)
    rows = []
    for op in arguments.op or floors:
        rows += [reading.read_triton(op, floor) for floor in floors[op] if floor.language == "Triton"]
        rows += reading.read_cuda(op, [floor for floor in floors[op] if floor.language != "Triton"])
    read = {row["op"] for row in rows}
    kept = [row for row in record.load() if row["op"] not in read and row["op"] in floors]
    record.save([*kept, *rows])
    table.shown(rows).show()
    print(f"written: {record.PATH}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
