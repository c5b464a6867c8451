"""The table of README.md: one case of each op, from the record of a machine."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.docs_benchmarks import against, against_peer, fastest, markdown, memory_text
from bench.report import time_text

Results = dict[str, Any]
Cases = dict[tuple[str, str], dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class _Shown:
    text: str
    op: str
    case: str
    provider: str = "ours"


_IN_PLACE = "ours, in place"

SHOWN = (
    _Shown("`group_advantages`, 4096 groups of 8", "group_advantages", "B=4096 G=8"),
    _Shown("`token_log_probs`, [2048, 32000] float32, in place", "token_log_probs", "2048x32000 float32", _IN_PLACE),
    _Shown("the same with entropy", "token_log_probs", "2048x32000 float32 + entropy", _IN_PLACE),
    _Shown("`token_log_probs`, [2048, 32000] bfloat16, in place", "token_log_probs", "2048x32000 bfloat16", _IN_PLACE),
    _Shown("`grpo_loss`, [64, 4096], clip and KL", "grpo_loss", "64x4096 clip + k3"),
    _Shown(
        "`linear_grpo_loss`, 4096 tokens, width 512, V = 32000, float32",
        "linear_grpo_loss",
        "4096x512x32000 float32",
    ),
    _Shown(
        "`mtp_linear_cross_entropy`, 2 depths, 1024 tokens, width 1024, V = 32320, float32",
        "mtp_linear_cross_entropy",
        "1024x1024x32320 D=2 float32",
    ),
    _Shown("`verify_draft`, 8 sequences of 3, V = 129280", "verify_draft", "B=8 K=3 V=129280 float32, token"),
    _Shown(
        "`moe_router`, 4096 tokens, 8 of 256 experts, with balance losses",
        "moe_router",
        "DeepSeek-V3 T=4096 E=256 K=8 float32 fwd+bwd + losses",
    ),
    _Shown(
        "`moe_permute`, 1024 tokens of 7168, 8 experts each, bfloat16",
        "moe_permute",
        "DeepSeek-V3 T=1024 H=7168 K=8 bfloat16 fwd+bwd",
    ),
    _Shown("`moe_unpermute`, the same", "moe_unpermute", "DeepSeek-V3 T=1024 H=7168 K=8 bfloat16 fwd+bwd"),
    _Shown(
        "`moe_experts`, 1024 tokens, 8 of 128 experts, a quarter of Qwen3-30B's widths, float32",
        "moe_experts",
        "Qwen3-30B 1/4 wide layer T=1024 E=128 K=8 H=512 I=192 float32 fwd+bwd",
    ),
    _Shown(
        "`fp8_quantize`, [2048, 7168] bfloat16, and of the transpose",
        "fp8_quantize",
        "DeepSeek-V3 2048x7168 bfloat16 1x128 and of the transpose",
    ),
)

_COLUMNS = ("", "time", "against eager", "against `torch.compile`", "against the fastest peer",
            "extra memory, ours / eager")  # fmt: skip


def _line(shown: _Shown, rows: dict[str, dict[str, Any]]) -> list[str]:
    ours = rows[shown.provider]
    others = [pair and pair[1] for pair in (fastest(rows, "eager"), fastest(rows, "compile"))]
    return [
        shown.text,
        time_text(ours["median_us"]),
        *(against(other, ours, ".3g") for other in others),
        against_peer(rows, ours, ".3g"),
        memory_text(ours, others[0]),
    ]


def _complete(files: Mapping[str, Results]) -> tuple[str, Results, Cases]:
    """Name and content of the first record that has every case, and its rows by op and case."""
    for name, results in files.items():
        cases = {(record["op"], record["case"]): record["rows"] for record in results["cases"]}
        if cases.keys() >= {(shown.op, shown.case) for shown in SHOWN}:
            return name, results, cases
    raise ValueError("no record has every case that the README shows")


def text(files: Mapping[str, Results]) -> str:
    """The machine and the table.

    Raises:
        ValueError: no record has every case that is shown.
    """
    name, results, cases = _complete(files)
    machine = results["machine"]
    version = machine["torch"].partition("+")[0]
    words = (
        f"On {machine['device']}, PyTorch {version}, {machine['threads']} threads; with the backward where "
        "there is one; memory above the inputs; an asterisk marks what misses the accuracy budget (`make bench`, "
        f"`bench/results/{name}`; [docs/benchmarks.md](docs/benchmarks.md) has all rows, and the targets that are "
        "missed):"
    )
    lines = textwrap.wrap(words, 120, break_on_hyphens=False, break_long_words=False)
    table = markdown(_COLUMNS, (_line(shown, cases[shown.op, shown.case]) for shown in SHOWN))
    return "\n".join([*lines, "", *table])
