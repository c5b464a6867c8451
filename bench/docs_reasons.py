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
        "float32 log-probs without entropy",
        ("token_log_probs",),
        r"float32$",
        "x eager",
        "recorded with a kernel that read and computed in turn and added every exponential in float64. It now fetches "
        "the next block meanwhile, and adds four in float32 before float64 takes them.",
    ),
    Reason(
        "`gspo`",
        ("grpo_loss",),
        "gspo",
        "x eager",
        "the eager loss that it is compared with makes few passes and computes no metrics; ours always computes all of "
        'them. "eager with metrics" is the row that does like work.',
    ),
    Reason(
        "`cispo`",
        ("grpo_loss",),
        "cispo",
        "x eager",
        "as with `gspo`; and the backward's multiplication by the upstream scalar is one more pass over the gradient.",
    ),
    Reason(
        "`group_advantages`",
        ("group_advantages",),
        "B=",
        "x eager",
        "recorded with a kernel that took one group after another, each a chain of dependent operations. It now takes "
        "64 groups at a time. Next to so little work the call itself counts.",
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
        "tensors are read one attribute at a time in Python, and every output is allocated. Recorded before calls of "
        "plain tensors went past `torch.library`. On a GPU it overlaps with the kernels that the model has queued.",
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
