"""The front end: the same sound gives the same numbers at every rate, and nothing is lost."""

from __future__ import annotations

import math

import librosa
import numpy as np
import pytest
import scipy.signal
import soundfile
import torch

import audio
from audio import Grid, grid_at
from hparams import HParams, InputError
from scoring.metrics import si_sdr

HP = HParams()
RATES = (8000, 11025, 16000, 22050, 32000, 44100, 48000, 88200, 96000, 192_000)
NATIVE = grid_at(44100, HP)
SMALL = Grid(1000, 32, 8)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32))


def complex_noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Make magnitudes from -150 to +20 dB, and some exact zeros."""
    rng = np.random.default_rng(seed)
    magnitude = 10 ** rng.uniform(-7.5, 1, shape) * (rng.uniform(size=shape) > 0.05)
    return torch.from_numpy(magnitude * np.exp(1j * rng.uniform(-9, 9, shape))).to(torch.complex64)


def real_song(data_folder, seconds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read vocals and accompaniment of a stretch of a real song, mono, 44.1 kHz."""
    folder = data_folder / "dsd100" / "Lithium"
    n_samples, start = seconds * 44100, 60 * 44100

    def read(name: str) -> np.ndarray:
        path = folder / f"{name}.ogg"
        return soundfile.read(path, n_samples, start, dtype="float32")[0].mean(1)

    vocals, *others = (read(name) for name in ("vocals", "bass", "drums", "other"))
    return torch.from_numpy(vocals), torch.from_numpy(sum(others))


# --- The grid -----------------------------------------------------------------------------------


def test_the_usual_rates_have_the_windows_that_the_design_names():
    assert grid_at(22050, HP) == (22050, 1024, 256)
    assert grid_at(44100, HP) == (44100, 2048, 512)
    assert grid_at(48000, HP) == (48000, 2240, 560)
    assert grid_at(88200, HP) == (88200, 4096, 1024)
    assert grid_at(96000, HP) == (96000, 4480, 1120)


@pytest.mark.parametrize("rate", [*RATES, 4000, 44056, 176_400, 384_000])
def test_windows_last_equally_long_at_every_rate(rate):
    grid, exact = grid_at(rate, HP), 256 * rate / 22050
    assert abs(grid.hop_length / exact - 1) <= 0.01
    assert grid.n_fft == 4 * grid.hop_length
    assert grid.n_bins == grid.n_fft // 2 + 1
    bin_hz = rate / grid.n_fft
    assert abs(bin_hz / (22050 / 1024) - 1) <= 0.0101


@pytest.mark.parametrize("rate", RATES)
def test_the_window_is_the_nearest_of_those_with_a_fast_transform(rate):
    def is_fast(number: int) -> bool:
        return (2 * 3 * 5 * 7) ** 12 % number == 0  # no prime above 7 divides it

    exact = 256 * rate / 22050
    fast = [h for h in range(1, 2 * round(exact)) if abs(h / exact - 1) <= 0.01 and is_fast(h)]
    hop = grid_at(rate, HP).hop_length
    assert hop == min(fast, key=lambda h: abs(h - exact)) if fast else not is_fast(hop)


def test_other_grids_keep_their_number_of_hops_and_tiny_ones_are_rounded():
    assert grid_at(44100, HParams(n_fft=4096)) == (44100, 8192, 512)
    tiny = HParams(sample_rate=22050, n_fft=16, hop_length=4)  # no whole hop within 1 %
    assert grid_at(24000, tiny) == (24000, 16, 4)
    assert grid_at(4000, tiny) == (4000, 4, 1)


@pytest.mark.parametrize("rate", RATES)
def test_a_tone_of_amplitude_a_has_magnitude_a_at_every_rate(rate):
    grid, amplitude, k = grid_at(rate, HP), 0.37, 46  # about 990 Hz
    n = np.arange(20 * grid.n_fft)
    wav = amplitude * np.cos(2 * np.pi * k * n / grid.n_fft + 0.3)
    magnitude = audio.stft(torch.from_numpy(wav.astype(np.float32)), grid).abs()
    inner = magnitude[:, 4:-4].numpy()
    np.testing.assert_allclose(inner[k], amplitude, rtol=1e-5)
    np.testing.assert_allclose(inner[[k - 1, k + 1]], amplitude / 2, rtol=1e-4)  # Hann's leakage
    assert inner[: k - 1].max() < 1e-5
    assert inner[k + 2 :].max() < 1e-5


# --- The transform and its inverse --------------------------------------------------------------


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


def test_a_song_is_in_single_precision_with_time_varying_slowest_in_memory():
    spec = audio.stft(noise(2, 5000), NATIVE)
    assert spec.dtype == torch.complex64
    assert spec.shape == (2, 1025, 10)
    assert spec.mT.is_contiguous()
    assert audio.istft(spec, NATIVE, 5000).dtype == torch.float32


@pytest.mark.parametrize("n_samples", [0, 1, 511, 512, 513, 2047, 2048, 2049, 5119, 10_001])
@pytest.mark.parametrize("grid", [NATIVE, grid_at(48000, HP), Grid(22050, 1024, 128)])
def test_a_waveform_comes_back_from_its_spectrogram(grid, n_samples):
    for shape in ((n_samples,), (2, n_samples), (2, 3, n_samples)):
        wav = noise(*shape)
        before = wav.clone()
        spec = audio.stft(wav, grid)
        assert spec.shape == (*shape[:-1], grid.n_bins, 1 + n_samples // grid.hop_length)
        assert spec.shape[-1] == grid.n_frames(n_samples)
        spec_before = spec.clone()
        back = audio.istft(spec, grid, n_samples)
        assert back.shape == wav.shape
        np.testing.assert_allclose(back, wav, atol=1e-6)
        assert torch.equal(wav, before)
        assert torch.equal(spec, spec_before)


def test_a_whole_last_hop_may_be_asked_for():
    wav = noise(5119)
    longer = audio.istft(audio.stft(wav, NATIVE), NATIVE, 5120)
    np.testing.assert_allclose(longer[:-1], wav, atol=1e-6)
    assert longer.shape == (5120,)


def test_the_loudest_and_the_quietest_come_back_with_the_same_precision():
    wav = noise(10_001)
    for gain in (1e-20, 1e20):
        back = audio.istft(audio.stft(gain * wav, NATIVE), NATIVE, 10_001)
        np.testing.assert_allclose(back / gain, wav, atol=1e-6)
    silence = torch.zeros(10_001)
    assert not audio.stft(silence, NATIVE).any()
    assert torch.equal(audio.istft(audio.stft(silence, NATIVE), NATIVE, 10_001), silence)


def test_a_click_is_heard_only_in_the_frames_around_it():
    wav = torch.zeros(20_000)
    wav[9000] = 1
    heard = audio.stft(wav, NATIVE).abs().amax(0) > 0
    centres = 512 * np.arange(40)
    np.testing.assert_array_equal(heard, abs(centres - 9000) < 1024)


def test_frames_of_a_stretch_are_those_of_the_whole_song():
    wav = noise(2, 400)
    whole = audio.stft(wav, SMALL)
    stretch = wav[:, 10 * 8 - 16 : 20 * 8 - 16 + 32 + 7]  # frames 10 to 20, and 7 samples more
    np.testing.assert_allclose(audio.frames_to_spec(stretch, SMALL), whole[..., 10:21], atol=1e-7)


@pytest.mark.parametrize("grid", [SMALL, Grid(1000, 48, 8)])
@pytest.mark.parametrize("n_frames", [1, 2, 11])
def test_overlap_add_is_the_sum_of_windowed_inverses(grid, n_frames):
    spec = complex_noise(2, grid.n_bins, n_frames)
    window = scipy.signal.get_window("hann", grid.n_fft)
    expected = np.zeros((2, grid.n_fft + (n_frames - 1) * grid.hop_length))
    for i in range(n_frames):
        frame = np.fft.irfft(spec[..., i].numpy().astype(complex), grid.n_fft, axis=-1)
        start = i * grid.hop_length
        expected[:, start : start + grid.n_fft] += frame * grid.n_fft / 4 * window
    np.testing.assert_allclose(audio.spec_to_frames(spec, grid), expected, rtol=1e-5, atol=1e-4)


def test_the_envelope_is_the_sum_of_squared_windows_of_the_frames_that_are_there():
    present = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 1, 0], dtype=torch.float32)
    window = scipy.signal.get_window("hann", 32)
    expected = np.zeros(32 + 9 * 8)
    for i in np.flatnonzero(present):
        expected[8 * i : 8 * i + 32] += window**2
    found = audio.envelope(present, SMALL)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not found[:17].any()
    inner = audio.envelope(torch.ones(10), SMALL)[24:-24]
    np.testing.assert_allclose(inner, 1.5, rtol=1e-6)  # four overlapping squared Hann windows


@pytest.mark.parametrize("n_samples", [0, 1, 7, 8, 9, 31, 33, 100])
def test_the_envelope_is_never_small_within_a_song(n_samples):
    n_frames = SMALL.n_frames(n_samples)
    envelope = audio.envelope(torch.ones(n_frames), SMALL)[16 : 16 + n_frames * 8]
    assert envelope.min() >= 0.25
    assert len(envelope) >= n_samples


# --- The network's bins -------------------------------------------------------------------------


def test_the_network_sees_513_bins_at_every_rate():
    for rate in RATES:
        grid = grid_at(rate, HP)
        spec = complex_noise(2, grid.n_bins, 3)
        seen = audio.to_network_bins(spec, HP)
        n_same = min(513, grid.n_bins)
        assert seen.shape == (2, 513, 3)
        assert torch.equal(seen[:, :n_same], spec[:, :n_same])
        assert not seen[:, n_same:].any()
    assert grid_at(8000, HP).n_bins == 185, "the zeros were tried"


# --- The ear ------------------------------------------------------------------------------------


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


def test_the_a_curve_is_librosas_and_does_not_fall_below_80_db():
    f = np.concatenate([[0, 1e-6, 0.1, 1, 5], np.linspace(10, 200_000, 999)])
    found = audio.a_weighting_db(torch.from_numpy(f))
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(found, librosa.A_weighting(f), atol=2e-5)
    assert found[0] == found.min() == -80
    assert found.dtype == torch.float32


def test_the_curve_lies_on_the_bins_own_frequencies_or_on_mel_spaced_ones():
    linear = audio.weighting_curve_db(HP)
    with np.errstate(divide="ignore"):
        expected = librosa.A_weighting(librosa.fft_frequencies(sr=22050, n_fft=1024))
    np.testing.assert_allclose(linear, expected, atol=1e-5)
    mel = audio.weighting_curve_db(HParams(weighting="mel"))
    expected = librosa.A_weighting(librosa.mel_frequencies(513, fmin=20, fmax=11025))
    np.testing.assert_allclose(mel, expected, atol=1e-5)
    assert linear.dtype == mel.dtype == torch.float32
    np.testing.assert_allclose(mel[0], -50.4, atol=0.05)  # 20 Hz itself; IEC's 19.95 Hz has -50.5
    low = audio.weighting_curve_db(HParams(weighting="mel", sample_rate=16000))
    expected = librosa.A_weighting(librosa.mel_frequencies(513, fmin=20, fmax=8000))
    np.testing.assert_allclose(low, expected, atol=1e-5)


# --- Features -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["linear", "mel"])
@pytest.mark.parametrize("power", [2.0, 3.0])
@pytest.mark.parametrize("min_level_db", [-100.0, -60.0])
def test_features_are_decibels_weighted_and_scaled(weighting, power, min_level_db):
    hp = HParams(weighting=weighting, min_level_db=min_level_db)
    spec, curve_db = complex_noise(2, 513, 40), audio.weighting_curve_db(hp)
    before = spec.clone(), curve_db.clone()
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
    assert torch.equal(spec, before[0])
    assert torch.equal(curve_db, before[1])


def test_a_tone_at_1_khz_has_the_level_that_its_amplitude_says():
    flat = torch.zeros(513)
    for amplitude, power, expected in (
        (1, 2, 1.0),
        (0.1, 2, 0.8),  # -20 dB of 100
        (0.1, 3, 0.7),  # cubed: -30 dB
        (1e-3, 2, 0.4),
        (1e-5, 2, 0.0),  # the end of the scale
        (1e-6, 2, 0.0),
    ):
        spec = torch.full((513, 1), amplitude, dtype=torch.complex64)
        np.testing.assert_allclose(audio.features(spec, flat, power, HP), expected, atol=1e-6)


def test_silence_is_0_and_the_loudest_is_1():
    for weighting in ("linear", "mel"):
        hp = HParams(weighting=weighting)
        curve_db = audio.weighting_curve_db(hp)
        for power in (2.0, 3.0):
            silence = torch.zeros(513, 4, dtype=torch.complex64)
            assert not audio.features(silence, curve_db, power, hp).any()
            for loudness in (1e4, 1e30):
                loud = torch.full((513, 4), loudness, dtype=torch.complex64)
                assert (audio.features(loud, curve_db, power, hp) == 1).all()
    quietest = HParams(min_level_db=-98, mixture_power=1)  # just allowed
    silence = torch.zeros(513, 4, dtype=torch.complex64)
    assert not audio.features(silence, audio.weighting_curve_db(quietest), 1, quietest).any()


def test_a_feature_does_not_change_with_what_sounds_far_away():
    curve_db = audio.weighting_curve_db(HP)

    def hear(wav: torch.Tensor) -> torch.Tensor:
        spec = audio.to_network_bins(audio.stft(wav, NATIVE), HP)
        return audio.features(spec, curve_db, 2.0, HP)

    quiet = 1e-3 * noise(44100)
    loud = quiet.clone()
    loud[30_000:] = noise(14_100, seed=1)  # librosa's top_db would floor all 80 dB below this
    here, there = hear(quiet), hear(loud)
    n_before = (30_000 - 1024) // 512 + 1  # frames that end before the change
    assert torch.equal(here[:, :n_before], there[:, :n_before])
    assert not torch.equal(here[:, n_before], there[:, n_before])


def test_a_curve_of_another_length_is_refused():
    with pytest.raises(InputError, match="a spectrogram of 1025 bins, a curve of 513"):
        audio.features(complex_noise(1025, 3), torch.zeros(513), 2.0, HP)


# --- Slices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 3, 40])
@pytest.mark.parametrize("n_frames", [1, 2, 24, 25, 61])
@pytest.mark.parametrize("stft_frames", [1, 5, 25])
def test_every_slice_is_centred_on_its_frame_with_silence_around_the_song(
    n_frames, stft_frames, stride
):
    hp = HParams(stft_frames=stft_frames, stft_stride=stride)
    features = noise(7, n_frames)
    found = audio.slices(features, hp)
    n_slices = math.ceil(n_frames / stride)
    expected = np.zeros((n_slices, 1, 7, stft_frames), np.float32)
    for i in range(n_slices):
        for j in range(stft_frames):
            frame = i * stride + j - stft_frames // 2
            if 0 <= frame < n_frames:
                expected[i, 0, :, j] = features[:, frame]
    np.testing.assert_array_equal(found, expected)


# --- Masks --------------------------------------------------------------------------------------


def test_a_binary_mask_is_1_above_the_threshold_and_not_at_it():
    mask = torch.tensor([0.0, 0.2, 0.5, np.nextafter(np.float32(0.5), 1), 1.0])
    found = audio.vocals_mask(mask, True, 0.5, noise_gate=0.9)
    np.testing.assert_array_equal(found, [0, 0, 0, 1, 1])
    assert found.dtype == mask.dtype
    np.testing.assert_array_equal(audio.vocals_mask(mask, True, 0.0, 0.0), [0, 1, 1, 1, 1])
    np.testing.assert_array_equal(audio.vocals_mask(mask, True, 1.0, 0.0), [0, 0, 0, 0, 0])


def test_a_soft_mask_keeps_what_reaches_the_gate():
    below = np.nextafter(np.float32(0.25), 0)
    mask = torch.tensor([0.0, 0.1, below, 0.25, 0.7, 1.0])
    before = mask.clone()
    found = audio.vocals_mask(mask, False, eval_mask_threshold=0.5, noise_gate=0.25)
    np.testing.assert_array_equal(found, mask * torch.tensor([0, 0, 0, 1, 1, 1]))
    assert torch.equal(mask, before)
    assert found.dtype == mask.dtype
    assert torch.equal(audio.vocals_mask(mask, False, 0.5, 0.0), mask)
    np.testing.assert_array_equal(audio.vocals_mask(mask, False, 0.5, 1.0), [0, 0, 0, 0, 0, 1])


def test_a_threshold_on_one_of_the_256_levels_does_not_reach_it():
    mask = audio.quantize_mask(torch.arange(256) / 255)
    for level in range(0, 256, 5):
        binary = audio.vocals_mask(mask, True, level / 255, 0.0)
        soft = audio.vocals_mask(mask, False, 0.5, level / 255)
        assert binary.sum() == 255 - level
        assert (soft > 0).sum() == min(255, 256 - level)


@pytest.mark.parametrize("mask_at_eval", [True, False])
def test_vocals_and_accompaniment_add_up_to_the_mixture(mask_at_eval):
    wav = noise(2, 10_001)
    spec = audio.stft(wav, NATIVE)
    mask = audio.quantize_mask(noise(513, spec.shape[-1], seed=1).abs())
    mask = audio.vocals_mask(mask, mask_at_eval, 0.4, 0.2)[None]
    assert mask.min() >= 0
    assert mask.max() <= 1
    np.testing.assert_allclose(mask + (1 - mask), 1, rtol=1e-6)
    vocals = audio.istft(audio.apply_mask(spec, mask), NATIVE, 10_001)
    accompaniment = audio.istft(audio.apply_mask(spec, 1 - mask), NATIVE, 10_001)
    assert vocals.abs().max() > 0.1
    np.testing.assert_allclose(vocals + accompaniment, wav, atol=2e-6)


def test_a_mask_has_256_levels_and_rounds_to_the_nearest():
    mask = torch.linspace(0, 1, 10_001)
    found = audio.quantize_mask(mask)
    assert len(found.unique()) == 256
    assert (found[0], found[-1]) == (0, 1)
    np.testing.assert_allclose(found, mask, atol=0.5001 / 255)
    np.testing.assert_allclose(found * 255, (found * 255).round(), atol=1e-4)
    assert torch.equal(mask, torch.linspace(0, 1, 10_001))


def test_a_saved_mask_renders_again_bit_for_bit():
    found = audio.quantize_mask(noise(1000).abs())
    saved = (found * 255).round().to(torch.uint8)
    assert torch.equal(saved / 255, found)
    assert torch.equal(audio.quantize_mask(found), found)


def rounding_cost_db(vocals: torch.Tensor, accompaniment: torch.Tensor, grid: Grid) -> float:
    """SI-SDR that an ideal ratio mask loses by its 256 levels [dB]."""
    specs = [audio.stft(wav, grid) for wav in (vocals, accompaniment)]
    mask, mixture = audio.ideal_ratio_mask(*specs), specs[0] + specs[1]
    exact, rounded = (
        si_sdr(audio.istft(mixture * m, grid, len(vocals)).numpy(), vocals.numpy())
        for m in (mask, audio.quantize_mask(mask))
    )
    assert 1 < exact < 40
    return exact - rounded


def test_rounding_a_ratio_mask_costs_less_than_a_fiftieth_of_a_decibel(toy_tree):
    (vocals,) = toy_tree.glob("Sources/Test/*/vocals.wav")
    stems = [soundfile.read(p, dtype="float32")[0].mean(1) for p in vocals.parent.glob("*.wav")]
    wav = soundfile.read(vocals, dtype="float32")[0].mean(1)
    others = torch.from_numpy(sum(stems) - wav)
    assert abs(rounding_cost_db(torch.from_numpy(wav), others, grid_at(22050, HP))) < 0.02


def test_rounding_costs_as_little_on_a_real_song(data_folder):
    assert abs(rounding_cost_db(*real_song(data_folder, 12), NATIVE)) < 0.02


@pytest.mark.parametrize("n_masks", [1, 2])
def test_the_bins_above_the_networks_get_the_voices_share_of_its_top_bins(n_masks):
    spec, mask = complex_noise(2, 1025, 6), noise(n_masks, 513, 6).abs()
    spec[..., 3] = 0  # silence
    before = mask.clone()
    found = audio.apply_mask(spec, mask)
    assert torch.equal(found[:, :513], spec[:, :513] * mask)
    top = slice(513 - 32, 513)
    energy = np.square(np.abs(spec[:, top].numpy()))
    energy = energy if n_masks == 2 else energy.sum(0, keepdims=True)
    with np.errstate(invalid="ignore"):
        share = np.nan_to_num((mask[:, top].numpy() * energy).sum(1) / energy.sum(1))
    assert 0 < share[0, 0] < 1
    np.testing.assert_allclose(found[:, 513:], spec[:, 513:].numpy() * share[:, None], rtol=1e-5)
    assert torch.equal(mask, before)


def test_an_open_mask_changes_nothing_and_a_closed_one_leaves_nothing():
    spec = complex_noise(3, 1025, 6)
    assert torch.equal(audio.apply_mask(spec, torch.ones(1, 513, 6)), spec)
    assert not audio.apply_mask(spec, torch.zeros(1, 513, 6)).any()


def test_a_low_rate_gets_the_lower_part_of_the_mask():
    mask, spec = noise(1, 513, 6).abs(), complex_noise(2, 513, 6)
    assert torch.equal(audio.apply_mask(spec, mask), spec * mask)
    assert torch.equal(audio.apply_mask(spec[:, :185], mask), spec[:, :185] * mask[:, :185])


@pytest.mark.parametrize("sharpness", [0.5, 2.0])
def test_sharpness_is_an_exponent_and_the_gate_asks_the_network(sharpness):
    mask = torch.tensor([0.0, 0.2, 0.3, 0.7, 1.0])
    found = audio.vocals_mask(mask, False, 0.5, 0.25, mask_sharpness=sharpness)
    np.testing.assert_allclose(found, [0, 0, 0.3**sharpness, 0.7**sharpness, 1], rtol=1e-6)
    assert torch.equal(audio.vocals_mask(mask, True, 0.25, 0.0, sharpness), (mask > 0.25).float())


def test_ideal_masks_are_what_one_works_out_by_hand():
    vocals = torch.tensor([[3 + 4j, 1, 0, 2, 0, -3j, 3 + 4j]])
    accompaniment = torch.tensor([[5, 2j, 1, 0, 0, 1, -5.5]])
    binary = audio.ideal_binary_mask(vocals, accompaniment)
    np.testing.assert_array_equal(binary, [[0, 0, 0, 1, 0, 1, 0]])  # a draw is not the voice's
    ratio = audio.ideal_ratio_mask(vocals, accompaniment)
    np.testing.assert_allclose(ratio, [[0.5, 0.2, 0, 1, 0, 0.9, 25 / 55.25]], rtol=1e-6)
    assert binary.dtype == ratio.dtype == torch.float32


def test_ideal_masks_of_voice_and_accompaniment_share_every_sounding_bin():
    vocals, accompaniment = complex_noise(513, 50), complex_noise(513, 50, seed=1)
    sounding = (vocals.abs() + accompaniment.abs()) > 1e-9
    for ideal in (audio.ideal_binary_mask, audio.ideal_ratio_mask):
        total = ideal(vocals, accompaniment) + ideal(accompaniment, vocals)
        np.testing.assert_allclose(total[sounding], 1, rtol=1e-6)
        assert not total[~sounding].any()
    ratio = audio.ideal_ratio_mask(vocals, accompaniment)
    assert torch.equal(ratio > 0.5, audio.ideal_binary_mask(vocals, accompaniment) == 1)


def test_no_mask_brings_the_mixture_nearer_to_the_voice_than_the_phase_mask():
    hand = [[1.0, 0, 2, 1j, 3, 0]], [[1.0, 1, -1, 1, -1, 0]]  # shares: 1/2, 0, 2, 1/2, 3/2, none
    found = audio.ideal_phase_mask(*map(torch.tensor, hand))
    np.testing.assert_allclose(found, [[0.5, 0, 1, 0.5, 1, 0]], atol=1e-6)
    vocals, accompaniment = complex_noise(20, 30), complex_noise(20, 30, seed=1)
    mixture = vocals + accompaniment
    best = (audio.ideal_phase_mask(vocals, accompaniment) * mixture - vocals).abs()
    for value in torch.linspace(0, 1, 101):
        assert (best <= (value * mixture - vocals).abs() + 1e-5).all()


def test_ideal_masks_find_most_of_a_real_voice(data_folder):
    vocals, accompaniment = real_song(data_folder, 12)
    specs = [audio.stft(wav, NATIVE) for wav in (vocals, accompaniment)]
    scores = [si_sdr((vocals + accompaniment).numpy(), vocals.numpy())]
    for ideal in (audio.ideal_binary_mask, audio.ideal_ratio_mask, audio.ideal_phase_mask):
        wav = audio.istft(sum(specs) * ideal(*specs), NATIVE, len(vocals))
        scores.append(si_sdr(wav.numpy(), vocals.numpy()))
    assert scores[0] + 5 < scores[1] < scores[2] < scores[3], "mixture, binary, ratio, phase"
