"""Random problems for the kernels of FP8, each result against the definition in float64, or bit for bit.

    python -m python_tests.gpu.fuzz --op glu [--seconds 10] [--device cuda]

A process of its own: a kernel whose groups of warps wait for each other for ever cannot be interrupted. Every problem
is named before it runs.
"""
