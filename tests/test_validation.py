"""Validation: what is heard on songs that were not learnt, and between which bounds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_run import HP, make_run, sine, song, song_of_noise

import audio
from dataset import OpenSong
from learning import validation
from learning.ranks import World
from learning.validation import Validator


@pytest.fixture(scope="module")
def songs() -> list[OpenSong]:
    return [song_of_noise(name, seed) for seed, name in enumerate("abc")]


def validator_of(songs: list[OpenSong]) -> Validator:
    return make_run(songs).validator


@pytest.mark.parametrize("backing_db", [0, 6, -20])
def test_the_mixture_scores_as_loud_as_its_backing_and_ideal_masks_find_the_voice(backing_db):
    # Two tones 30 bins apart: their product sums to nothing, so SI-SDR is the ratio of energies.
    tones = song("tones", sine(250), sine(1500, 0.1 * 10 ** (backing_db / 20)))
    found = validation.bounds(validator_of([tones]), [tones])
    assert found["floor"] == pytest.approx(-backing_db, abs=0.05)
    # Beyond their main lobes (2 bins) a Hann window's leakage is 31 dB and more down.
    assert found["ideal_binary"] > found["floor"] + 25
    assert found["ideal_ratio"] > found["floor"] + 25


def test_songs_without_a_voice_are_left_out_of_the_scores(songs):
    silent = song("silent", 0 * sine(1), sine(300))
    validator = validator_of(songs)
    both = validation.bounds(validator, [songs[0], silent])
    assert both == validation.bounds(validator, songs[:1])
    scores = validation.validate(validator, [silent])
    assert math.isfinite(scores["loss"])
    assert math.isnan(scores["soft"])


class Oracle(torch.nn.Module):
    """Answers what a mask of the energies of one song would be."""

    def __init__(self, validator: Validator, song: OpenSong) -> None:
        super().__init__()
        self.share = audio.ideal_ratio_mask(*validator.excerpt(song))

    def forward(self, _features: torch.Tensor) -> torch.Tensor:
        return self.share.logit(1e-9)


def test_a_network_that_knows_the_answer_scores_as_the_ideal_masks(songs):
    validator = validator_of(songs)
    validator = replace(validator, model=Oracle(validator, songs[0]))
    scores = validation.validate(validator, songs[:1])
    ideal = validation.bounds(validator, songs[:1])
    assert scores["soft"] == pytest.approx(ideal["ideal_ratio"], abs=0.2)
    assert scores["binary"] == pytest.approx(ideal["ideal_binary"], abs=0.2)


def test_validation_changes_nothing(songs):
    run = make_run(songs)
    run.model.train()
    networks = {"model": run.model, "averaged": run.averaged}
    before = {
        f"{net} {name}": value.clone()
        for net in networks
        for name, value in networks[net].state_dict().items()
    }
    first = validation.validate(run.validator, songs)
    assert validation.validate(run.validator, songs) == first
    after = {
        f"{net} {name}": value
        for net in networks
        for name, value in networks[net].state_dict().items()
    }
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_the_averaged_network_is_the_one_that_is_heard(songs):
    run = make_run(songs)
    before = validation.validate(run.validator, songs)
    with torch.no_grad():
        run.model.head.bias += 1
    assert validation.validate(run.validator, songs) == before
    with torch.no_grad():
        run.averaged.head.bias += 1
    assert validation.validate(run.validator, songs) != before


def test_scores_come_back_in_the_order_of_the_songs_however_many_ranks_share_them(songs):
    class Pretended(World):
        """One of several ranks, which knows what the others would give."""

        def gather(self, item: list) -> list:
            assert item == [f"scored {one}" for one in everything[self.rank :: self.size]]
            return [[f"scored {s}" for s in everything[r :: self.size]] for r in range(self.size)]

    for n_songs in (1, 2, 5, 6):
        everything = list(range(n_songs))
        for size in (1, 2, 3, 7):
            for rank in range(size):
                validator = replace(validator_of(songs), world=Pretended(rank, size))
                found = validation._for_each(validator, everything, lambda one: f"scored {one}")
                assert found == [f"scored {one}" for one in everything]


def test_every_frame_of_a_song_is_predicted_with_silence_around(songs):
    validator = validator_of(songs)
    mixture = sum(validator.excerpt(songs[0]))
    logits = validator.logits(validator.features(mixture))
    features = audio.features(mixture[0], validator.curve_db, HP.mixture_power, HP)
    with torch.no_grad():
        one_by_one = validator.model(audio.slices(features, HP))  # (n_frames, n_bins, 1)
    np.testing.assert_allclose(logits[0], one_by_one[..., 0].T, atol=1e-5)


def test_the_picture_has_the_lows_at_the_bottom_and_the_sounds_are_those_of_the_song(songs):
    low = song("low", sine(125), 0 * sine(1))  # bin 2 of 33
    picture, sounds = validation.picture_and_sound(validator_of(songs), low)
    n_bins = HP.n_bins
    assert picture.shape == (3 * n_bins, low.song.n_frames)
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert abs(int(picture[:n_bins].mean(1).argmax()) - (n_bins - 1 - 2)) <= 1
    # The mixture is the voice alone: to float16, the song that went in.
    for name in ("mixture", "truth"):
        np.testing.assert_allclose(sounds[name], sine(125)[: len(sounds[name])], atol=1e-3)
