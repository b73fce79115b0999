"""The optimizer: Muon for the weights of convolutions, AdamW for everything else."""

from __future__ import annotations

import torch

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd polynomial that pulls every value to 1
ADAMW_RMS = 0.2  # root mean square of what AdamW moves a weight by, in learning rates


class Muon(torch.optim.AdamW):
    """AdamW whose convolutions move in all directions at the same pace.

    The weights of a convolution are a matrix with a row for each output channel. Its momentum is
    made orthogonal, about, so that directions that the gradients seldom show are learnt as fast as
    the others, and scaled to what AdamW would move a weight by, so that both share one learning
    rate. Biases, batch norms and linear layers are AdamW's: orthogonalizing ResNet18's last layer
    alone would take a sixth as many operations as a step (ConvNet's fifth layer, a convolution
    over all frequencies, is moved and takes a fifth as many). A subclass, so that schedules, saving
    and resuming see one optimizer. Schedules that cycle AdamW's first beta leave Muon's momentum.

    References
    ----------
    .. [1] Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    .. [2] Liu et al., "Muon is scalable for LLM training", arXiv 2502.16982, 2025 (the scale).
    """

    @torch.no_grad()
    def step(self) -> None:
        """Move all weights that have a gradient."""
        moved = {}
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim == 4 and weight.grad is not None:
                    self._move(weight, group["lr"], group["weight_decay"])
                    moved[weight], weight.grad = weight.grad, None  # AdamW passes over them
        super().step()
        for weight, gradient in moved.items():
            weight.grad = gradient

    def _move(self, weight: torch.Tensor, learning_rate: float, decay: float) -> None:
        state = self.state[weight]
        if not state:  # by AdamW's names, which it asks for when a state is loaded
            state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(weight)
        state["step"] += 1
        momentum = state["exp_avg"].lerp_(weight.grad, 1 - MOMENTUM)
        change = weight.grad.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's
        scale = ADAMW_RMS * max(change.shape) ** 0.5
        weight.mul_(1 - learning_rate * decay)
        weight.sub_(orthogonal(change).view(weight.shape), alpha=learning_rate * scale)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of a matrix to about 1 (0.68 to 1.20), and leave its directions.

    Parameters
    ----------
    matrix : torch.Tensor, shape=(n, m)
        A zero matrix stays one; values below some 0.0015 of the matrix's norm come out smaller.
    """
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.mT
        change = torch.addmm(square, square, square, beta=b, alpha=c)  # b square + c square²
        x = torch.addmm(x, change, x, beta=a)  # a x + change x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x
