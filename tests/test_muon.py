"""Muon: what it does to matrices, and whom it leaves to AdamW."""

import pytest
import torch

from learning.muon import Muon


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, (7, 1)),
        torch.nn.Conv2d(8, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 8 * 14, 3),
    ).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(8, 1, 3, 3), (4, 16, 3, 3), (64, 4, 1, 3)])
def test_it_does_what_the_papers_say(shape):
    """The slow twin: momentum, Nesterov's look ahead, weight decay and the iteration, spelt out."""
    rng = torch.Generator().manual_seed(5)
    weight = torch.nn.Parameter(
        torch.randn(shape, generator=rng).to(memory_format=torch.channels_last)
    )
    opt = Muon([weight], lr=0.02, weight_decay=0.1)
    expected, momentum = weight.detach().double().clone(), torch.zeros(shape).double()
    for _ in range(4):
        gradient = torch.randn(shape, generator=rng)
        weight.grad = gradient.to(memory_format=torch.channels_last)
        opt.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        x = (0.95 * momentum + 0.05 * gradient).reshape(shape[0], -1)
        x = x / x.norm()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
        expected = expected * (1 - 0.02 * 0.1)
        expected = expected - 0.02 * 0.2 * max(x.shape) ** 0.5 * x.reshape(shape)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weight.grad, gradient)


def test_only_convolutions_are_moved_otherwise():
    networks, optimizers = (network(), network()), (Muon, torch.optim.AdamW)
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(2, 1, 16, 16, generator=rng)
    for net, kind in zip(networks, optimizers, strict=True):
        net(x).square().mean().backward()
        kind(net.parameters(), lr=0.01).step()
    for name, weight in networks[0].named_parameters():
        same = torch.equal(weight, networks[1].state_dict()[name])
        assert same == (weight.ndim != 4), name
