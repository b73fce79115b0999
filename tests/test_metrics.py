"""SI-SDR and BSSEval: numbers of museval and mir_eval, closed forms, invariances, silence."""

import math
import warnings

import numpy as np
import pytest
import torch

from hparams import InputError
from scoring import metrics
from scoring.metrics import bss_eval_v3, bss_eval_v4, si_sdr

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


def of_one(score, references, estimates, *window):
    """Score one system by BSSEval v4 or v3."""
    return {name: of[0] for name, of in score(references, estimates[None], *window).items()}


def score_frames(references, estimates, window):
    return of_one(bss_eval_v4, references, estimates, window)


def score_whole(references, estimates):
    return of_one(bss_eval_v3, references[:, 0], estimates[:, 0])


def museval_scores(references, estimates, window) -> dict[str, np.ndarray]:
    museval = pytest.importorskip("museval.metrics")
    frames_first = [x.numpy().transpose(0, 2, 1) for x in (references, estimates)]
    scores = museval.bss_eval(*frames_first, window=window, hop=window)[:4]
    return dict(zip(("sdr", "isr", "sir", "sar"), scores, strict=True))


def assert_same_scores(scores, expected, atol=1e-6):
    """Compare what is below 120 dB; above, every tool measures its own rounding."""
    assert scores.keys() == expected.keys()
    for name in scores:
        both = (np.asarray(score[name]).clip(max=120) for score in (scores, expected))
        np.testing.assert_allclose(*both, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    ("n_sources", "n_samples", "window"),
    [
        (2, 9000, 100),  # shorter than the filters
        (2, 300, 8000),  # a song that is shorter than a frame and the filters
        (3, 6100, 2000),
    ],
)
def test_any_window_and_number_of_sources_score_what_museval_gives(n_sources, n_samples, window):
    references, estimates = example(n_sources, 1, n_samples)
    expected = museval_scores(references, estimates, window)
    assert_same_scores(score_frames(references, estimates, window), expected)


@pytest.mark.parametrize(("n_sources", "n_samples"), [(3, 5001), (2, 100_000)])
def test_whole_clips_score_what_mir_eval_gives(n_sources, n_samples):
    separation = pytest.importorskip("mir_eval.separation")
    references, estimates = example(n_sources, 1, n_samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mir_eval says that the module will go
        expected = separation.bss_eval_sources(
            references[:, 0].numpy(), estimates[:, 0].numpy(), compute_permutation=False
        )
    expected = dict(zip(("sdr", "sir", "sar"), expected, strict=False))
    assert_same_scores(score_whole(references, estimates), expected)


def test_blocks_and_the_company_of_other_systems_change_nothing(monkeypatch):
    """Of signals that end in, at and behind the end of a block."""
    for offset in (-1, 0, 300):
        references, estimates = example(2, 1, 2 * (2048 - 511) + offset)
        systems = torch.stack([estimates, references.flip(0) - 0.01 * estimates, 0 * estimates])
        alone = [score_frames(references, system, 250) for system in systems]
        whole = [score_whole(references, system) for system in systems]
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "BLOCK_FFT", 2048)
            together = bss_eval_v4(references, systems, 250)
            whole_together = bss_eval_v3(references[:, 0], systems[:, :, 0])
        for scores, expected in ((together, alone), (whole_together, whole)):
            expected = {name: torch.stack([of[name] for of in expected]) for name in scores}
            assert_same_scores(scores, expected, atol=1e-9)
        assert together["sdr"][:2].isfinite().all()


def test_mono_songs_score_the_same_with_a_channel_that_is_a_copy():
    """Its filters have no unique solution."""
    references, estimates = example(2, 1, 5000)
    mono = score_frames(references, estimates, 2000)
    for gain in (1.0, -0.5):
        gains = torch.tensor([1.0, gain])[:, None]
        stereo = score_frames(references * gains, estimates * gains, 2000)
        assert_same_scores(stereo, mono, atol=1e-5)


def test_a_song_with_a_silent_source_has_no_scores_and_one_click_is_no_silence():
    references, estimates = example(2, 1, 4000)
    references[1] = 0
    scores = score_frames(references, estimates, 2000)
    for score in (*scores.values(), *score_whole(references, estimates).values()):
        assert score.isnan().all()
    references[1, 0, 50] = 1e-3
    sdr = score_frames(references, estimates, 2000)["sdr"]
    assert sdr.isnan().tolist() == [[False, True]] * 2


@pytest.mark.parametrize(("n_samples", "n_channels"), [(0, 2), (1, 1), (512, 1)])
def test_the_shortest_songs_have_one_frame_and_no_infinite_score(n_samples, n_channels):
    references, estimates = example(2, n_channels, n_samples)
    scores = score_frames(references, estimates, 8000)
    for score in (*scores.values(), *score_whole(references, estimates).values()):
        assert not score.isinf().any()
    assert scores["sdr"].shape == (2, 1)
    assert scores["sdr"].isfinite().all() == (n_samples > 0)
    truth = score_frames(references, references, 8000)["sdr"]
    assert (truth[~truth.isnan()] == 300).all()


@pytest.mark.parametrize(("value", "which"), [(math.nan, 0), (math.inf, 1)])
def test_samples_that_are_no_numbers_are_refused(value, which):
    signals = example(2, 1, 3000)
    signals[which][1, 0, 1500] = value
    with pytest.raises(InputError, match="not finite"):
        score_frames(*signals, 1000)


@pytest.mark.parametrize(
    ("estimate", "reference", "expected_db"),
    [
        ([1, 1], [1, 0], 0.0),  # as much error as voice
        ([2, 1], [1, 0], 20 * math.log10(2)),
        ([1, 10], [3, 0], -20.0),
        ([3, 0], [1, 1], 0.0),  # (1.5, 1.5) of voice and (1.5, -1.5) of error
    ],
)
def test_si_sdr_is_what_one_works_out_by_hand(estimate, reference, expected_db):
    score = si_sdr(np.array(estimate), np.array(reference))
    assert isinstance(score, float)
    np.testing.assert_allclose(score, expected_db, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, -0.5, 1e30])
def test_neither_loudness_nor_polarity_matters_and_channels_are_one_long_signal(scale):
    estimate, reference = np.random.default_rng(0).normal(size=(2, 2, 500))
    expected = si_sdr(estimate.ravel(), reference.ravel())
    np.testing.assert_allclose(si_sdr(scale * estimate, reference), expected, atol=1e-9)
    np.testing.assert_allclose(si_sdr(estimate, scale * reference), expected, atol=1e-9)


def test_silence_has_no_score_and_an_estimate_with_nothing_of_the_voice_scores_minus_infinity():
    assert math.isnan(si_sdr(np.ones(10), np.zeros(10)))
    assert math.isnan(si_sdr(np.zeros(0), np.zeros(0)))
    assert si_sdr(np.zeros(4), np.ones(4)) == -math.inf
    assert si_sdr(np.array([1.0, -1.0]), np.ones(2)) == -math.inf
