"""Damaged sound files: told, or all of the sound; never a crash, a hang or a shorter sound."""

from __future__ import annotations

import os

import fuzz
import pytest


@pytest.mark.torture
def test_damage_is_told_or_all_of_the_sound_comes_out(tmp_path, capfd):
    counts = fuzz.run(int(os.environ.get("VOCAL_MASK_FUZZ", 600)), seed=0, keep=tmp_path)
    assert not list(tmp_path.iterdir()), capfd.readouterr().out
    for container, ends in counts.items():
        assert ends["refused"] > 5 < ends["whole"] + ends["warned"], (container, ends)
