"""Two systems: pairs of songs, intervals, verdicts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hparams import InputError
from scoring import comparison
from scoring.comparison import Difference, bootstrap, verdict


def test_the_interval_is_that_of_a_mean_and_the_same_every_time():
    differences = np.random.default_rng(3).normal(0.5, 1, 100)
    low, high = bootstrap(differences, [str(i) for i in range(100)])
    half = 1.96 * differences.std() / 10
    np.testing.assert_allclose([low, high], differences.mean() + np.array([-half, half]), atol=0.03)
    assert (low, high) == bootstrap(differences, [str(i) for i in range(100)])


def test_clips_of_one_song_are_one_witness():
    differences = np.repeat(np.random.default_rng(3).normal(0.5, 1, 20), 5)
    alone = bootstrap(differences, [str(i) for i in range(100)])
    together = bootstrap(differences, [str(i // 5) for i in range(100)])
    assert 1.8 < (together[1] - together[0]) / (alone[1] - alone[0]) < 2.6  # √5
    assert np.mean(together) == pytest.approx(differences.mean(), abs=0.05)


def gains(*values: float, groups: int | None = None) -> list[Difference]:
    n = groups or len(values)
    return [Difference(str(i), str(i % n), 1.0, 1.0 + v) for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([], "no song has it in both"),
        (gains(1, 2, groups=1), "+1.50 dB on average; one song tells nothing about others"),
        (gains(1, 1, 1, 1, 1), "5 songs are too few to tell (5 of 5 songs better)"),
        (gains(*[1] * 12, groups=5), "5 songs are too few"),
        (gains(1, 1, 1, 1, 1, 2), "the interval excludes 0: better (6 of 6 songs better)"),
        (gains(*[-1] * 6), "interval -1.00 to -1.00; the interval excludes 0: worse (0 of 6"),
        (gains(1, -1, 1, -1, 1, -1), "the interval holds 0: it may be chance (3 of 6"),
        (gains(*[0] * 8), "holds 0"),
    ],
)
def test_a_verdict_is_no_bolder_than_the_songs_allow(found, says):
    assert says in verdict(found)


def test_songs_without_the_score_are_counted():
    assert "songs without it" not in verdict(gains(1, 2))
    assert verdict(gains(1, 2), 3).endswith(
        "; 3 songs without it: a true source is silent, or it was not taken"
    )


def stored(**songs: str) -> dict:
    """Scores of one system by name and hash of the music."""
    both = {"vocals": {"sdr": [1.0, None, 3.0], "nsdr": None}}
    return {
        "summary": {"it": {}},
        "songs": [
            {"name": n, "group": n, "seconds": 1, "files": [{"sha256": h}], "scores": {"it": both}}
            for n, h in songs.items()
        ],
    }


PATHS = Path("a.json"), Path("b.json")


def test_songs_are_paired_by_name_and_must_be_the_same_music():
    pairs, n_single = comparison.pair(
        PATHS, (stored(c="1", a="2", x="3"), stored(a="2", c="1")), ("it", "it")
    )
    assert [before["name"] for before, _ in pairs] == ["a", "c"]
    assert n_single == 1
    (one, _) = comparison.differences(pairs, ("it", "it"), "vocals", "sdr")
    assert (one.name, one.before, one.after, one.gain) == ("a", 2, 2, 0)
    assert comparison.differences(pairs, ("it", "it"), "vocals", "nsdr") == []
    for files, told in (
        ((stored(a="1"), stored(a="2")), "b.json: a is not the same music as in a.json"),
        ((stored(a="1"), stored(b="1")), "b.json: has no song in common with a.json"),
    ):
        with pytest.raises(InputError, match=told):
            comparison.pair(PATHS, files, ("it", "it"))
    with pytest.raises(InputError, match="no system 'them'"):
        comparison.pair(PATHS, (stored(a="1"), stored(a="1")), ("it", "them"))
