"""Configurations of Triton kernels, found by measuring on a GPU and written into tables of the package.

    python -m bench.tune --op grouped_gemm --save tune.json   # measures on this machine's GPU, about two minutes
    python -m bench.tune --apply tune.json                    # rewrites the tables; git shows how

The kernels take their configurations from tables of data (grpo_kernels/grouped_gemm/_fp8_table_triton.py): nothing is
tuned while a model trains. A measurement changes no table; `--apply` is a step of its own, after which the gates
(`make gates`) and the tests have to pass as after any other change of a kernel.

Candidates are what fits by registers and shared memory. Each must give the default's bits before it is timed, since a
row's bits must not depend on how many rows there are. Every class of sizes is measured in a process with a watchdog: a
candidate that hangs or crashes is written down as that, and the others go on in a new process.

The exit status is 0 if every class was measured, 1 if a default fails, 75 if there was no time for everything, 77 if
this GPU has nothing to tune. The last line of the output begins with "tuned".
"""
