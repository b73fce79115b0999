"""Validation: what is heard on songs that were not learnt, and where it began."""

import math

import numpy as np
import pytest
import sounds
import torch
from test_run import HP, make_run, sine, song

import audio
from learning import validation


@pytest.mark.parametrize("backing_db", [0, 6, -20, -60])
def test_the_mixture_scores_as_loud_as_its_backing(backing_db):
    # Two tones 30 bins apart: their product sums to nothing, so SI-SDR is the ratio of energies.
    tones = song("tones", sine(250), sine(1500, 0.1 * 10 ** (backing_db / 20)))
    found = validation.validate(make_run([tones]), [tones])
    assert found["floor"] == pytest.approx(min(30, -backing_db), abs=0.05)


def test_songs_without_a_voice_are_left_out_of_the_scores(songs):
    silent = song("silent", 0 * sine(1), sine(300))
    run = make_run(songs)
    both, alone = (validation.validate(run, some) for some in ([songs[0], silent], songs[:1]))
    assert both.pop("loss") != alone.pop("loss")
    assert both == alone
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


def test_every_frame_of_a_song_is_predicted_with_silence_around(songs):
    run = make_run(songs)
    mixture = sum(validation.excerpt(run, songs[0]))
    logits = validation.logits_of(run, mixture)
    features = audio.features(mixture[0], run.curve_db, HP.mixture_power, HP)
    with torch.no_grad():
        one_by_one = run.averaged(sounds.slices(features, HP))  # (n_frames, n_bins, 1)
    np.testing.assert_allclose(logits[0], one_by_one[..., 0].T, atol=1e-5)
