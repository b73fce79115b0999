"""The convolution with gradients by matrix products: nothing but its speed is different."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import model
from hparams import HParams
from learning import convolution
from learning.convolution import convolve

# (bins, frames) of the kernel, and its dilation along time.
KERNELS = [((1, 1), 1), ((3, 1), 1), ((3, 3), 1), ((3, 3), 2), ((7, 1), 1), ((7, 3), 2)]


@pytest.fixture
def fast(monkeypatch) -> list[torch.Size]:
    """Take the fast path on any CPU; the shapes of the weights whose gradients it computed."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(convolution, "MIN_CHANNELS", 1)
    shapes, slow = [], convolution._weight_gradient

    def counted(x, grad, shape, *geometry):
        shapes.append(shape)
        return slow(x, grad, shape, *geometry)

    monkeypatch.setattr(convolution, "_weight_gradient", counted)
    return shapes


def layer_of(
    size: tuple[int, int], stride: int = 1, dilation: int = 1, n_in: int = 2, n_out: int = 3
) -> nn.Conv2d:
    """Make a layer as `model.ConvNorm` does, in float64."""
    torch.manual_seed(sum(size) + stride)
    return nn.Conv2d(
        n_in,
        n_out,
        size,
        stride=(stride, 1),
        padding=(size[0] // 2, 0),
        dilation=(1, dilation),
        bias=False,
        dtype=torch.double,
    )


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("size", "dilation"), KERNELS)
def test_output_and_gradients_are_those_of_the_plain_layer(fast, size, dilation, stride, memory):
    layer = layer_of(size, stride, dilation)
    shapes = list(
        itertools.product([1, 3], [1, 2, 3, 8, 9, 16, 17], [5, 12])
    )  # batch, bins, frames
    for batch, bins, frames in shapes:
        values = torch.randn(batch, 2, bins, frames, dtype=torch.double)
        x, twin = (values.to(memory_format=memory).requires_grad_() for _ in range(2))
        expected, found = layer(twin), convolve(x, layer)
        assert_close(found, expected)
        grad = torch.randn_like(expected)
        theirs = torch.autograd.grad(expected, [twin, layer.weight], grad)
        ours = torch.autograd.grad(found, [x, layer.weight], grad)
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other)
    assert len(fast) == len(shapes)


def test_the_gradients_are_those_of_small_differences(fast):
    layer = layer_of((3, 3), stride=2, dilation=2)
    x = torch.randn(2, 2, 5, 7, dtype=torch.double, requires_grad=True)

    def apply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return convolution._Convolution.apply(x, weight, layer)

    assert torch.autograd.gradcheck(apply, (x, layer.weight))
    assert fast


def test_no_gradient_is_computed_for_features_that_need_none(fast, monkeypatch):
    layer = layer_of((7, 3), stride=2)
    x = torch.randn(3, 2, 9, 8, dtype=torch.double)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), [layer.weight])
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", None)
    (found,) = torch.autograd.grad(convolve(x, layer).square().sum(), [layer.weight])
    assert_close(found, expected)
    assert len(fast) == 1


def test_gradients_of_two_uses_add_up(fast):
    layer = layer_of((3, 1), n_in=2, n_out=2)
    x = torch.randn(2, 2, 6, 4, dtype=torch.double)
    (expected,) = torch.autograd.grad(layer(layer(x)).square().sum(), [layer.weight])
    (found,) = torch.autograd.grad(
        convolve(convolve(x, layer), layer).square().sum(), [layer.weight]
    )
    assert_close(found, expected)
    assert len(fast) == 2


@pytest.mark.parametrize("model_type", sorted(model.MODELS))
def test_a_whole_network_learns_what_it_learns_with_plain_layers(fast, monkeypatch, model_type):
    torch.manual_seed(0)
    hp = HParams(model_type=model_type, width=4, n_fft=64, hop_length=16, sample_rate=4000)
    network = model.build_model(hp).double()
    x = torch.randn(2, 1, hp.n_bins, hp.stft_frames + 3, dtype=torch.double)
    weights = list(network.parameters())

    def gradients() -> list[torch.Tensor]:
        return torch.autograd.grad(network(x).square().sum(), weights)

    ours, n_layers = gradients(), len(fast)
    monkeypatch.setattr(convolution, "MIN_CHANNELS", 10**6)
    theirs = gradients()
    assert n_layers == len(fast) == sum(isinstance(m, model.ConvNorm) for m in network.modules())
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize(
    ("setting", "is_fast"),
    [
        (contextlib.nullcontext, True),
        (torch.no_grad, False),
        (torch.inference_mode, False),
        (lambda: torch.autocast("cpu", torch.bfloat16), False),
    ],
)
def test_the_fast_path_is_for_training_in_float32_only(fast, monkeypatch, setting, is_fast):
    used = spy(monkeypatch)
    layer = layer_of((3, 3)).float()
    x = torch.randn(2, 2, 6, 5)
    with setting():
        found, expected = convolve(x, layer), layer(x)
    assert len(used) == is_fast
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX512", "NEON"])
def test_other_cpus_keep_the_plain_layer(fast, monkeypatch, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    used = spy(monkeypatch)
    layer, x = layer_of((3, 3)), torch.randn(2, 2, 6, 5, dtype=torch.double)
    assert torch.equal(convolve(x, layer), layer(x))
    assert not used


def test_other_devices_keep_the_plain_layer(fast, monkeypatch):
    used = spy(monkeypatch)
    layer = layer_of((3, 3)).to("meta")
    assert convolve(torch.empty(2, 2, 6, 5, dtype=torch.double, device="meta"), layer).is_meta
    assert not used


def test_a_compiled_network_keeps_the_plain_layer_and_stays_one_graph(fast, monkeypatch):
    used = spy(monkeypatch)
    layer, x = layer_of((3, 3)), torch.randn(2, 2, 6, 5, dtype=torch.double)
    compiled = torch.compile(convolve, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, layer), layer(x))
    assert not used


@pytest.mark.parametrize(("n_in", "n_out", "is_fast"), [(3, 4, 0), (4, 3, 0), (4, 4, 1)])
def test_few_channels_keep_the_plain_layer(fast, monkeypatch, n_in, n_out, is_fast):
    monkeypatch.setattr(convolution, "MIN_CHANNELS", 4)
    used = spy(monkeypatch)
    layer = layer_of((3, 3), n_in=n_in, n_out=n_out)
    x = torch.randn(2, n_in, 6, 5, dtype=torch.double)
    assert torch.equal(convolve(x, layer), layer(x))
    assert len(used) == is_fast


def spy(monkeypatch) -> list[None]:
    """An entry for every use of the fast path."""
    used, apply = [], convolution._Convolution.apply

    def counted(*args: object) -> torch.Tensor:
        used.append(None)
        return apply(*args)

    monkeypatch.setattr(convolution._Convolution, "apply", counted)
    return used


@pytest.mark.parametrize("layout", ["channels last", "channels first", "a slice", "transposed"])
@pytest.mark.parametrize(("size", "wide", "stride"), [(1, 1, 1), (1, 1, 2), (3, 3, 1), (7, 3, 2)])
def test_one_column_is_the_convolutions_whatever_the_memory_looks_like(layout, size, wide, stride):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(5, 6, (size, wide), (stride, 1), (size // 2, 0))
    x = torch.randn(1, 5, 33, wide)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "a slice":
        x = torch.randn(1, 5, 33, 9).to(memory_format=torch.channels_last)[..., 2 : 2 + wide]
    if layout == "transposed":
        x = torch.randn(1, 5, wide, 33).mT
    expected = layer(x).detach()
    convolution.prepare(layer)
    layer.forward = None  # it is not asked
    with torch.inference_mode():
        np.testing.assert_allclose(convolution.convolve(x, layer), expected, atol=1e-5)


def test_a_prepared_layer_follows_its_type_and_is_not_saved():
    layer = torch.nn.Conv2d(5, 6, (3, 3), padding=(1, 0))
    names = set(layer.state_dict())
    convolution.prepare(layer)
    assert set(layer.state_dict()) == names
    x = torch.randn(1, 5, 33, 3)
    with torch.inference_mode():
        expected = layer(x)
        found = convolution.convolve(x.bfloat16(), layer.bfloat16())
    np.testing.assert_allclose(found.float(), expected, atol=0.1)
