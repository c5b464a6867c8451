"""Importing this calls `patch`: for options that name a module, such as verl's `model.external_lib`."""

from grpo_kernels.integrations.verl.patching import patch

patch()
