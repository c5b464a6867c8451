"""verl's trainer on the kernels of grpo_kernels.

verl loads this module by itself (entry point group ``verl.plugins``). Importing it registers policy losses and
advantage estimators under the names ``grpo_kernels:<name>``; nothing of verl's changes until `patch` is called.
"""

try:
    from verl.trainer.ppo import core_algos as _core_algos
except ImportError as error:
    raise ImportError(
        "grpo_kernels.integrations.verl needs verl 0.9: pip install verl, which brings its own torch; "
        f"importing verl.trainer.ppo.core_algos failed: {error}",
        name=error.name,
    ) from error

from grpo_kernels.integrations._patch import IncompatibleVersion, attribute_of, check_signature
from grpo_kernels.integrations.verl.advantages import ESTIMATORS
from grpo_kernels.integrations.verl.head import linear_cross_entropy, linear_cross_entropy_with_sum_pi_squared
from grpo_kernels.integrations.verl.patching import is_patched, patch, patched, unpatch
from grpo_kernels.integrations.verl.policy_losses import POLICY_LOSSES

__all__ = [
    "ESTIMATORS",
    "POLICY_LOSSES",
    "IncompatibleVersion",
    "is_patched",
    "linear_cross_entropy",
    "linear_cross_entropy_with_sum_pi_squared",
    "patch",
    "patched",
    "register",
    "unpatch",
]

PREFIX = "grpo_kernels:"
"""Of every registered name."""

SIGNATURES = {
    "register_policy_loss": ("name",),
    "register_adv_est": ("name_or_enum",),
    "compute_policy_loss_vanilla": (
        "old_log_prob",
        "log_prob",
        "advantages",
        "response_mask",
        "loss_agg_mode",
        "config",
        "rollout_is_weights",
    ),
    "compute_rloo_outcome_advantage": (
        "token_level_rewards",
        "response_mask",
        "index",
        "epsilon",
        "config",
        "**kwargs",
    ),
}
"""Of verl.trainer.ppo.core_algos: the plug points, and one function of each kind that is registered there."""


def register() -> None:
    """Registers the policy losses and the advantage estimators, in the place of earlier ones of these names.

    Raises:
        IncompatibleVersion: verl's functions are not those that this was written for.
    """
    for name, parameters in SIGNATURES.items():
        function = attribute_of("verl", "verl.trainer.ppo.core_algos", _core_algos, name)
        check_signature("verl", f"verl.trainer.ppo.core_algos.{name}", function, parameters)
    for name, loss in POLICY_LOSSES.items():
        _core_algos.register_policy_loss(PREFIX + name)(loss)
    for name, estimator in ESTIMATORS.items():
        _core_algos.ADV_ESTIMATOR_REGISTRY.pop(PREFIX + name, None)  # register_adv_est refuses another function
        _core_algos.register_adv_est(PREFIX + name)(estimator)


register()
