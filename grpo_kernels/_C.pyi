"""The compiled module. Addresses are integers, 0 for an absent tensor.

Every kernel function ends with (device, stream_or_threads): -1 and a number of threads for the CPU, or a CUDA ordinal
and a stream. It returns -1, or the first row with a fault that only the data shows. csrc/<op>/<op>.h explains the rest.
"""

from collections.abc import Sequence

cuda_version: str | None
cuda_archs: str
openmp: bool

def cpu_isa() -> str: ...
def cuda_device_problem(device: int, /) -> str: ...
def group_advantages(
    rewards: int,
    dtype: int,
    batch: int,
    functions: int,
    group_size: int,
    order: int,
    sorted_ids: int,
    weights: int,
    baseline: int,
    normalize_by: int,
    aggregation: int,
    singleton: int,
    correction: int,
    eps: float,
    scratch: int,
    advantages: int,
    mean: int,
    std: int,
    device: int,
    stream_or_threads: int,
    /,
) -> int: ...
def informative_groups(
    rewards: int,
    dtype: int,
    batch: int,
    group_size: int,
    order: int,
    sorted_ids: int,
    mask: int,
    tolerance: float,
    informative: int,
    device: int,
    stream_or_threads: int,
    /,
) -> int: ...
def group_rank(
    scores: int,
    dtype: int,
    batch: int,
    group_size: int,
    order: int,
    sorted_ids: int,
    valid: int,
    rank: int,
    device: int,
    stream_or_threads: int,
    /,
) -> int: ...
def token_log_probs(
    rows: int,
    inner: int,
    outer_stride: int,
    inner_stride: int,
    vocab: int,
    dtype: int,
    token_ids: int,
    wide_ids: bool,
    mask: int,
    temperatures: int,
    temperature_per_row: bool,
    temperature: float,
    logit_scale: float,
    softcap: float,
    logits: int,
    log_probs: int,
    entropy: int,
    sum_squared_probs: int,
    top1_ids: int,
    statistics: int,
    device: int,
    stream_or_threads: int,
    /,
) -> int: ...
def token_log_probs_backward(
    rows: int,
    inner: int,
    outer_stride: int,
    inner_stride: int,
    vocab: int,
    dtype: int,
    token_ids: int,
    wide_ids: bool,
    mask: int,
    temperatures: int,
    temperature_per_row: bool,
    temperature: float,
    logit_scale: float,
    softcap: float,
    logits: int,
    statistics: int,
    grad_log_probs: int,
    grad_entropy: int,
    grad_logits: int,
    grad_outer_stride: int,
    grad_inner_stride: int,
    device: int,
    stream_or_threads: int,
    /,
) -> int: ...
def grpo_loss_sizes(batch: int, tokens: int, packed: bool, /) -> tuple[int, int]: ...
def grpo_loss(
    batch: int,
    tokens: int,
    cu_seqlens: int,
    wide_cu_seqlens: bool,
    dtype: int,
    mask_bytes: int,
    tensors: Sequence[tuple[int, int, int]],
    numbers: Sequence[tuple[int, float]],
    max_length: int,
    options: Sequence[int],
    parameters: Sequence[float],
    workspace: int,
    counters: int,
    loss: int,
    grad_log_probs: int,
    grad_entropy: int,
    scale: int,
    metrics: int,
    device: int,
    stream_or_threads: int,
    /,
) -> int: ...
