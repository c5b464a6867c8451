"""With verl itself, on a CPU: the recordings are its values, it loads the plugin, and its engine takes the patch."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from python_tests.verl import problems, record
from python_tests.verl.conftest import RECORDED

pytest.importorskip("verl", reason="needs verl 0.9: docs/verl.md says what to install to run these tests on a CPU")
pytestmark = pytest.mark.slow

LENGTHS = (5, 9, 3)
VOCAB = 61


@pytest.fixture(scope="module")
def verl_adapter() -> ModuleType:
    import grpo_kernels.integrations.verl

    return grpo_kernels.integrations.verl


def test_the_recordings_are_verls() -> None:
    assert importlib.metadata.version("verl") == RECORDED["verl"]
    assert record.signatures() == RECORDED["signatures"]
    for mine, recorded in ((record.losses(), RECORDED["losses"]), (record.advantages(), RECORDED["advantages"])):
        assert mine.keys() == recorded.keys()
        for name, values in mine.items():
            numbers = [torch.tensor(_numbers(v), dtype=torch.float64) for v in (values, recorded[name])]
            torch.testing.assert_close(*numbers, rtol=1e-12, atol=1e-14)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for key in sorted(value) for n in _numbers(value[key])]
    return [n for v in value for n in _numbers(v)] if isinstance(value, list) else [value]


def test_verl_loads_the_plugin_itself() -> None:
    """In the order of a trainer: nothing of ours is imported by hand, and the functions are found by name."""
    groups = importlib.metadata.entry_points(group="verl.plugins")
    if "grpo_kernels" not in groups.names:
        pytest.skip("this installation of grpo-kernels was made before it had the entry point")
    script = (
        "import verl; from verl.trainer.ppo.core_algos import get_policy_loss_fn, get_adv_estimator_fn;"
        "print(get_policy_loss_fn('grpo_kernels:gspo').__name__, get_adv_estimator_fn('grpo_kernels:opo').__name__)"
    )
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "grpo_kernels.integrations.verl.autopatch"}
    for extra in ({}, environment):
        ran = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, **extra}
        )
        assert ran.stdout.split()[-2:] == ["policy_loss_gspo", "opo"]


@pytest.mark.parametrize("case", problems.LOSS_CASES[::5], ids=lambda case: case.name)
def test_losses_with_verls_own_config(verl_adapter: ModuleType, case: problems.LossCase) -> None:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    results = []
    for name in (case.mode, f"grpo_kernels:{case.mode}"):
        old, log_prob, advantages, mask, weights = (t.float() for t in problems.loss_inputs())
        log_prob.requires_grad_()
        config = record.actor_config(case)
        loss, metrics = get_policy_loss_fn(name)(
            old, log_prob, advantages, mask, case.loss_agg_mode, config, weights if case.weighted else None
        )
        results.append((loss.detach(), torch.autograd.grad(loss, log_prob)[0], metrics))
    (wanted, wanted_gradient, wanted_metrics), (loss, gradient, metrics) = results
    torch.testing.assert_close(gradient, wanted_gradient)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6 * wanted_gradient.abs().sum().item())
    assert metrics == pytest.approx(wanted_metrics, rel=1e-5)


@pytest.mark.parametrize("mode", ["vanilla", "gspo", "geo_mean"])
def test_verls_ppo_loss_with_entropy_and_kl(verl_adapter: ModuleType, mode: str) -> None:
    """The whole loss of verl's actor, which adds to the policy loss in place and reads its metrics."""
    from verl.workers.utils.losses import ppo_loss

    results = []
    for name in (mode, f"grpo_kernels:{mode}"):
        data, outputs = ppo_data()
        case = problems.LossCase(mode, "seq-mean-token-mean")
        config = record.actor_config(case)
        object.__setattr__(config.policy_loss, "loss_mode", name)
        object.__setattr__(config, "use_kl_loss", True)
        object.__setattr__(config, "entropy_coeff", 0.01)
        loss, metrics = ppo_loss(config, outputs, data)
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        results.append((loss.detach(), gradients, {k: getattr(m, "values", m) for k, m in metrics.items()}))
    (wanted, wanted_gradients, wanted_metrics), (loss, gradients, metrics) = results
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for a, w in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(a, w)
    assert metrics.keys() == wanted_metrics.keys()
    for key, value in wanted_metrics.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5)


def ppo_data() -> tuple[Any, dict[str, Tensor]]:
    """What verl's actor passes: prompts of two tokens, responses of LENGTHS, jagged."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    def jagged(function: Any) -> Tensor:
        return torch.nested.nested_tensor([function(n, i) for i, n in enumerate(LENGTHS)], layout=torch.jagged)

    log_probs = -2.0 + problems.wave(0.7, sum(LENGTHS) + 2 * len(LENGTHS), dtype=torch.float32)
    outputs = {"log_probs": log_probs.requires_grad_(), "entropy": (log_probs.detach() + 4).requires_grad_()}
    fields = {
        "prompts": jagged(lambda n, i: torch.zeros(2, dtype=torch.long)),
        "responses": jagged(lambda n, i: torch.zeros(n, dtype=torch.long)),
        "response_mask": jagged(lambda n, i: torch.ones(n, dtype=torch.long)),
        "old_log_probs": jagged(lambda n, i: -2.0 + problems.wave(1.7 + i, n, dtype=torch.float32)),
        "ref_log_prob": jagged(lambda n, i: -2.0 + problems.wave(2.3 + i, n, dtype=torch.float32)),
        "advantages": jagged(lambda n, i: torch.full((n,), [1.0, -0.5, 0.8][i])),
    }
    data = TensorDict(fields, batch_size=[len(LENGTHS)])
    tensordict_utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=40, global_batch_size=6)
    return data, outputs


class Model:
    """A tiny Qwen2 with the forward that verl gives it for fused kernels, and its own one."""

    def __init__(self) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM
        from verl.models.transformers.dense_common import forward_with_triton_backend

        class Fused(Qwen2ForCausalLM):
            forward = forward_with_triton_backend

        torch.manual_seed(0)
        sizes = {"hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = Qwen2Config(vocab_size=VOCAB, num_key_value_heads=1, **sizes)
        self.plain = Qwen2ForCausalLM(config)
        torch.nn.init.normal_(self.plain.lm_head.weight, std=0.5)
        self.fused = Fused(config)
        self.fused.load_state_dict(self.plain.state_dict())
        self.fused._verl_fused_kernels_backend = "triton"


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture
def patched(verl_adapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from verl.workers.engine.fsdp import transformer_impl

    monkeypatch.setattr(transformer_impl, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(transformer_impl, "get_device_name", lambda: "cpu")
    with verl_adapter.patched():
        yield


def make_engine(module: torch.nn.Module) -> Any:
    """verl's FSDP engine around a module that is not sharded, without the setup of processes."""
    from verl.utils import torch_functional
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    engine = object.__new__(FSDPEngineWithLMHead)
    engine.module = module
    engine.use_ulysses_sp, engine.pad_to_length = False, None
    engine._autocast_dtype = torch.float32
    engine.engine_config = SimpleNamespace(
        entropy_checkpointing=False, entropy_from_logits_with_chunking=False, pad_to_length=False
    )
    engine.compute_entropy_from_logits = torch_functional.entropy_from_logits
    engine.get_data_parallel_group = lambda: None
    engine._get_packed_pad_size = lambda length: 4  # as pad_to_length gives it
    return engine


def make_batch(temperature: Any, fused: bool, remove_padding: bool, sum_pi_squared: bool) -> Any:
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    ids = [torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
    batch = TensorDict(
        {
            "input_ids": torch.nested.nested_tensor(ids, layout=torch.jagged),
            "position_ids": torch.nested.nested_tensor([torch.arange(n) for n in LENGTHS], layout=torch.jagged),
        },
        batch_size=[len(LENGTHS)],
    )
    if isinstance(temperature, Tensor):
        batch["temperature"] = temperature
    else:
        tensordict_utils.assign_non_tensor(batch, temperature=temperature)
    options = {"use_fused_kernels": fused, "use_remove_padding": remove_padding, "calculate_entropy": True}
    tensordict_utils.assign_non_tensor(batch, **options, calculate_sum_pi_squared=sum_pi_squared)
    return batch


def step(model: Model, temperature: Any, fused: bool, remove_padding: bool, sum_pi_squared: bool) -> Any:
    """Outputs of verl's forward_step, and the gradient of the head of a loss of them."""
    engine = make_engine(model.fused if fused else model.plain)
    batch = make_batch(temperature, fused, remove_padding, sum_pi_squared)
    found: dict[str, Tensor] = {}

    def loss_function(model_output: dict[str, Tensor], data: Any, dp_group: Any) -> Any:
        found.update({name: value.values() for name, value in model_output.items()})
        factors = torch.linspace(-1, 1, sum(LENGTHS))
        return (found["log_probs"] * factors - 0.1 * found["entropy"]).sum(), {}

    engine.module.zero_grad()
    loss, _ = engine.forward_step(batch, loss_function, forward_only=False)
    loss.backward()
    return {name: value.detach() for name, value in found.items()}, engine.module.lm_head.weight.grad.clone()


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("remove_padding", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.tensor([0.5, 1.0, 2.0])], ids=["one", "number", "samples"])
def test_the_engine_with_fused_kernels_gives_what_it_gives_without(
    model: Model, temperature: Any, remove_padding: bool
) -> None:
    wanted, wanted_gradient = step(model, temperature, False, remove_padding, True)
    actual, gradient = step(model, temperature, True, remove_padding, True)
    assert actual.keys() == wanted.keys() == {"log_probs", "entropy", "sum_pi_squared"}
    if not remove_padding:  # verl takes the labels of padded fused rows from their own row: the last one is padding
        ends = torch.tensor(LENGTHS).cumsum(0) - 1
        for values in (actual, wanted):
            values["log_probs"][ends] = 0.0
    for name, value in wanted.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5)
    if remove_padding:
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-5)


def test_verl_refuses_without_the_patch(model: Model, verl_adapter: ModuleType) -> None:
    verl_adapter.unpatch()
    with pytest.raises(AssertionError, match="does not support per sample temperature"):
        make_engine(model.fused).prepare_model_inputs(make_batch(torch.ones(3), True, True, False))
    with pytest.raises(NotImplementedError, match="calculate_sum_pi_squared=True is not supported"):
        make_engine(model.fused).prepare_model_outputs(None, {}, make_batch(1.0, True, True, True), None)


def test_the_head_equals_verls_torch_backend(verl_adapter: ModuleType) -> None:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    hidden, weight = torch.randn(2, 7, 20), torch.randn(VOCAB, 20) * 0.5
    labels = torch.randint(VOCAB, (2, 7))
    wanted = FusedLinearForPPO()(hidden, weight, labels, temperature=0.7)
    for actual, value in zip(verl_adapter.linear_cross_entropy(hidden, weight, labels, 0.7), wanted, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-5)
