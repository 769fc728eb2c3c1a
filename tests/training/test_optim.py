"""Parameter groups and schedule against the figures of the published code."""

import itertools
import math

import pytest
import torch
from torch import nn

from meru_fast import config
from meru_fast.training.optim import LinearWarmupCosineDecayLR, build_optimizer, parameter_groups


@pytest.fixture(scope="module")
def vit_s() -> nn.Module:
    with torch.device("meta"):
        return config.instantiate(config.load("train_meru_vit_s").model)


def test_groups_of_vit_s_have_the_published_sizes(vit_s):
    groups = parameter_groups(vit_s, 0.2)
    assert [(group["name"], len(group["params"]), group["weight_decay"]) for group in groups] == [
        ("weights", 102, 0.2),
        ("gains_and_biases", 197, 0.0),
        ("scalars", 4, 0.0),
    ]


def test_none_reproduces_what_the_published_code_did(vit_s):
    assert [group["weight_decay"] for group in parameter_groups(vit_s, 0.2, None)] == [0.2, 0.2, 0.0]


def test_every_trainable_parameter_is_in_exactly_one_group(vit_s):
    grouped = [id(parameter) for group in parameter_groups(vit_s, 0.2) for parameter in group["params"]]
    trainable = {id(parameter) for parameter in vit_s.parameters() if parameter.requires_grad}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == trainable  # the fixed positions are in none


def test_a_frozen_parameter_is_left_out():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert [group["name"] for group in parameter_groups(model, 0.1)] == ["weights"]


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match=r"train\.freeze"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False))


def test_schedule_is_the_published_one():
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = LinearWarmupCosineDecayLR(optimizer, total_steps=100, warmup_steps=10)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0.0
    assert rates[5] == pytest.approx(1.0)
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(2.0 * math.cos(math.pi / 4) ** 2)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize("warmup", [-1, 10, 11])
def test_impossible_warmup_is_an_error(warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ValueError, match="warmup_steps"):
        LinearWarmupCosineDecayLR(optimizer, total_steps=10, warmup_steps=warmup)
