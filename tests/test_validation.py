"""Validation: what is heard on songs that were not learnt, and between which bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sounds
import torch
from test_run import HP, make_run, sine, song, song_of_noise

import audio
from dataset import OpenSong
from learning import run as training
from learning import validation


@pytest.fixture(scope="module")
def songs() -> list[OpenSong]:
    return [song_of_noise(name, seed) for seed, name in enumerate("abc")]


@pytest.mark.parametrize("backing_db", [0, 6, -20])
def test_the_mixture_scores_as_loud_as_its_backing_and_ideal_masks_find_the_voice(backing_db):
    # Two tones 30 bins apart: their product sums to nothing, so SI-SDR is the ratio of energies.
    tones = song("tones", sine(250), sine(1500, 0.1 * 10 ** (backing_db / 20)))
    found = validation.bounds(make_run([tones]), [tones])
    assert found["floor"] == pytest.approx(-backing_db, abs=0.05)
    # Beyond their main lobes (2 bins) a Hann window's leakage is 31 dB and more down.
    assert found["ideal_binary"] > found["floor"] + 25
    assert found["ideal_ratio"] > found["floor"] + 25


def test_an_excerpt_is_the_middle_of_a_song():
    long = song("long", sine(250, n_samples=8000), sine(1500, n_samples=8000))  # 501 frames
    vocals, _ = validation.excerpt(make_run([long]), long)  # HP asks for a second, 250 frames
    expected = torch.from_numpy(long.spectrogram[125:375, 0].astype(np.float32))
    assert torch.equal(vocals[0], torch.view_as_complex(expected).T)


def test_songs_without_a_voice_are_left_out_of_the_scores(songs):
    silent = song("silent", 0 * sine(1), sine(300))
    run = make_run(songs)
    both = validation.bounds(run, [songs[0], silent])
    assert both == validation.bounds(run, songs[:1])
    scores = validation.validate(run, [silent])
    assert math.isfinite(scores["loss"])
    assert math.isnan(scores["soft"])


def test_the_averaged_network_is_scored_and_not_changed(songs):
    run = make_run(songs)
    run.model.train()
    before = {name: value.clone() for name, value in run.averaged.state_dict().items()}
    scores = validation.validate(run, songs)
    with torch.no_grad():
        run.model.head.bias += 1
    assert validation.validate(run, songs) == scores
    found = run.averaged.state_dict()
    assert all(torch.equal(found[name], before[name]) for name in before)
    with torch.no_grad():
        run.averaged.head.bias += 1
    assert validation.validate(run, songs) != scores


class Oracle(torch.nn.Module):
    """Answers what a mask of the energies of one song would be."""

    def __init__(self, run: training.Run, song: OpenSong) -> None:
        super().__init__()
        self.share = audio.ideal_ratio_mask(*validation.excerpt(run, song))

    def forward(self, _features: torch.Tensor) -> torch.Tensor:
        return self.share.logit(1e-9)


def test_a_network_that_knows_the_answer_scores_as_the_ideal_masks(songs):
    run = make_run(songs)
    run.averaged = Oracle(run, songs[0])
    scores = validation.validate(run, songs[:1])
    ideal = validation.bounds(run, songs[:1])
    assert scores["soft"] == pytest.approx(ideal["ideal_ratio"], abs=0.2)
    assert scores["binary"] == pytest.approx(ideal["ideal_binary"], abs=0.2)


def test_every_frame_of_a_song_is_predicted_with_silence_around(songs):
    run = make_run(songs)
    mixture = sum(validation.excerpt(run, songs[0]))
    logits = validation.logits_of(run, mixture)
    features = audio.features(mixture[0], run.curve_db, HP.mixture_power, HP)
    with torch.no_grad():
        one_by_one = run.averaged(sounds.slices(features, HP))  # (n_frames, n_bins, 1)
    np.testing.assert_allclose(logits[0], one_by_one[..., 0].T, atol=1e-5)
