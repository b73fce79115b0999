"""On a GPU everything means what it means on the CPU; skipped where none is shown to the tests.

VOCAL_MASK_GPU=0 python -m pytest tests/test_cuda.py
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_run import HP, first_batch, go

import audio
import dataset
import model
from dataset import Feed
from hparams import UNTUNED_MASK
from learning import run as training
from separation import Separator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
EXACT = replace(HP, precision="float32")
EVERYTHING = replace(EXACT, equalizer_db=3, second_voice=1, second_backing=1, trim=0.3)


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """A run lets float32 be TF32; here it is float32."""
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)


def run_on(device: torch.device, songs, hp=EXACT, resident: bool = True) -> training.Run:
    return training.Run(hp, Feed(songs, hp, device, resident), songs[:1])


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("hp", [EXACT, EVERYTHING], ids=["plain", "everything"])
def test_the_gpu_is_fed_what_lies_on_the_disk(songs, hp, resident):
    plan = dataset.plan_epoch(songs, hp, 0)
    batches = dataset.batches_of(plan, hp)
    feed = Feed(songs, hp, GPU, resident)
    for batch, fed in zip(batches, feed.batches(batches), strict=True):
        spectrograms = feed.spectrograms(fed)
        assert spectrograms.is_cuda
        np.testing.assert_array_equal(spectrograms.cpu(), dataset.read_batch(songs, batch, hp))
        for name, values in vars(batch).items():
            np.testing.assert_array_equal(getattr(fed, name).cpu(), values)


@pytest.mark.parametrize("hp", [EXACT, EVERYTHING], ids=["plain", "everything"])
def test_a_step_on_the_gpu_is_the_step_on_the_cpu(songs, hp):
    norms, losses, weights = [], [], []
    for device in (CPU, GPU):
        run = run_on(device, songs, hp)
        loss, norm = run.take_step(first_batch(run))
        losses.append(float(loss))
        norms.append(float(norm))
        weights.append(torch.cat([w.detach().cpu().flatten() for w in run.model.parameters()]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-3)
    moved = weights[0] - torch.cat(
        [w.detach().flatten() for w in run_on(CPU, songs, hp).model.parameters()]
    )
    # Adam's first step moves weights with tiny gradients by their signs: a few may disagree.
    difference = (weights[1] - weights[0]).norm() / moved.norm()
    assert difference < 0.05, difference


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("hp", [EXACT, EVERYTHING], ids=["plain", "everything"])
def test_a_captured_step_is_the_step_as_it_is(songs, hp, resident):
    captured, plain = run_on(GPU, songs, hp, resident), run_on(GPU, songs, hp, resident)
    plain.take_step._is_captured = False
    for run in (captured, plain):
        go(run, until=14)  # beyond the warm-up and into the second epoch
    assert captured.take_step._graph is not None
    assert plain.take_step._graph is None
    np.testing.assert_allclose(captured.losses, plain.losses, rtol=1e-3)
    for one, other in zip(captured.averaged.parameters(), plain.averaged.parameters(), strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_a_run_goes_on_on_the_other_device(songs, tmp_path):
    for first, second in ((GPU, CPU), (CPU, GPU)):
        path = tmp_path / f"{first}.pth"
        run = go(run_on(first, songs), until=2)
        run.write(path)
        resumed = run_on(second, songs)
        resumed.restore(model.load_checkpoint(path))
        assert resumed.step == 2
        for one, other in zip(resumed.model.parameters(), run.model.parameters(), strict=True):
            assert torch.equal(one.cpu(), other.cpu())
            moments = (r.optimizer.state[w]["exp_avg"] for r, w in ((resumed, one), (run, other)))
            assert torch.equal(*(moment.cpu() for moment in moments))
        assert resumed.model.head.weight.device.type == second.type
        go(resumed)
        assert resumed.is_finished
        assert np.isfinite(resumed.losses).all()


@pytest.mark.parametrize("model_type", ["resnet18", "convnet"])
def test_a_song_is_separated_as_on_the_cpu(model_type):
    hp = replace(EXACT, model_type=model_type, width=8)
    torch.manual_seed(0)
    network = model.build_model(hp).eval()
    rng = np.random.default_rng(0)
    wav = 0.1 * rng.standard_normal((2, 3 * 4000), np.float32)
    found = []
    for device in (CPU, GPU):
        curve_db = audio.weighting_curve_db(hp)
        separator = Separator(copy.deepcopy(network), hp, curve_db, dict(UNTUNED_MASK), device)
        found.append(separator.separate(wav, 4000)[0])
    # Masks are rounded to 8 bits: a bin at the edge of a step may fall to either side.
    np.testing.assert_allclose(found[1], found[0], atol=0.3 / 255)
    assert np.abs(found[1] - found[0]).mean() < 2e-6
