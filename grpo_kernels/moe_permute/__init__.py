"""From tokens to the rows of their experts and back: the map, the moves, and the weighted sum."""

from grpo_kernels.moe_permute.api import Permutation, build_permutation, moe_permute, moe_unpermute
from grpo_kernels.moe_permute.quantize import moe_permute_quantize

__all__ = ["Permutation", "build_permutation", "moe_permute", "moe_permute_quantize", "moe_unpermute"]
