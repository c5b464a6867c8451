"""Ops over several ranks: the vocabulary in parts."""

from grpo_kernels.distributed.vocab import VocabShard

__all__ = ["VocabShard"]
