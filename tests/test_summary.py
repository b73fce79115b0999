"""Many songs: medians and means, shares of the way, tables and figures."""

from __future__ import annotations

import math
import re

import pytest

from scoring import tables
from scoring.tables import METRICS, STEMS, summarise


def record(seconds: float, **scores: dict) -> dict:
    of = {m.name: None for m in METRICS}
    full = {s: {stem: {**of, **values} for stem in STEMS} for s, values in scores.items()}
    silent = dict.fromkeys(["reference", *scores], 0)
    return {"seconds": seconds, "scores": full, "n_frames": 4, "silent": silent}


def test_songs_come_together_as_each_metric_wants():
    songs = [
        record(1, it={"sdr": [1.0, None, 2.0, 9.0], "si_sdr": 1.0, "nsdr": 1.0}),
        record(3, it={"sdr": [4.0], "si_sdr": 3.0, "nsdr": 3.0}),
        record(9, it={"sdr": [None], "si_sdr": None, "nsdr": None}),
        record(1, it={"sdr": [30.0], "si_sdr": 8.0, "nsdr": 8.0}),
    ]
    found = summarise(songs)["it"]["vocals"]
    assert found["sdr"]["value"] == 4  # the median of 2, 4 and 30
    assert found["si_sdr"]["value"] == 4
    assert found["nsdr"]["value"] == pytest.approx((1 + 9 + 8) / 5)
    assert [found[name]["n_songs"] for name in ("sdr", "si_sdr", "isr")] == [3, 3, 0]
    assert found["sdr"]["share"] is None  # no floor, no ceiling


def test_the_share_of_the_way_is_none_where_the_ceiling_is_not_above_the_floor():
    scores = {"floor": 2.0, "it": 5.0, "ideal_ratio": 8.0}
    songs = [record(1, **{s: {"si_sdr": v, "sar": [-v]} for s, v in scores.items()})]
    found = summarise(songs)["it"]["vocals"]
    assert found["si_sdr"]["share"] == 0.5
    assert found["sar"]["share"] is None


def test_a_table_starts_with_the_floor_ends_with_the_ceilings_and_says_what_is_not_there():
    scores = {"ideal_ratio": 8.0, "ideal_binary": 7.0, "it": 5.0, "lost": None, "floor": 2.0}
    lines = tables.tables(summarise([record(1, **{s: {"si_sdr": v} for s, v in scores.items()})]))
    assert [line.split() for line in lines[:7]] == [
        [],
        ["vocals", "SI-SDR"],
        ["floor", "2.00"],
        ["it", "5.00", "50", "%"],
        ["lost", "n/a"],
        ["ideal_ratio", "8.00"],
        ["ideal_binary", "7.00"],
    ]
    assert lines[8].split() == ["accompaniment", "SI-SDR"]
    assert tables.tables(summarise([])) == []


def test_what_is_left_out_is_counted():
    songs = [record(1, floor={"sdr": [1.0], "nsdr": 1}, it={"sdr": [-30.0]}) for _ in range(3)]
    songs[0] = record(1, floor={"sdr": [None]}, it={"sdr": [None]})
    songs[0]["silent"] = {"reference": 2, "floor": 0, "it": 4}
    assert tables.omissions(songs, summarise(songs)) == [
        "2 of 12 frames left out of BSSEval v4: a true source is silent",
        "1 of 3 songs left out of SDR: a true source is silent",
        "1 of 3 songs left out of GNSDR: a true source is silent or it was not taken",
        "4 of 12 frames of it count -30 dB: it is silent where the truth is not",
    ]
    assert tables.omissions([], summarise([])) == []


def test_a_row_in_markdown_holds_floor_and_ceilings():
    scores = {"floor": 1.0, "ideal_binary": 2.0, "ideal_ratio": 3.0}
    songs = [record(1, **{s: {"sdr": [v], "si_sdr": -v} for s, v in scores.items()})]
    *_, row = tables.markdown("music", "1024, 256", 1, summarise(songs))
    assert row == "| music | 1 | 1024, 256 | 1.00 / -1.00 | 2.00 / -2.00 | 3.00 / -3.00 |"


def test_a_figure_has_a_circle_for_every_song_and_a_chart_for_every_metric_that_is_there():
    songs = [
        record(
            1,
            floor={"sdr": [0.0], "sar": [80.0], "v3_sar": 80.0},
            it={"sdr": [i, None], "sar": [i], "nsdr": i, "v3_sar": i},
        )
        for i in range(5)
    ]
    svg = tables.figure([*songs, record(1, floor={}, it={"sdr": [math.nan]})])
    titles = re.findall(r">([^<]*) of the vocals \[dB\]", svg)
    assert titles == ["SDR", "SAR", "NSDR (v3)", "SAR (v3)"]
    assert svg.count("<circle") == len(STEMS) * (10 + 5 + 5 + 5)  # SAR has no strip of the floor
    assert "<circle" not in tables.figure([])
