"""The public moe_experts: argument checks and the choice of a backend."""

from __future__ import annotations

from torch import Tensor

from grpo_kernels import _dispatch
from grpo_kernels._autocast import no_autocast
from grpo_kernels.moe_experts import fp8_function, fp8_stages, reference
from grpo_kernels.moe_experts.arguments import (
    OP,
    Experts,
    check_accumulators,
    check_activation,
    check_experts,
    check_plan,
    check_range,
    check_recipe_dtype,
    check_routes,
    raise_if_no_expert,
)
from grpo_kernels.moe_experts.function import Options, routed_experts
from grpo_kernels.moe_experts.stages import Parts
from grpo_kernels.moe_permute.layout import check_sizes
from grpo_kernels.moe_router import RouterOutput


def moe_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    router_output: RouterOutput | tuple[Tensor, Tensor],
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "swiglu",
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    interleaved: bool = False,
    recipe: str = "bf16",
    fp8_wgrad: bool = False,
    save: str = "preact",
    alignment: int | None = None,
    expert_range: tuple[int, int] | None = None,
    num_experts: int | None = None,
    weight_grad_accumulators: tuple[Tensor | None, Tensor | None] | None = None,
) -> Tensor:
    """Routed experts: each token's K experts, and the weighted sum of what they return.

    With e = topk_ids[t, k] and the rows of tokens sorted by expert, so that each product is one grouped GEMM::

        h = x[t] gate_up[e]^T + gate_up_bias[e]        gate, up = halves of h
        a = silu(gate) * up
        y[t] = sum_k topk_weights[t, k] * (a down[e]^T + down_bias[e])

    The backward needs neither the permuted rows of x nor what the experts returned: the gradient of a router weight is
    <g down[e], a>, with the unscaled gradient g of the token's output, and x is gathered again.

    Args:
        x: [T, H] bf16, fp16, fp32 or fp64. The tokens.
        gate_up: [E, 2I, H] floating. Up-projections, as `nn.Linear`'s weight for each expert: gates, then ups.
        down: [E, H, I] floating. Down-projections.
        router_output: what `moe_router` returned, or a pair (topk_weights [T, K] floating, topk_ids [T, K] int32 or
            int64). A negative id is a slot without an expert. The weights are differentiable.
        gate_up_bias: [E, 2I] floating.
        down_bias: [E, H] floating.
        activation: "swiglu", or gpt-oss' "clamped_swiglu": gate = min(gate, limit), up = clamp(up, -limit, limit),
            a = gate * sigmoid(alpha * gate) * (up + 1).
        swiglu_alpha: > 0. The alpha of clamped_swiglu.
        swiglu_limit: > 0. Its limit.
        interleaved: gates are the even and ups the odd rows of `gate_up` (gpt-oss), instead of its halves.
        recipe: "bf16": products of operands in the dtype of the inputs. "fp8_block128": products of operands in e4m3,
            rows in tiles of 1 x 128 and weights of 128 x 128; for gradients of weights see `fp8_wgrad`. Not fp64.
        fp8_wgrad: the FP8 recipe forms the gradients of the weights of e4m3 operands as well, in tiles of 128 rows of a
            column; else of operands in the dtype of the products.
        save: what is kept for the backward beside the tokens, the routes and the parameters. "preact": the
            pre-activations h. "input": nothing; the backward computes h again. In FP8 tokens and h are kept in e4m3.
        alignment: rows of an expert are padded to a multiple of it. None: 1; 128 for `fp8_wgrad`, which wants a
            multiple of that.
        expert_range: (start, end). The parameters are those of the experts start to end of `num_experts`, of which
            other ranks have the rest; topk_ids stay global, and slots of other experts contribute nothing.
        num_experts: how many experts the ids count; needed with `expert_range`, else E.
        weight_grad_accumulators: pair of fp32 tensors (fp64 for fp64 parameters) like `gate_up` and `down`, or None for
            one of them. The backward adds the gradient of the weight there, as to Megatron's main_grad, and the
            weight gets none. Needs kernels.

    Returns:
        [T, H] in the dtype of the products. A token without experts here is 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range; on the CPU also where an
            id is >= num_experts. On other devices such a slot contributes nothing.
        BackendUnavailable: weight_grad_accumulators on the reference backend.

    Numerics:
        The products' operands have autocast's dtype, else the widest of those of x and the parameters; products
        accumulate in fp32, the activation is computed in fp32, and the weighted sum is an fp32 sum in the order of the
        slots. h, a and what each expert returns are rounded to the operands' dtype. The gradient of topk_weights is
        an fp32 sum in a fixed order. No atomics: equal calls give equal bits. Tokens whose ids are all negative
        may hold NaN; it reaches nothing. Experts without tokens get gradients of exactly 0.

        In FP8 scales are powers of two. What is quantised are the tokens, the weights as the parameters hold them, and
        the float32 values of activation and gradients; sums of 128 products are added in fp32. The backward's
        activation is that of the quantised h. Quantised weights are kept until the parameter changes or an optimizer
        of torch.optim makes a step; see `clear_fp8_weight_cache`. NaN or an infinity makes 128 values of its row NaN.

    Source:
        DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) and Qwen3's MoE blocks; gpt-oss' MLPBlock for biases and the
        clamped activation; the saving of activations is SonicMoE's. FP8: DeepSeek-V3, section 3.3.
    """
    experts = Experts(x, gate_up, down, gate_up_bias, down_bias)
    check_experts(experts)
    weights, ids = check_routes(x, router_output)
    kind = check_activation(activation, swiglu_alpha, swiglu_limit, interleaved)
    alignment = check_plan(recipe, save, alignment, fp8_wgrad)
    first, total = check_range(gate_up.shape[0], expert_range, num_experts)
    check_sizes(OP, ids.shape[0] * ids.shape[1], gate_up.shape[0], total, alignment)
    accumulators = check_accumulators(experts, weight_grad_accumulators)
    dtype = experts.product_dtype()
    check_recipe_dtype(recipe, dtype)
    weights = weights.to(reference.exact_dtype(dtype))
    stand_in = experts.of_dtype(dtype)
    backend = _dispatch.resolve(OP, stand_in)
    if backend == "reference" and accumulators != (None, None):
        raise _dispatch.BackendUnavailable(f"{OP}: weight_grad_accumulators need kernels")
    own = (first, first + gate_up.shape[0])
    if recipe == "fp8_block128":
        fp8 = fp8_function.Options(
            backend, fp8_stages.Fp8Parts.of(backend, stand_in), dtype, kind, save == "preact", own, total, alignment,
            fp8_wgrad,
        )  # fmt: skip
        return fp8_function.routed_experts(fp8, accumulators, experts, weights, ids)
    if backend != "reference":
        options = Options(
            backend, Parts.of(backend, stand_in), dtype, kind, save == "preact", own, total, alignment
        )  # fmt: skip
        return routed_experts(options, accumulators, experts, weights, ids)
    raise_if_no_expert(ids, total)
    with no_autocast(x.device.type):
        return reference.moe_experts(*experts.to(dtype), weights, ids, kind, first)
