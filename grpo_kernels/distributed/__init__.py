"""Ops over several ranks: the vocabulary in parts, experts in parts."""

from grpo_kernels.distributed.exchange import Dispatched, ExpertExchange
from grpo_kernels.distributed.experts import ExpertParallel
from grpo_kernels.distributed.vocab import VocabShard

__all__ = ["Dispatched", "ExpertExchange", "ExpertParallel", "VocabShard"]
