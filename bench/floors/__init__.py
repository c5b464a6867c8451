"""Floors: for every GPU kernel what it must move and compute, and what its machine code makes of that.

    python -m bench.floors [--op NAME]

`ops/<op>.py` holds the data: a reference shape, formulas, and where in a kernel its main work stands. The command
compiles the kernels for sm_90 as they ship, counts the instructions of that part by the unit that executes them, and
writes bench/results/floors.json, from which docs/kernels.md is made.
"""
