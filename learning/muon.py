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
    alone would take a sixth as many operations as a step. A subclass, so that saving and resuming
    see one optimizer. The learning rate is a number or a tensor on the weights' device.

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
            weights = [w for w in group["params"] if w.ndim == 4 and w.grad is not None]
            if weights:
                self._move(weights, group["lr"], group["weight_decay"])
            for weight in weights:
                moved[weight], weight.grad = weight.grad, None  # AdamW passes over them
        super().step()
        for weight, gradient in moved.items():
            weight.grad = gradient

    def _move(
        self, weights: list[torch.Tensor], learning_rate: float | torch.Tensor, decay: float
    ) -> None:
        """Move convolutions; what is done to each alone is one kernel for all (`_foreach`)."""
        for weight in weights:
            if not self.state[weight]:  # by AdamW's names, which it asks for when a state is loaded
                step = torch.zeros((), device=weight.device)
                self.state[weight] = {"step": step, "exp_avg": torch.zeros_like(weight)}
        gradients = [weight.grad for weight in weights]
        momenta = [self.state[weight]["exp_avg"] for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        changes = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
        # Input channels go last, as they lie in memory: the order of columns changes nothing.
        last = [change.permute(0, 2, 3, 1) for change in changes]
        matrices = orthogonal([change.flatten(1) for change in last])
        paces = [ADAMW_RMS * max(matrix.shape) ** 0.5 for matrix in matrices]
        changes = [
            matrix.unflatten(1, change.shape[1:]).permute(0, 3, 1, 2)
            for matrix, change in zip(torch._foreach_mul(matrices, paces), last, strict=True)
        ]
        torch._foreach_mul_(changes, learning_rate)
        torch._foreach_mul_(weights, 1 - learning_rate * decay)
        torch._foreach_sub_(weights, changes)


def orthogonal(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """Bring all singular values of matrices to about 1 (0.68 to 1.20), and leave their directions.

    A zero matrix stays one; values below some 0.0015 of a matrix's norm come out smaller.
    """
    norms = torch._foreach_norm(matrices)
    torch._foreach_add_(norms, 1e-7)
    groups: dict[torch.Size, list[torch.Tensor]] = {}  # of one shape: one product for all
    for matrix in torch._foreach_div(matrices, norms):
        groups.setdefault(matrix.shape, []).append(matrix)
    results = {shape: iter(_orthogonal(torch.stack(some))) for shape, some in groups.items()}
    return [next(results[matrix.shape]) for matrix in matrices]


def _orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Orthogonalize (n, n_rows, n_columns) matrices of norm 1."""
    if x.shape[1] > x.shape[2]:
        return _orthogonal(x.mT).mT
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.mT
        change = torch.baddbmm(square, square, square, beta=b, alpha=c)  # b square + c square²
        x = torch.baddbmm(x, change, x, beta=a)  # a x + change x
    return x
