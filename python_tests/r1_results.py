"""A made-up run of examples.r1 with every figure that a report can show, in no time."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

from examples.r1.measuring.model_states import PRECISIONS, Allocation, ModelStates, Row
from examples.r1.results import PipelineResult, Record, StageResult
from examples.r1.settings import Settings

DIGITS, WORDS = "digit_sorting", "spell_backward"
NAN = math.nan


def rising(step: int, steps: int, start: float, end: float) -> float:
    """From start towards end, quickly at first."""
    return end + (start - end) * math.exp(-4 * step / max(steps, 1))


def sft_stage(name: str, title: str, steps: int, ends: tuple[float, float], *, moe: bool = False) -> StageResult:
    rng = Random(name)
    records, evaluations = [], []
    for step in range(steps + 1):
        loss = rising(step, steps, 3.2, 0.34) * rng.uniform(0.96, 1.04)
        if step > 0:
            records.append({"loss": loss, "grad_norm": loss / 2, "seconds": 0.05, "tokens": 1200.0})
            if moe:
                records[-1] |= {"balance_loss": 0.021, "expert_load": rising(step, steps, 3.1, 1.2)}
        if step % 25 == 0 or step == steps:
            evaluations.append(evaluation(step, *(rising(step, steps, 0.0, end) for end in ends)))
            evaluations[-1]["validation_loss"] = rising(step, steps, 3.2, 0.36)
    return StageResult(name, title, steps, 0.07 * steps, records, evaluations)


def evaluation(step: float, digits: float, words: float) -> Record:
    return {
        "step": float(step),
        f"{DIGITS}/accuracy": digits,
        f"{DIGITS}/sampled_accuracy": 0.8 * digits,
        f"{DIGITS}/format": 0.99,
        f"{DIGITS}/language": 0.9,
        f"{WORDS}/accuracy": words,
        f"{WORDS}/sampled_accuracy": 0.9 * words,
        f"{WORDS}/format": 1.0,
    }


def rl_stage(name: str, title: str, steps: int, digits: tuple[float, float], words: tuple[float, float]) -> StageResult:
    """Accuracy of the two tasks goes from the first number to the second; a judge scores in `diverse_rl`."""
    rng = Random(name)
    records, evaluations = [], []
    for step in range(steps + 1):
        sorted_, spelled = rising(step, steps, *digits), rising(step, steps, *words)
        noise = rng.uniform(-0.05, 0.05)
        if step > 0:
            records.append(rl_record(step, steps, min(max(sorted_ + noise, 0.0), 1.0)))
            if name == "diverse_rl":
                judge = {"judge": 0.7 + noise / 2, f"{WORDS}/accuracy": min(max(spelled - noise, 0.0), 1.0)}
                records[-1] |= judge
        if step % 25 == 0 or step == steps:
            evaluations.append(evaluation(step, sorted_, spelled))
            if name == "diverse_rl":
                evaluations[-1][f"{WORDS}/judge"] = 0.72
    return StageResult(name, title, steps, 0.4 * steps, records, evaluations)


def rl_record(step: int, steps: int, accuracy: float) -> Record:
    return {
        "reward": accuracy + 0.28,
        f"{DIGITS}/accuracy": accuracy,
        "format": 0.98,
        "language": rising(step, steps, 0.66, 0.99),
        "loss": -0.002,
        "kl": rising(step, steps, 0.0, 0.21),
        "entropy": rising(step, steps, 0.35, 0.08),
        "ratio_max": 3.41,
        "clip_low_fraction": 0.004 * accuracy,
        "clip_high_fraction": 0.006 * accuracy,
        "clip_fraction": 0.010 * accuracy,
        "grad_norm": 0.31,
        "informative": 0.8 - 0.4 * accuracy,
        "rounds": 2.0,
        "tokens": 6000.0,
        "sampled_tokens": 6000.0,
        "sample_seconds": 0.15,
        "train_seconds": 0.2,
    }


def run(*, moe: bool = False, drafts: bool = False, hacked: bool = False) -> PipelineResult:
    """All five stages, as they go where all goes well; or with a judge that is hacked."""
    words_end = 0.06 if hacked else 0.98
    stages = [
        sft_stage("cold_start", "1  cold start: a few noisy demonstrations", 140, (0.71, 0.64), moe=moe),
        rl_stage("reasoning_rl", "2  reasoning RL: rule rewards", 110, (0.71, 0.97), (0.64, 0.55)),
        StageResult(
            "reward_model",
            "   the reward model of stages 3 and 4",
            200,
            6.5,
            [{"loss": rising(step, 200, 3.0, 0.2), "seconds": 0.03, "tokens": 600.0} for step in range(200)],
            [
                {"step": 0.0, "judge/right": 0.03, "judge/wrong": 0.03, "judge/agreement": 0.51},
                {"step": 200.0, "judge/right": 0.96, "judge/wrong": 0.21, "judge/agreement": 1.0},
            ],
        ),
        sft_stage("rejection_sampling", "3  rejection sampling, SFT from the base", 240, (0.96, 0.95), moe=moe),
        rl_stage("diverse_rl", "4  diverse RL: rule and model rewards", 60, (0.96, 0.98), (0.95, words_end)),
    ]
    stages[3].facts = {f"{DIGITS}/prompts": 600.0, f"{DIGITS}/kept": 583.0, f"{DIGITS}/kept_right": 0.998}
    for stage in (stages[1], stages[4]):
        for step, record in enumerate(stage.records):
            if moe:
                record |= {"expert_load": 1.4 + 0.2 * math.sin(step), "rollout_mismatch": 0.0, "route_mismatch": 0.011}
            if drafts:
                record |= {"tokens_per_pass": 1.84, "acceptance_1": rising(step, 100, 0.92, 0.97), "mtp_loss_1": 0.4}
    return PipelineResult(
        Settings(),
        114_816,
        stages,
        seconds=181.2,
        loss_step={
            "rows": 256,
            "columns": 24,
            "width": 64,
            "vocabulary": 64,
            "seconds": 0.0054,
            "eager_seconds": 0.0062,
            "peak_bytes": 8053063,
            "eager_peak_bytes": 10685000,
        },
        draft_speed={"tokens_per_second": 21000.0, "tokens_per_second_without": 44000.0} if drafts else None,
        samples=[
            {"stage": name, "task": task, "prompt": prompt, "completion": completion, "correct": name != "cold_start"}
            for name in ("cold_start", "reasoning_rl", "rejection_sampling", "diverse_rl")
            for task, prompt, completion in (
                (DIGITS, "s314159>", "<t>1,1,3,4,5,9</t><a>113459</a>"),
                (WORDS, "rmoskva>", "<a>avksom</a>"),
            )
        ],
        machine={"device": "x86-64 2 cores AVX2", "threads": 2, "torch": "2.13.0"},
    )


def full() -> PipelineResult:
    result = run(moe=True, drafts=True)
    result.ppo = model_states("moe, width 64")
    return result


def model_states(model: str, device: str = "cpu") -> ModelStates:
    """PPO's policy, critic, reference and reward model of 2**18 parameters each; GRPO's without the critic."""
    trained, frozen = (4, 4, 0, 8, 0), (4, 0, 0, 0, 0)
    sizes = {"policy": trained, "critic": trained, "reference": frozen, "reward model": frozen}
    rows = tuple(
        Row(precision, method, part, 2**18, *(kind * 2**18 for kind in each))
        for precision in PRECISIONS
        for method in ("ppo", "grpo")
        for part, each in sizes.items()
        if (method, part) != ("grpo", "critic")
    )
    return ModelStates(model, device, rows, (Allocation("float32", "ppo", 40 * 2**18, 40 * 2**18),))


def bare() -> PipelineResult:
    """A run that was stopped before it did anything."""
    return PipelineResult(Settings(), 0, [StageResult("cold_start", "")])


def broken() -> PipelineResult:
    """Figures that are no numbers, and hardly any others."""
    evaluations = [{"step": 0.0, f"{WORDS}/accuracy": NAN}, {"step": NAN, f"{DIGITS}/accuracy": math.inf}]
    records: list[Record] = [{"reward": NAN}, {}, {"reward": -math.inf, "judge": 0.5, "tokens": 5.0}]
    stage = StageResult("diverse_rl", "4  diverse", 3, NAN, records, evaluations, {"kept": NAN})
    sample = {"stage": "diverse_rl", "prompt": "s1>"}
    return PipelineResult(Settings(), 7, [stage], loss_step={"seconds": 0.0}, samples=[sample])


RUNS = {
    "full": full,
    "dense": run,
    "hacked": lambda: run(hacked=True),
    "single": lambda: replace(run(), stages=run().stages[1:2]),
    "none": lambda: PipelineResult(Settings(), 0),
    "bare": bare,
    "broken": broken,
}
