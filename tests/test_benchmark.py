"""tools/benchmark.py: every figure runs, and the roofline is not beaten by more than noise."""

from __future__ import annotations

import json
import math

import pytest
import torch

from hparams import HParams
from model import operations_per_column
from tools import benchmark

WORDS = ["--rounds", "1", "--seconds", "2", "--set", "width=2", "--set", "batch_size=1"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "MATRIX", {"cpu": 64})
    monkeypatch.setattr(benchmark, "VALUES", {"cpu": 4096})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("what", ["network", "generate", "train", "live"])
def test_every_figure_is_measured(what, capsys):
    against = [] if what == "generate" else ["--against", "width=3"]  # it starts scripts
    assert benchmark.main([what, *WORDS, *against, "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text[text.index("{") :])
    assert found["device"] == "CPU"
    assert list(found["results"]) == ["these settings", "width=3"][: 1 + len(against) // 2]
    for figures in found["results"].values():
        numbers = [value for value in figures.values() if isinstance(value, float)]
        assert len(numbers) >= 4
        assert all(0 < number < math.inf for number in numbers)


def test_settings_stand_side_by_side_with_their_ratio(capsys):
    benchmark.show({"device": "CPU"}, {"a": {"time [s]": 2.0}, "b": {"time [s]": 3.0}})
    *_, line = capsys.readouterr().out.splitlines()
    assert line.split() == ["time", "[s]", "2", "3", "1.5"]


def test_the_roofline_is_the_arithmetic_of_the_network():
    """On a machine with endless memory bandwidth, it is the operations over their rate."""
    hp = HParams(width=4)
    rates = benchmark.Rates(operations=1e9, copied=math.inf, value_bytes=4)
    least = benchmark.least_seconds(hp, rates, n_columns=1000)
    # The first columns need 24 frames more, of which each layer computes fewer.
    assert 1 <= least / (1000 * operations_per_column(hp) / 1e9) < 1.03
    step = benchmark.least_seconds(hp, rates, 1000, n_chunks=2, training=True)
    assert 2.8 < step / (2 * least) <= 3
