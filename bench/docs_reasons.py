"""Why targets are missed. A reason is shown where a recorded machine misses its target, and nowhere else."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """For these ops; `case` and `target` are regular expressions that are searched for."""

    subject: str
    ops: tuple[str, ...]
    case: str
    target: str
    text: str

    def fits(self, op: str, case: str, target: str) -> bool:
        return op in self.ops and bool(re.search(self.case, case) and re.search(self.target, target))


REASONS = (
    Reason(
        "`linear_token_log_probs` in float32",
        ("linear_token_log_probs",),
        "float32",
        "x eager",
        "its backward forms the logits again, 8 N H V operations against eager's 6, so that 0.75 is what the products "
        'leave where all of them run at one rate; the rows "the bare GEMMs" of the record are what they take on the '
        "machine. Ours adds its passes over the logits of a chunk, and reads and writes the gradient of the weight for "
        "each.",
    ),
    Reason(
        "`linear_grpo_loss` and `mtp_linear_cross_entropy` in float32",
        ("linear_grpo_loss", "mtp_linear_cross_entropy"),
        "float32",
        "x eager",
        "eager does 6 N H V operations, too. Ours does them for some rows at a time, and the gradient of the weight is "
        "read and written once for each of these chunks; that their logits stay out of memory makes up for most of it.",
    ),
    Reason(
        "memory in bfloat16",
        ("linear_token_log_probs", "linear_grpo_loss"),
        "bfloat16",
        "memory",
        "products on the CPU take float32 copies of what they multiply, and the gradient of the weight is summed in "
        "float32: memory of the size of the weight, whatever the number of rows. That is also why they are faster.",
    ),
    Reason(
        "memory of `mtp_linear_cross_entropy` in bfloat16",
        ("mtp_linear_cross_entropy",),
        "bfloat16",
        "a call a depth",
        "a chunk of logits grows with the rows, up to an eighth of what eager takes for them, so one call for all "
        "depths has larger chunks than one of each depth. What it saves is a gradient of the weight a depth to add up, "
        "and at the width of this case, chosen for processors that multiply bfloat16 slowly, that is little.",
    ),
    Reason(
        "host cost",
        (
            "group_advantages",
            "token_log_probs",
            "grpo_loss",
            "moe_router",
            "build_permutation",
            "moe_permute",
            "moe_unpermute",
        ),
        "host cost",
        "us above",
        "Python: looking up that a call like this one has passed the checks, outputs that the floor lacks, "
        "`torch.autograd.Function` with more arguments and saved tensors, and the interpreter's own code falling out "
        "of the processor's caches between calls. The kernel and its binding are the least of it: the parts, each "
        "timed alone, add up to less than the call. On a GPU the host runs ahead of the kernels that the model has "
        "queued.",
    ),
)


def lines(missed: list[tuple[str, str, str]]) -> list[str]:
    """A list of the reasons for what is missed, given as (op, case, target), and of what has none yet."""
    found, unknown = [], []
    for op, case, target in missed:
        fitting = next((reason for reason in REASONS if reason.fits(op, case, target)), None)
        if fitting is None:
            unknown.append(f"`{op}` {case}, {target}: not explained yet.")
        elif fitting not in found:
            found.append(fitting)
    texts = [f"{reason.subject}: {reason.text}" for reason in REASONS if reason in found]
    return [
        line
        for text in texts + list(dict.fromkeys(unknown))
        for line in textwrap.wrap(
            text, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
        )
    ]
