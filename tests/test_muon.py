"""Muon: what it does to matrices, and whom it leaves to AdamW."""

import pytest
import torch

from learning.muon import Muon


@pytest.mark.parametrize("shape", [(8, 1, 3, 3), (4, 16, 3, 3), (64, 4, 1, 3)])
def test_it_does_what_the_papers_say(shape):
    """The slow twin: momentum, Nesterov's look ahead, weight decay and the iteration, spelt out."""
    rng = torch.Generator().manual_seed(5)
    weight = torch.nn.Parameter(
        torch.randn(shape, generator=rng).to(memory_format=torch.channels_last)
    )
    others, twins = ([torch.nn.Parameter(torch.ones(n)) for n in (3, (4, 5))] for _ in range(2))
    opt = Muon([weight, *others], lr=0.02, weight_decay=0.1)
    adamw = torch.optim.AdamW(twins, lr=0.02, weight_decay=0.1)
    expected, momentum = weight.detach().double().clone(), torch.zeros(shape).double()
    for _ in range(4):
        gradient = torch.randn(shape, generator=rng)
        weight.grad = gradient.to(memory_format=torch.channels_last)
        for one, twin in zip(others, twins, strict=True):
            one.grad = twin.grad = torch.randn(one.shape, generator=rng)
        opt.step()
        adamw.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        x = (0.95 * momentum + 0.05 * gradient).reshape(shape[0], -1)
        x = x / x.norm()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
        expected = expected * (1 - 0.02 * 0.1)
        expected = expected - 0.02 * 0.2 * max(x.shape) ** 0.5 * x.reshape(shape)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weight.grad, gradient)
        torch.testing.assert_close(others, twins, rtol=0, atol=0)  # vectors and linear layers
