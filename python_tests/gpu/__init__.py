"""Tests on a CUDA device, through the public functions.

Each also runs on the CPU, so that the tests themselves are known to work; what only CUDA has (graphs, streams,
synchronisation) is then left out.
"""
