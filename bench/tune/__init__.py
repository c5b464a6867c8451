"""Configurations of Triton kernels, found by measuring on a GPU and written into tables of the package.

    python -m bench.tune --save tune.json      # measures on this machine's GPU, the most valuable classes first
    python -m bench.tune --op linear_log_probs --save tune.json
    python -m bench.tune --apply tune.json     # rewrites the tables; git shows how
    python -m bench.tune --compile 90          # compiles every candidate for an architecture, without a GPU

The kernels take their configurations from tables of data (grpo_kernels/*/_*table_triton.py), and where those have no
entry from heuristics: nothing is tuned while a model trains. A measurement changes no table; `--apply` is a step of its
own, after which the gates (`make gates`) and the tests have to pass as after any other change of a kernel.

Candidates are what fits by registers and shared memory. Before one is timed its result is looked at: most must give
the default's bits, the log-probs of a linear head must be exact and not depend on the number of rows (docs/tuning.md).
Every class is measured in a process with a watchdog: a candidate that hangs or crashes is written down as that, and the
others go on in a new process.

The exit status is 0 if every class was measured, 1 if a default fails, 75 if there was no time for everything, 77 if
this GPU has nothing to tune. The last line of the output begins with "tuned".
"""
