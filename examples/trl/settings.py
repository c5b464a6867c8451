"""What the demonstration may be told."""

from __future__ import annotations

from dataclasses import dataclass

WAYS = ("stock", "patched", "fused")
WAY_NAMES = {
    "stock": "trl.GRPOTrainer",
    "patched": "trl.GRPOTrainer after patch()",
    "fused": "FusedGRPOTrainer",
}


@dataclass(frozen=True)
class Settings:
    """Sizes of both parts.

    Args:
        vocab: words of the model whose steps are timed.
        width: of its hidden states.
        samples: completions a step.
        tokens: of a completion.
        steps: timed ones; the first is not counted.
        learning_steps: of the small model that learns.
        threads: of PyTorch.
    """

    vocab: int = 32768
    width: int = 64
    samples: int = 32
    tokens: int = 48
    steps: int = 5
    learning_steps: int = 40
    threads: int = 2

    def __post_init__(self) -> None:
        if self.vocab < 64:
            raise ValueError(f"vocab must be at least 64, got {self.vocab}")
        if self.samples % 8:
            raise ValueError(f"samples must be a multiple of 8, the size of a group, got {self.samples}")
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, of which the first is not counted, got {self.steps}")
        for name in ("width", "tokens", "learning_steps", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % 16:
            raise ValueError(f"width must be a multiple of 16, got {self.width}")
