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
        "the forward adds its exponentials in float64. In float32 it would be faster, and the sum of squared "
        "probabilities would miss its accuracy budget.",
    ),
    Reason(
        "`gspo`",
        ("grpo_loss",),
        "gspo",
        "x eager",
        "the eager loss that it is compared with is short and computes no metrics; ours always computes all of them. A "
        "step reads its rows three times: for the statistics, for the loss, and for the gradient that a row's tokens "
        "share.",
    ),
    Reason(
        "`cispo`",
        ("grpo_loss",),
        "cispo",
        "x eager",
        "the eager loss that it is compared with is short and computes no metrics; ours always computes all of them.",
    ),
    Reason(
        "`group_advantages`",
        ("group_advantages",),
        "B=",
        "x eager",
        "statistics are in float64, and next to so little work the call itself counts.",
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
        "the arguments are checked in Python, `torch.library` dispatches ops with many arguments, and every output is "
        "allocated. On a GPU it overlaps with the kernels that the model has queued.",
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
