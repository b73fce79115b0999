"""The front end: the same sound gives the same numbers at every rate, and nothing is lost."""

import librosa
import numpy as np
import pytest
import scipy.signal
import torch

import audio
from audio import Grid, grid_at
from hparams import HParams

HP = HParams()
RATES = (8000, 11025, 16000, 22050, 32000, 44100, 48000, 88200, 96000, 192_000)
NATIVE = grid_at(44100, HP)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32))


def complex_noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Make magnitudes from -150 to +20 dB, and some exact zeros."""
    rng = np.random.default_rng(seed)
    magnitude = 10 ** rng.uniform(-7.5, 1, shape) * (rng.uniform(size=shape) > 0.05)
    return torch.from_numpy(magnitude * np.exp(1j * rng.uniform(-9, 9, shape))).to(torch.complex64)


def test_windows_last_equally_long_at_every_rate():
    assert grid_at(22050, HP) == (22050, 1024, 256)
    assert grid_at(44100, HP) == (44100, 2048, 512)
    assert grid_at(48000, HP) == (48000, 2240, 560)
    assert grid_at(44100, HParams(n_fft=4096)) == (44100, 8192, 512)
    for rate in (*RATES, 4000, 44056, 176_400, 384_000):
        grid, exact = grid_at(rate, HP), 256 * rate / 22050
        assert abs(grid.hop_length / exact - 1) <= 0.01
        assert grid.n_fft == 4 * grid.hop_length
        assert grid.n_bins == grid.n_fft // 2 + 1
    tiny = HParams(sample_rate=22050, n_fft=16, hop_length=4)  # no whole hop within 1 %
    assert [grid_at(rate, tiny) for rate in (24000, 4000)] == [(24000, 16, 4), (4000, 4, 1)]


@pytest.mark.parametrize("n_samples", [1, 700, 2048, 10_001])
def test_the_stft_is_that_of_scipy_and_of_torch(n_samples):
    wav = noise(n_samples).double()
    found = audio.stft(wav, NATIVE).numpy()
    window = torch.hann_window(2048, dtype=torch.double)
    options = {"center": True, "pad_mode": "constant", "return_complex": True}
    expected = torch.stft(wav, 2048, 512, 2048, window, **options) * (2 / window.sum())
    np.testing.assert_allclose(found, expected, atol=1e-12)
    if n_samples >= 2048:  # scipy shortens the window to the signal
        expected = 2 * scipy.signal.stft(wav.numpy(), nperseg=2048, noverlap=1536, padded=False)[2]
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("n_samples", [0, 1, 511, 2049])
@pytest.mark.parametrize("grid", [NATIVE, Grid(22050, 1024, 128)])
def test_a_waveform_comes_back_from_its_spectrogram(grid, n_samples):
    for shape in ((n_samples,), (2, n_samples), (2, 3, n_samples)):
        wav = noise(*shape)
        spec = audio.stft(wav, grid)
        assert spec.shape == (*shape[:-1], grid.n_bins, 1 + n_samples // grid.hop_length)
        assert spec.shape[-1] == grid.n_frames(n_samples)
        back = audio.istft(spec, grid, n_samples)
        assert back.shape == wav.shape
        np.testing.assert_allclose(back, wav, atol=1e-6)


def test_the_a_curve_is_the_one_that_iec_61672_prints():
    table = {  # table 3, nominal frequency in Hz: A in dB
        **{10: -70.4, 12.5: -63.4, 16: -56.7, 20: -50.5, 25: -44.7, 31.5: -39.4, 40: -34.6},
        **{50: -30.2, 63: -26.2, 80: -22.5, 100: -19.1, 125: -16.1, 160: -13.4, 200: -10.9},
        **{250: -8.6, 315: -6.6, 400: -4.8, 500: -3.2, 630: -1.9, 800: -0.8, 1000: 0.0},
        **{1250: 0.6, 1600: 1.0, 2000: 1.2, 2500: 1.3, 3150: 1.2, 4000: 1.0, 5000: 0.5},
        **{6300: -0.1, 8000: -1.1, 10000: -2.5, 12500: -4.3, 16000: -6.6, 20000: -9.3},
    }
    exact = 1000 * 10 ** (np.arange(-20, 14) / 10)  # what the nominal frequencies stand for
    found = audio.a_weighting_db(torch.from_numpy(exact))
    np.testing.assert_allclose(found, list(table.values()), atol=0.0501)


def test_the_curve_lies_on_the_bins_own_frequencies_or_on_mel_spaced_ones():
    linear, mel = (audio.weighting_curve_db(HParams(weighting=w)) for w in ("linear", "mel"))
    with np.errstate(divide="ignore"):
        expected = librosa.A_weighting(librosa.fft_frequencies(sr=22050, n_fft=1024))
    np.testing.assert_allclose(linear, expected, atol=2e-5)
    assert linear[0] == -80
    low = audio.weighting_curve_db(HParams(weighting="mel", sample_rate=16000))
    for curve_db, top in ((mel, 11025), (low, 8000)):
        expected = librosa.A_weighting(librosa.mel_frequencies(513, fmin=20, fmax=top))
        np.testing.assert_allclose(curve_db, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("weighting", "power", "min_level_db"), [("linear", 2.0, -100.0), ("mel", 3.0, -60.0)]
)
def test_features_are_decibels_weighted_and_scaled(weighting, power, min_level_db):
    hp = HParams(weighting=weighting, min_level_db=min_level_db)
    spec, curve_db = complex_noise(2, 513, 40), audio.weighting_curve_db(hp)
    found = audio.features(spec, curve_db, power, hp)

    magnitude = np.abs(spec.numpy().astype(complex))
    # As librosa.amplitude_to_db(magnitude, amin=1e-10, top_db=None), which takes 20 s to compile.
    amplitude_db = 20 * np.log10(np.maximum(magnitude, 1e-10))
    level_db = power / 2 * amplitude_db + curve_db.numpy()[:, None]
    expected = np.clip(1 - level_db / min_level_db, 0, 1)
    np.testing.assert_allclose(found, expected, atol=3e-6)
    assert 0 < (expected == 0).mean() < 0.9, "both ends of the scale were tried"
    assert 0 < (expected == 1).mean() < 0.9
    assert found.dtype == torch.float32


def test_a_mask_is_binary_above_the_threshold_or_soft_from_the_gate_on():
    mask = torch.tensor([0.0, 0.2, 0.25, 0.7, 1.0])
    for settings, expected in (
        ((True, 0.25, 0.9), [0, 0, 0, 1, 1]),  # binary, threshold, noise gate
        ((True, 0.0, 0.0), [0, 1, 1, 1, 1]),
        ((True, 1.0, 0.0), [0, 0, 0, 0, 0]),
        ((True, 0.2, 0.0, 2.0), [0, 0, 1, 1, 1]),
        ((False, 0.5, 0.25), [0, 0, 0.25, 0.7, 1]),
        ((False, 0.5, 1.0), [0, 0, 0, 0, 1]),
        ((False, 0.5, 0.25, 0.5), [0, 0, 0.5, 0.7**0.5, 1]),
        ((False, 0.5, 0.25, 2.0), [0, 0, 0.0625, 0.49, 1]),
    ):
        found = audio.vocals_mask(mask, *settings)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert found.dtype == mask.dtype


@pytest.mark.parametrize("n_masks", [1, 2])
def test_the_bins_above_the_networks_get_the_voices_share_of_its_top_bins(n_masks):
    spec, mask = complex_noise(2, 1025, 6), noise(n_masks, 513, 6).abs()
    spec[..., 3] = 0  # silence
    found = audio.apply_mask(spec, mask)
    assert torch.equal(found[:, :513], spec[:, :513] * mask)
    top = slice(513 - 32, 513)
    energy = np.square(np.abs(spec[:, top].numpy()))
    energy = energy if n_masks == 2 else energy.sum(0, keepdims=True)
    with np.errstate(invalid="ignore"):
        share = np.nan_to_num((mask[:, top].numpy() * energy).sum(1) / energy.sum(1))
    assert 0 < share[0, 0] < 1
    np.testing.assert_allclose(found[:, 513:], spec[:, 513:].numpy() * share[:, None], rtol=1e-5)


def test_no_mask_brings_the_mixture_nearer_to_the_voice_than_the_phase_mask():
    hand = [[1.0, 0, 2, 1j, 3, 0]], [[1.0, 1, -1, 1, -1, 0]]  # shares: 1/2, 0, 2, 1/2, 3/2, none
    found = audio.ideal_phase_mask(*map(torch.tensor, hand))
    np.testing.assert_allclose(found, [[0.5, 0, 1, 0.5, 1, 0]], atol=1e-6)
    vocals, accompaniment = complex_noise(20, 30), complex_noise(20, 30, seed=1)
    mixture = vocals + accompaniment
    best = (audio.ideal_phase_mask(vocals, accompaniment) * mixture - vocals).abs()
    for value in torch.linspace(0, 1, 101):
        assert (best <= (value * mixture - vocals).abs() + 1e-5).all()
