"""Optimisers: AdaBound between Adam and gradient descent."""

from __future__ import annotations

import pytest
import torch

from optimizers import OPTIMIZERS, AdaBound


def minimise(optimizer, weights, steps):
    target = torch.tensor([1.0, -2.0, 3.0])
    for _ in range(steps):
        optimizer.zero_grad()
        ((weights - target) ** 2).sum().backward()
        optimizer.step()
    return float((weights.detach() - target).abs().max())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_of_them_approach_a_minimum(name):
    weights = torch.nn.Parameter(torch.zeros(3))
    before = float(torch.tensor([1.0, -2.0, 3.0]).abs().max())
    assert minimise(OPTIMIZERS[name]([weights], lr=0.05), weights, 60) < before


def test_adabound_begins_as_adam():
    ours, theirs = (torch.nn.Parameter(torch.tensor([0.5, -1.0, 4.0])) for _ in range(2))
    # bounds so wide at first that they bind nothing
    a = AdaBound([ours], lr=1e-3, gamma=1e-12, final_lr=0.1)
    b = torch.optim.Adam([theirs], lr=1e-3)
    minimise(a, ours, 5)
    minimise(b, theirs, 5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_adabound_ends_as_gradient_descent_with_momentum():
    weights = torch.nn.Parameter(torch.tensor([10.0]))
    optimizer = AdaBound([weights], lr=1e-3, gamma=1e9, final_lr=0.01)  # bounds closed at once
    weights.grad = torch.tensor([2.0])
    optimizer.step()
    # the mean of the gradients is a tenth of the first one
    assert float(weights.detach()) == pytest.approx(10 - 0.01 * 0.1 * 2, abs=1e-6)


def test_adabound_follows_a_schedule_of_the_rate():
    weights = torch.nn.Parameter(torch.tensor([10.0]))
    optimizer = AdaBound([weights], lr=1e-3, gamma=1e9, final_lr=0.01)
    optimizer.param_groups[0]["lr"] = 0.5e-3
    weights.grad = torch.tensor([2.0])
    optimizer.step()
    assert float(weights.detach()) == pytest.approx(10 - 0.005 * 0.1 * 2, abs=1e-6)
