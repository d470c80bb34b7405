"""Muon and Adafactor on a GPU: the same numbers as on a CPU, in fewer operators and without waits."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from atlas.config import ModelConfig, TrainingConfig
from atlas.config.config import MUON_STACK_NUMBERS
from atlas.model import build_model
from atlas.training.checkpoint.validate import check_optimizer_state
from atlas.training.optimizers.adafactor import AdafactorWithoutWaits
from atlas.training.optimizers.build import build_optimizer
from benchmarks.fake_cuda import why_not
from tests.runs import REPOSITORY
from tests.training.optimizers.test_optimizers import RATE, random_gradients, stepped


def test_adafactor_without_waits_is_pytorchs(tiny_config: ModelConfig) -> None:
    """Ten steps: weights and state to 1e-6, the same keys, and each loads what the other has saved."""
    model, theirs = (build_model(tiny_config, seed=0) for _ in range(2))
    gradients = random_gradients(model, 10)
    config = TrainingConfig(optimizer="adafactor", learning_rate=RATE, weight_decay=0.5)
    reference = stepped(theirs, config, gradients)
    assert type(reference) is torch.optim.Adafactor
    optimizer = AdafactorWithoutWaits(build_optimizer(model, config).param_groups)
    for number, gradient in enumerate(gradients):
        if number == 5:  # as in a resumed run
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = AdafactorWithoutWaits(build_optimizer(model, config).param_groups)
            optimizer.load_state_dict(state)
        for name, parameter in model.named_parameters():
            parameter.grad = gradient[name].clone()
        optimizer.step()
    for name, parameter in model.named_parameters():
        other = theirs.get_parameter(name)
        assert (parameter - other).norm() <= 1e-6 * other.norm(), name
        ours, kept = optimizer.state[parameter], reference.state[other]
        assert ours.keys() == kept.keys()
        for key, value in kept.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=0)
    reference.load_state_dict(optimizer.state_dict())
    check_optimizer_state(build_optimizer(model, config), optimizer.state_dict())


def test_matrices_that_muon_stacks_are_updated_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few shapes and with many, such as keys narrower than queries, and gates beside values."""
    shape = ModelConfig(
        hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, mlp="swiglu", vocab_size=50, max_seq_len=8
    )
    alone, stacked = build_model(shape, seed=0), build_model(shape, seed=0)
    gradients = random_gradients(alone, 5)
    for model, numbers in ((alone, 1), (stacked, 1 << 25)):
        monkeypatch.setitem(MUON_STACK_NUMBERS, "cpu", numbers)
        stepped(model, TrainingConfig(optimizer="muon", learning_rate=RATE), gradients)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(stacked.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)


ON_FAKE_CUDA = """
from benchmarks.fake_cuda import FakeCuda
device = FakeCuda()
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from atlas.config import ModelConfig, TrainingConfig
from atlas.model import build_model
from atlas.training.optimizers.build import build_optimizer

class Operators(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        is_view = any(value.alias_info and not value.alias_info.is_write for value in operator._schema.returns)
        self.count += operator.namespace == "aten" and not is_view
        return operator(*args, **(kwargs or {}))

with device:
    model = build_model(ModelConfig(num_layers=6, hidden_size=64, num_heads=2, vocab_size=128), seed=0).to("cuda")
    optimizer = build_optimizer(model, TrainingConfig(optimizer="muon"))
    for step in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with Operators() as operators:
            optimizer.step()
print(operators.count)
"""


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.slow
def test_on_cuda_muon_needs_as_many_operators_in_a_deep_model_as_in_a_shallow_one() -> None:
    """30 for each of four shapes, and AdamW's for the rest; one matrix after the other would need over 1,000."""
    command = [sys.executable, "-c", ON_FAKE_CUDA]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert int(done.stdout) <= 130
