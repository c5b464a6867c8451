"""Group-relative advantages, and the choice of groups and samples by their rewards."""

from grpo_kernels.group_advantages.api import (
    BestOfGroupOutput,
    GroupAdvantagesOutput,
    best_of_group,
    group_advantages,
    informative_groups,
)

__all__ = ["BestOfGroupOutput", "GroupAdvantagesOutput", "best_of_group", "group_advantages", "informative_groups"]
