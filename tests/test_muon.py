"""Muon: what it does to matrices, and whom it leaves to AdamW."""

import pytest
import torch

from learning.muon import Muon


@pytest.mark.parametrize("shape", [(8, 1, 3, 3), (4, 16, 3, 3), (64, 4, 1, 3)])
def test_it_does_what_the_papers_say(shape):
    """The slow twin, spelt out, of two of one shape, whose iterations are products of both."""
    rng, last = torch.Generator().manual_seed(5), {"memory_format": torch.channels_last}
    weights = [torch.nn.Parameter(torch.randn(shape, generator=rng).to(**last)) for _ in range(2)]
    others, twins = ([torch.nn.Parameter(torch.ones(n)) for n in (3, (4, 5))] for _ in range(2))
    opt = Muon([*weights, *others], lr=0.02, weight_decay=0.1)
    adamw = torch.optim.AdamW(twins, lr=0.02, weight_decay=0.1)
    expected, momenta = [weight.detach().double() for weight in weights], [0, 0]
    for _ in range(4):
        gradients = [torch.randn(shape, generator=rng) for _ in weights]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.to(**last)
        for one, twin in zip(others, twins, strict=True):
            one.grad = twin.grad = torch.randn(one.shape, generator=rng)
        opt.step()
        adamw.step()
        for i, gradient in enumerate(gradients):
            momenta[i] = 0.95 * momenta[i] + 0.05 * gradient.double()
            x = (0.95 * momenta[i] + 0.05 * gradient).flatten(1)
            x = x / x.norm()
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
            change = 0.2 * max(x.shape) ** 0.5 * x.reshape(shape)
            expected[i] = expected[i] * (1 - 0.02 * 0.1) - 0.02 * change
            torch.testing.assert_close(weights[i].double(), expected[i], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(weights[i].grad, gradient)
        torch.testing.assert_close(others, twins, rtol=0, atol=0)  # vectors and linear layers
