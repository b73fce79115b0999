"""Settings: a wrong one is told in one sentence, a right one arrives as the type it has."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields, replace

import pytest

import hparams
from hparams import CHOICES, GRID, MASK_SETTINGS, RANGES, TRAINED, HParams, InputError, override

# What contradicts another setting if it is changed alone.
ALONE = {
    "stft_lookahead": 6,
    "n_fft": 1536,
    "hop_length": 128,
    "stft_frames": 37,
    "mask_frames": 2,
    "min_level_db": -80.0,
}


def changed(name: str) -> object:
    """Return a value of the setting that is allowed and not the default."""
    default = getattr(HParams(), name)
    if name in CHOICES:
        return next(choice for choice in CHOICES[name] if choice != default)
    if name == "mask_at_eval":
        return True
    low, high = RANGES[name]
    kind = float if default is None else type(default)
    return ALONE.get(name, kind(high if default != high else low))


def test_the_public_settings_have_the_published_values():
    hp = HParams()
    assert (hp.sample_rate, hp.n_fft, hp.hop_length) == (22050, 1024, 256)
    assert (hp.stft_frames, hp.stft_stride, hp.model_type) == (25, 1, "resnet18")
    assert (hp.min_level_db, hp.mixture_power, hp.vocals_power) == (-100, 2, 3)
    assert [getattr(hp, name) for name in MASK_SETTINGS] == [None] * 4, "as tuned"
    assert hp == hparams.hparams, "the instance that scripts read has the defaults"


def test_every_setting_has_a_range_or_a_choice():
    names = {field.name for field in fields(HParams)}
    assert {*RANGES, *CHOICES, "mask_at_eval"} == names
    assert not set(RANGES) & set(CHOICES)
    assert set(GRID) < set(TRAINED) < names


def test_a_number_out_of_its_range_is_told_with_the_range():
    for name, (low, high) in RANGES.items():
        for value in (low - 1, high + 1, float("nan"), float("inf"), -float("inf")):
            said = f"^{name} is {re.escape(str(value))}; it must lie between {low:g} and "
            with pytest.raises(InputError, match=said):
                HParams(**{name: value})
        replace(HParams(), **{name: changed(name)})


def test_an_unknown_choice_is_told_with_the_known_ones():
    for name, choices in CHOICES.items():
        with pytest.raises(InputError, match=f"^{name} is 'x'; choose one of {choices[0]}"):
            HParams(**{name: "x"})
        for choice in choices:
            assert getattr(HParams(**{name: choice}), name) == choice


def test_settings_that_do_not_fit_together_are_refused():
    with pytest.raises(InputError, match="stft_frames is 24; it must be odd"):
        HParams(stft_frames=24)  # it has no centre
    # 1280 is 5 hops: at 24 kHz, with hops of 279 samples, the window would have no middle sample.
    for n_fft in (1000, 768, 256, 1280):
        with pytest.raises(InputError, match=f"n_fft is {n_fft} and hop_length 256; n_fft must be"):
            HParams(n_fft=n_fft)
    for n_fft in (1024, 1536, 2048):
        assert HParams(n_fft=n_fft).n_fft == n_fft
    with pytest.raises(InputError, match="stft_lookahead is 13; of 25 frames, at most 12 may lie"):
        HParams(stft_lookahead=13)


def test_a_scale_on_which_silence_is_heard_is_refused():
    # Silence is -100 dB of amplitude, p times that after the power; A is up to 1.3 dB more.
    for powers in ({"mixture_power": 1}, {"vocals_power": 1}):
        with pytest.raises(InputError, match=r"min_level_db is -100; silence, which .* -100 dB"):
            HParams(min_level_db=-100, **powers)
        HParams(min_level_db=-98, **powers)


def test_a_value_on_the_command_line_gets_the_type_of_its_setting():
    for text, value in {
        "width=16": 16,
        "learning_rate=1e-4": 1e-4,
        "min_level_db=-80.5": -80.5,
        "gain_db=3": 3.0,
        "model_type=convnet": "convnet",
        "mask_at_eval=true": True,
        "mask_at_eval=0": False,
        "mask_at_eval=None": None,
        "noise_gate=": None,
        "eval_mask_threshold=1": 1.0,
        "stereo=mid-side": "mid-side",
    }.items():
        start = HParams(mask_at_eval=value is None, noise_gate=0.5)  # so that none is a change
        found = getattr(override(start, [text]), text.split("=")[0])
        assert found == value
        assert type(found) is type(value)


def test_a_wrong_setting_on_the_command_line_is_told_in_one_line():
    for text, said in {
        "width=16.5": "--set width=16.5: '16.5' is not a whole number",
        "width=none": "--set width=none: 'none' is not a whole number",
        "gain_db=loud": "--set gain_db=loud: 'loud' is not a number",
        "mask_at_eval=2": "--set mask_at_eval=2: '2' is not true or false",
        "width": "--set width: write it as name=value",
        "noisegate=0.1": "no setting 'noisegate' (did you mean noise_gate?)",
        "model-type=convnet": "no setting 'model-type' (did you mean model_type?)",
        "xyzzy=1": "no setting 'xyzzy' (hparams.py lists the settings)",
        "n_bins=513": "no setting 'n_bins'",  # derived, never set
        "model_type=resnet=18": "model_type is 'resnet=18'; choose one of resnet18, convnet",
        "learning_rate=nan": "learning_rate is nan; it must lie between 1e-09 and 10",
    }.items():
        with pytest.raises(InputError, match=re.escape(said)) as error:
            override(HParams(), [text])
        assert "\n" not in str(error.value)


def test_the_last_of_two_settings_of_one_name_counts_and_the_start_stays():
    start = HParams(epochs=3)
    found = override(start, ["width=8", "seed=3", "width=16"])
    assert found == HParams(width=16, seed=3, epochs=3)
    assert start == HParams(epochs=3)
    assert override(start, []) == start
    together = override(HParams(), ["hop_length=512", "n_fft=2048"])  # neither fits alone
    assert together.n_bins == 1025


def test_stored_settings_come_back_as_they_were():
    hp = HParams(**{field.name: changed(field.name) for field in fields(HParams)})
    assert all(getattr(hp, name) != value for name, value in asdict(HParams()).items())
    assert hparams.from_dict(asdict(hp)) == hp
    assert hparams.from_dict(json.loads(json.dumps(asdict(HParams())))) == HParams()


def test_settings_that_an_old_file_lacks_take_the_values_of_then():
    gone = {"reverb": 0.1, "compression": 0.0, "compile": "reduce-overhead"}
    old = hparams.from_dict({"width": 16} | gone)
    assert old == HParams(width=16, **hparams.BEFORE)
    assert (old.optimizer, old.level_db) == ("adamw", 0)
    new = asdict(HParams(width=16))
    assert hparams.from_dict(new) == HParams(width=16)


def test_settings_of_another_version_are_refused_by_name():
    with pytest.raises(InputError, match=r"^unknown settings blur, zoom; written by another"):
        hparams.from_dict({"zoom": 1, "width": 16, "blur": 2})
    with pytest.raises(InputError, match="width is 0"):
        hparams.from_dict({"width": 0})


def test_differences_are_listed_with_both_values_and_only_where_asked():
    pair = HParams(sample_rate=44100, width=16), HParams(n_fft=2048, width=32)
    found = hparams.differences(*pair, GRID)
    assert found == {"sample_rate": (44100, 22050), "n_fft": (1024, 2048)}
    assert hparams.differences(*pair, ("width",)) == {"width": (16, 32)}
