"""A convolution that on CPUs uses matrix products where these are faster.

With AVX2 and no more, oneDNN takes two thirds of a training step for the gradient of the weights of
channels-last convolutions; as products of matrices it takes 0.6 of that time. And for one column,
which is what live audio asks for, it fills its registers badly: one product takes half the time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

MIN_CHANNELS = 32  # with fewer, moving data takes longer than what it saves


def convolve(x: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    """Apply a convolution that is padded along frequency and strided along it only.

    Where it is trained it has no bias.

    Parameters
    ----------
    x : torch.Tensor, shape=(n, n_in, bins, frames)
    layer : nn.Conv2d

    Returns
    -------
    torch.Tensor, shape=(n, n_out, bins', frames')
        What ``layer(x)`` gives, and its gradients, to rounding.
    """
    matrix = getattr(layer, "matrix", None)
    if matrix is not None and x.shape[-1] == layer.kernel_size[1] and len(x) == 1:
        return _one_column(x, layer)
    pays = (
        not torch.compiler.is_compiling()  # the compiler stops at what cannot be a graph
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and min(layer.in_channels, layer.out_channels) >= MIN_CHANNELS
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
    )
    return _Convolution.apply(x, layer.weight, layer) if pays else layer(x)


def prepare(layer: nn.Conv2d) -> None:
    """Make a convolution of which the weights will not change any more ready for single columns."""
    if layer.dilation[1] == 1:
        n_out = len(layer.weight)
        matrix = layer.weight.detach().permute(2, 3, 1, 0).reshape(-1, n_out).contiguous()
        layer.register_buffer("matrix", matrix, persistent=False)


def _one_column(x: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    """Map (1, n_in, bins, wide) to (1, n_out, bins', 1).

    In channels-last memory the `high` bins that one answer looks at, with all their frames and
    channels, lie side by side: every row of the left matrix is a stretch of `rows`.
    """
    n_out, n_in, high, wide = layer.weight.shape
    bins, length, stride, pad = x.shape[2], wide * n_in, layer.stride[0], layer.padding[0]
    rows = F.pad(x[0].permute(1, 2, 0).reshape(bins, length), (0, 0, pad, pad)).contiguous()
    n_answers = (bins + 2 * pad - high) // stride + 1
    seen = rows.as_strided((n_answers, high * length), (stride * length, 1))
    found = seen @ layer.matrix if layer.bias is None else layer.bias.addmm(seen, layer.matrix)
    return found.view(1, n_answers, 1, n_out).permute(0, 3, 1, 2)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = layer.stride, layer.padding, layer.dilation
        return F.conv2d(x, weight, None, *ctx.geometry)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            wanted = True, False, False
            grad_x, _, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, *ctx.geometry, False, [0, 0], 1, wanted
            )
        return grad_x, _weight_gradient(x, grad, weight.shape, *ctx.geometry), None


def _weight_gradient(
    x: torch.Tensor,
    grad: torch.Tensor,
    shape: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> torch.Tensor:
    """Return the gradient of weights of `shape`, (n_out, n_in, high, wide).

    In channels-last memory a stretch of bins is a matrix of positions × channels, and the gradient
    for one row of the kernel is the product of two of them: x, moved by as many bins as that row
    looks away and with the `wide` frames it sees side by side, and `grad`.
    """
    n_out, n_in, high, wide = shape
    x, grad = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)  # (n, bins, frames, channels)
    n, bins, frames, _ = grad.shape
    step = stride[0]
    # With a stride, every step-th bin meets the same kernel rows: those bins lie together.
    rows = x.new_zeros(step, bins + (high - 1) // step, frames, wide, n_in)
    result = x.new_zeros(high, wide * n_in, n_out)
    for i in range(n):
        for phase in range(min(step, high)):
            first = (phase - padding[0]) % step
            skipped = (first + padding[0]) // step  # rows of padding, which stay 0
            seen = x[i, first::step][: rows.shape[1] - skipped]
            for j in range(wide):
                begin = j * dilation[1]
                rows[phase, skipped : skipped + len(seen), :, j] = seen[:, begin : begin + frames]
        to_grad = grad[i].reshape(-1, n_out)
        for row in range(high):
            looked_at = rows[row % step, row // step :][:bins].reshape(-1, wide * n_in)
            result[row].addmm_(looked_at.T, to_grad)
    return result.view(high, wide, n_in, n_out).permute(3, 2, 0, 1)
