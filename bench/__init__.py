"""Benchmarks of every op against eager PyTorch, torch.compile and peers.

`python -m bench` runs them; docs/benchmarks.md says how to read the numbers.
"""
