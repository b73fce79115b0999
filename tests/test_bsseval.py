"""BSSEval: museval's and mir_eval's numbers, closed forms, invariances, and silence."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from hparams import InputError
from scoring import bsseval
from scoring.bsseval import bss_eval_v3, bss_eval_v4

RATE = 8000


def coloured(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Noise with a falling spectrum, each row with its own."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return torch.from_numpy(noise + 0.7 * np.roll(noise, 1, -1) * (1 + seed % 3) / 3)


def example(n_sources: int, n_channels: int, n_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources, and estimates with leakage, a filter and noise."""
    references = coloured((n_sources, n_channels, n_samples), 1)
    estimates = 0.9 * references + 0.2 * references.roll(1, 0) + 0.3 * references.roll(3, -1)
    return references, estimates + 0.1 * coloured(references.shape, 2)


def bursts(*amplitudes: float) -> list[torch.Tensor]:
    """Noises that never meet, not even delayed by a filter: their energies simply add up."""
    rng = np.random.default_rng(0)
    signals = []
    for i, amplitude in enumerate(amplitudes):
        wav = np.zeros(1200 * len(amplitudes))
        burst = rng.normal(size=600)
        wav[1200 * i : 1200 * i + 600] = burst * (amplitude / np.linalg.norm(burst))
        signals.append(torch.from_numpy(wav))
    return signals


def museval_scores(references, estimates, window, hop) -> list[np.ndarray]:
    metrics = pytest.importorskip("museval.metrics")
    frames_first = [x.numpy().transpose(0, 2, 1) for x in (references, estimates)]
    return list(metrics.bss_eval(*frames_first, window=window, hop=hop)[:4])


def assert_same_scores(found, expected, atol=1e-6):
    """Compare what is below 120 dB; above, every tool measures its own rounding."""
    for name, *both in zip(found._fields, found, expected, strict=True):
        ours, theirs = (np.asarray(score).clip(max=120) for score in both)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=name)


def test_stereo_songs_score_what_museval_gives_silent_frames_included():
    references, estimates = example(2, 2, int(5.4 * RATE))
    references[0, :, RATE : 2 * RATE] = 0
    estimates[1, :, 2 * RATE : 3 * RATE] = 0
    references[1, 0, 3 * RATE : 4 * RATE] = -references[1, 1, 3 * RATE : 4 * RATE]
    found = bss_eval_v4(references, estimates, RATE, RATE)
    assert found.sdr.shape == (2, 5)
    for score in found:
        assert score.isnan().tolist() == [[0, 1, 0, 1, 0], [0, 1, 1, 1, 0]]
        score[0, 2] = math.nan  # museval leaves it out, too, as the other estimate is silent
    assert_same_scores(found, museval_scores(references, estimates, RATE, RATE))


def test_a_silent_estimate_has_no_score_and_takes_none_from_the_other_source():
    references, estimates = example(2, 1, 6000)
    estimates[1, :, 2000:4000] = 0
    found = bss_eval_v4(references, estimates, 2000, 2000)
    again = estimates.clone()
    again[1, :, 3999] = 1e-12  # as good as silent
    expected = bss_eval_v4(references, again, 2000, 2000)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)
        assert ours[1].isnan().tolist() == [False, True, False]
        assert theirs.isfinite().all()
    estimates[1] = 0
    for score in bss_eval_v3(references[:, 0], estimates[:, 0]):
        assert score.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("n_sources", "n_samples", "window", "hop"),
    [
        (2, 9000, 2000, 1000),  # overlap
        (2, 9000, 700, 1900),  # gaps
        (2, 9000, 100, 50),  # shorter than the filters
        (2, 9000, 9000, 9000),
        (2, 5000, 9000, 9000),  # a song that is shorter than a frame
        (2, 300, 8000, 8000),  # and shorter than the filters
        (2, 8192, 512, 512),
        (3, 6100, 2000, 2000),
    ],
)
def test_any_window_and_hop_and_number_of_sources_score_what_museval_gives(
    n_sources, n_samples, window, hop
):
    references, estimates = example(n_sources, 1, n_samples)
    found = bss_eval_v4(references, estimates, window, hop)
    assert_same_scores(found, museval_scores(references, estimates, window, hop))


def test_signals_as_quiet_as_rounding_errors_score_what_museval_gives():
    references, estimates = (1e-9 * signals for signals in example(2, 1, 4000))
    found = bss_eval_v4(references, estimates, 2000, 2000)
    assert_same_scores(found, museval_scores(references, estimates, 2000, 2000))


@pytest.mark.parametrize(("n_sources", "n_samples"), [(2, 12000), (3, 5001), (2, 100_000)])
def test_whole_clips_score_what_mir_eval_gives(n_sources, n_samples):
    separation = pytest.importorskip("mir_eval.separation")
    references, estimates = (x[:, 0] for x in example(n_sources, 1, n_samples))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mir_eval says that the module will go
        expected = separation.bss_eval_sources(
            references.numpy(), estimates.numpy(), compute_permutation=False
        )
    assert_same_scores(bss_eval_v3(references, estimates), expected[:3])


@pytest.mark.parametrize("n_blocks", [1, pytest.param(2, marks=pytest.mark.torture), 4.3])
def test_blocks_change_nothing(n_blocks, monkeypatch):
    """A few systems on a signal that ends in, at and behind the end of a block."""
    for offset in (-512, -511, -510, -1, 0, 1, 300):
        n_samples = round(n_blocks * (2048 - 511)) + offset
        references, estimates = (x[:, 0] for x in example(2, 1, n_samples))
        systems = torch.stack([estimates, references.flip(0) - 0.01 * estimates, 0 * estimates])
        whole = bss_eval_v3(references, systems)
        frames = bss_eval_v4(references[:, None], systems[:, :, None], 250, 250)
        with monkeypatch.context() as patch:
            patch.setattr(bsseval, "BLOCK_FFT", 2048)
            patch.setattr(bsseval, "N_TOGETHER", 3)
            assert_same_scores(bss_eval_v3(references, systems), whole, atol=1e-9)
            again = bss_eval_v4(references[:, None], systems[:, :, None], 250, 250)
            assert_same_scores(again, frames, atol=1e-9)
        assert whole.sdr[:2].isfinite().all()
        assert frames.sdr[:2].isfinite().all()


@pytest.mark.torture
@pytest.mark.parametrize(
    "call", ["bss_eval_v3(*x[:, :, 0])", "bss_eval_v4(*x, 44100, 44100)"], ids=["v3", "v4"]
)
def test_memory_does_not_grow_with_the_song(call):
    code = f"""if True:
        import resource, torch
        from scoring import bsseval

        def peak():  # [MB]
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

        wavs = torch.rand(2, 2, 1, 60 * 44100)
        x = wavs[..., :100_000]
        bsseval.{call}
        before, x = peak(), wavs
        bsseval.{call}
        print(peak() - before)
    """
    command = [sys.executable, "-c", code]
    folder = Path(bsseval.__file__).parents[1]
    ran = subprocess.run(command, cwd=folder, capture_output=True, check=True)
    assert float(ran.stdout) < 40, "the four signals in double precision are 85 MB"


@pytest.mark.slow
@pytest.mark.parametrize("song", ["Lithium", "Potassium"])
def test_real_songs_score_what_museval_gives(data_folder, song):
    soundfile = pytest.importorskip("soundfile")
    stems = {}
    for name in ("vocals", "bass", "drums", "other"):
        path = data_folder / "dsd100" / song / f"{name}.ogg"
        wav, rate = soundfile.read(path, start=100 * 44100, frames=8 * 44100, always_2d=True)
        stems[name] = np.round(wav.T * 32768) / 32768
    vocals = stems.pop("vocals")
    references = torch.from_numpy(np.stack([vocals, sum(stems.values())]))
    estimates = 0.8 * references + 0.2 * references.flip(0) + 0.01 * coloured(references.shape, 0)
    found = bss_eval_v4(references, estimates, rate, rate)
    assert found.sdr.isfinite().any()
    assert_same_scores(found, museval_scores(references, estimates, rate, rate), atol=1e-4)


def test_leakage_and_artifacts_are_the_energies_they_were_made_with():
    voice, band, noise = bursts(1, 1, 1)
    references = torch.stack([voice, band])
    estimates = torch.stack([voice + 0.1 * band + 0.01 * noise, band + 0.5 * voice])
    whole = bss_eval_v3(references, estimates)
    frame = bss_eval_v4(references[:, None], estimates[:, None], 10000, 10000)
    error = 0.1**2 + 0.01**2
    for sdr, sir, sar in (whole, (frame.sdr[:, 0], frame.sir[:, 0], frame.sar[:, 0])):
        np.testing.assert_allclose(sdr, 10 * np.log10([1 / error, 1 / 0.5**2]), atol=1e-6)
        np.testing.assert_allclose(sir, 20 * np.log10([10, 2]), atol=1e-6)
        np.testing.assert_allclose(sar[0], 10 * np.log10(1.01 / 0.01**2), atol=1e-6)
        assert sar[1] > 150
    assert (frame.isr > 150).all(), "nothing is filtered"


def test_a_gain_is_a_spatial_distortion_to_version_4_and_nothing_to_version_3():
    references = torch.stack(bursts(1, 1))
    estimates = references * torch.tensor([[0.9], [-0.5]])
    frame = bss_eval_v4(references[:, None], estimates[:, None], 10000, 10000)
    for score in (frame.sdr, frame.isr):
        np.testing.assert_allclose(score[:, 0], 20 * np.log10([10, 1 / 1.5]), atol=1e-6)
    for score in (frame.sir, frame.sar, *bss_eval_v3(references, estimates)):
        assert (score > 150).all()


def test_a_filtered_source_has_no_artifacts_unless_the_filter_is_longer_than_512_taps():
    references = torch.stack(bursts(1, 1))
    for delay, found in ((511, True), (512, False)):
        estimates = references + 0.5 * references.roll(delay, -1)
        sdr, sir, sar = bss_eval_v3(references, estimates)
        for score in (sdr, sar):
            assert (score > 150).all() if found else (score < 15).all()
        assert (sir > 100).all()


def test_white_noise_20_db_below_scores_20_db():
    n_samples = 60000
    rng = np.random.default_rng(3)
    references, noise = torch.from_numpy(rng.normal(size=(2, 2, n_samples)))
    sdr, _, sar = bss_eval_v3(references, references + 0.1 * noise)
    # The 1024 taps explain as many of the noise's 60000 dimensions.
    np.testing.assert_allclose(sar, 20 - 10 * math.log10(1 - 1024 / n_samples), atol=0.05)
    np.testing.assert_allclose(sdr, 20, atol=0.05)


def test_loudness_and_polarity_of_an_estimate_do_not_matter_where_a_filter_is_free():
    references, estimates = example(2, 1, 5000)
    gains = torch.tensor([3.0, -0.01])[:, None]
    plain = bss_eval_v3(references[:, 0], estimates[:, 0])
    scaled = bss_eval_v3(references[:, 0], estimates[:, 0] * gains)
    assert_same_scores(scaled, plain)
    plain = bss_eval_v4(references, estimates, 2000, 2000)
    scaled = bss_eval_v4(references, estimates * gains[..., None], 2000, 2000)
    for name in ("sir", "sar"):
        np.testing.assert_allclose(getattr(scaled, name), getattr(plain, name), atol=1e-6)
    assert (scaled.sdr - plain.sdr).abs().min() > 1


def test_order_of_sources_and_channels_and_the_songs_loudness_do_not_matter():
    references, estimates = example(2, 2, 4000)
    plain = bss_eval_v4(references, estimates, 2000, 2000)
    turned = (-20 * signals.flip(0, 1) for signals in (references, estimates))
    assert_same_scores(bss_eval_v4(*turned, 2000, 2000), [score.flip(0) for score in plain])


def test_mono_songs_score_the_same_with_their_channel_doubled():
    references, estimates = example(2, 1, 5000)
    mono = bss_eval_v4(references, estimates, 2000, 2000)
    doubled = bss_eval_v4(references.expand(2, 2, -1), estimates.expand(2, 2, -1), 2000, 2000)
    assert_same_scores(doubled, mono)


def test_a_voice_on_one_side_only_scores_what_museval_gives():
    references, estimates = example(1, 2, 4000)
    references[0, 1] = 0
    found = bss_eval_v4(references, estimates, 2000, 2000)
    expected = museval_scores(references, estimates, 2000, 2000)
    expected[2][:] = math.nan  # infinite in museval: there is no other source
    assert_same_scores(found, expected)


def test_sources_that_differ_by_a_gain_have_no_unique_filters_and_yet_scores():
    references, estimates = example(2, 1, 4000)
    references[1] = 2 * references[0]
    scores = bss_eval_v4(references, estimates, 2000, 2000)
    assert scores.sdr.isfinite().all()
    single = bss_eval_v4(references[:1], estimates[:1], 2000, 2000)
    np.testing.assert_allclose(scores.sar[0], single.sar[0], atol=1e-3)


def test_a_song_with_a_silent_source_has_no_scores():
    references, estimates = example(2, 1, 4000)
    references[1] = 0
    for score in bss_eval_v4(references, estimates, 2000, 2000):
        assert score.shape == (2, 2)
        assert score.isnan().all()
    for score in bss_eval_v3(references[:, 0], estimates[:, 0]):
        assert score.shape == (2,)
        assert score.isnan().all()
    assert bss_eval_v4(references * 0, estimates * 0, 2000, 2000).sdr.isnan().all()


def test_one_click_is_no_silence():
    references, estimates = example(2, 1, 4000)
    references[0, 0, :2000] = 0
    assert bss_eval_v4(references, estimates, 2000, 2000).sdr.isnan().all(0).tolist() == [
        True,
        False,
    ]
    references[0, 0, 50] = 1e-3
    assert bss_eval_v4(references, estimates, 2000, 2000).sdr.isfinite().all()


def test_channels_that_are_silent_or_copies_stay_out_of_the_equations():
    left, right = torch.tensor([[1.0, 2, 0], [0, 2, 1]])
    channels = torch.stack([left * 0, left, left, right, right * 0, left, -right])
    assert bsseval._distinct(channels) == [1, 3, 6]


@pytest.mark.parametrize(
    ("n_samples", "n_channels"),
    [(0, 1), (1, 1), (2, 1), (511, 1), (512, 1), (513, 1), (0, 2)],
)
def test_the_shortest_songs_have_one_frame_and_no_infinite_score(n_samples, n_channels):
    references, estimates = example(2, n_channels, n_samples)
    scores = bss_eval_v4(references, estimates, 8000, 100)
    for score in scores:
        assert score.shape == (2, 1)
        assert not score.isinf().any()
    assert scores.sdr.isnan().all() if n_samples == 0 else scores.sdr.isfinite().all()
    for score in bss_eval_v3(references[:, 0], estimates[:, 0]):
        assert score.shape == (2,)
        assert not score.isinf().any()


def test_scores_that_would_be_infinite_are_300_db():
    references = torch.stack(bursts(1, 1))
    assert (bss_eval_v4(references[:, None], references[:, None], 9999, 9999).sdr == 300).all()
    swapped = bss_eval_v3(references, references.flip(0))
    assert (swapped.sdr < -150).all()
    assert (swapped.sir >= -300).all()


def test_one_source_alone_meets_no_interference():
    references, estimates = example(1, 2, 3000)
    scores = bss_eval_v4(references, estimates, 1000, 1000)
    assert scores.sir.isnan().all()
    assert all(score.isfinite().all() for score in (scores.sdr, scores.isr, scores.sar))
    assert bss_eval_v3(references[:, 0], estimates[:, 0]).sir.isnan().all()


def test_several_systems_score_together_what_each_scores_alone():
    references, estimates = example(2, 1, 4000)
    systems = torch.stack([estimates, estimates + references, references])[:, None]
    systems[2, 0, 1] = 0
    found = bss_eval_v4(references, systems, 2000, 2000)
    assert found.sar.shape == (3, 1, 2, 2)
    for i, system in enumerate(systems):
        alone = bss_eval_v4(references, system[0], 2000, 2000)
        assert_same_scores(type(found)(*(score[i, 0] for score in found)), alone, atol=0)
    whole = bss_eval_v3(references[:, 0], systems[:, :, :, 0])
    assert whole.sdr.shape == (3, 1, 2)
    alone = bss_eval_v3(references[:, 0], systems[1, 0, :, 0])
    assert_same_scores(type(whole)(*(score[1, 0] for score in whole)), alone, atol=0)


def test_single_precision_is_computed_in_double_and_nothing_is_modified():
    references, estimates = (x.float() for x in example(2, 1, 3000))
    before = references.clone(), estimates.clone()
    found = bss_eval_v4(references, estimates, 1000, 1000)
    assert found.sdr.dtype == torch.float64
    assert_same_scores(found, bss_eval_v4(references.double(), estimates.double(), 1000, 1000))
    assert torch.equal(references, before[0])
    assert torch.equal(estimates, before[1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_samples_that_are_no_numbers_are_refused(value, which):
    signals = example(2, 1, 3000)
    signals[which][1, 0, 1500] = value
    with pytest.raises(InputError, match="not finite"):
        bss_eval_v4(*signals, 1000, 1000)
    with pytest.raises(InputError, match="not finite"):
        bss_eval_v3(signals[0][:, 0], signals[1][:, 0])


def test_shapes_and_frames_that_do_not_fit_are_refused():
    references, estimates = example(2, 2, 3000)
    with pytest.raises(InputError, match=r"estimates of shape \(2, 2, 2999\), references of"):
        bss_eval_v4(references, estimates[..., 1:], 1000, 1000)
    with pytest.raises(InputError, match=r"shape \(2, 3000\); expected \(n_sources, n_channels"):
        bss_eval_v4(references[:, 0], estimates[:, 0], 1000, 1000)
    with pytest.raises(InputError, match=r"expected \(n_sources, n_samples\)"):
        bss_eval_v3(references, estimates)
    with pytest.raises(InputError, match="references of shape"):
        bss_eval_v4(references[:0], estimates[:0], 1000, 1000)
    with pytest.raises(InputError, match="window of 0 and a hop of 10"):
        bss_eval_v4(references, estimates, 0, 10)
    with pytest.raises(InputError, match="hop of -1"):
        bss_eval_v4(references, estimates, 10, -1)


@pytest.mark.parametrize("minimum", [1, 2, 3, 7, 511, 1025, 44611, 48511, 16000000])
def test_sizes_of_transforms_are_even_and_have_small_factors(minimum):
    size = bsseval._fast_size(minimum)
    assert size >= max(2, minimum)
    assert size < 1.1 * minimum + 2
    assert size % 2 == 0
    for prime in (2, 3, 5):
        while size % prime == 0:
            size //= prime
    assert size == 1
