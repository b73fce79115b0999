"""Settings: a wrong one is told in one sentence, a right one arrives as the type it has."""

import json
import re
from dataclasses import asdict

import pytest

import hparams
from hparams import CHOICES, RANGES, HParams, InputError, override


def test_a_number_out_of_its_range_is_told_with_the_range():
    for name, (low, high) in RANGES.items():
        for value in (low - 1, high + 1, float("nan"), float("inf"), -float("inf")):
            said = f"^{name} is {re.escape(str(value))}; it must lie between {low:g} and "
            with pytest.raises(InputError, match=said):
                HParams(**{name: value})
    for name, choices in CHOICES.items():
        with pytest.raises(InputError, match=f"^{name} is 'x'; choose one of {choices[0]}"):
            HParams(**{name: "x"})


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
    with pytest.raises(InputError, match="stft_frames - 1, 94, of twice that"):
        HParams(stft_frames=95, stft_lookahead=10, mask_frames=2)
    # Silence is -100 dB of amplitude, p times that after the power; A is up to 1.3 dB more.
    with pytest.raises(InputError, match=r"min_level_db is -100; silence, which .* -100 dB"):
        HParams(min_level_db=-100, mixture_power=1)


def test_a_value_on_the_command_line_gets_the_type_of_its_setting():
    start = HParams(mask_at_eval=False, noise_gate=0.5)
    for text, value in {
        "width=16": 16,
        "learning_rate=1e-4": 1e-4,
        "gain_db=3": 3.0,
        "model_type=convnet": "convnet",
        "mask_at_eval=true": True,
        "mask_at_eval=None": None,
        "noise_gate=": None,
    }.items():
        found = getattr(override(start, [text]), text.split("=")[0])
        assert (found, type(found)) == (value, type(value))
    assert override(start, ["width=8", "width=16"]).width == 16, "the last one counts"
    assert start == HParams(mask_at_eval=False, noise_gate=0.5)
    together = override(HParams(), ["hop_length=512", "n_fft=2048"])  # neither fits alone
    assert together.n_bins == 1025


def test_a_wrong_setting_on_the_command_line_is_told_in_one_line():
    for text, said in {
        "width=16.5": "--set width=16.5: '16.5' is not a whole number",
        "mask_at_eval=2": "--set mask_at_eval=2: '2' is not true or false",
        "width": "--set width: write it as name=value",
        "noisegate=0.1": "no setting 'noisegate' (did you mean noise_gate?)",
        "xyzzy=1": "no setting 'xyzzy' (hparams.py lists the settings)",
        "n_bins=513": "no setting 'n_bins'",  # derived, never set
        "learning_rate=nan": "learning_rate is nan; it must lie between 1e-09 and 10",
    }.items():
        with pytest.raises(InputError, match=re.escape(said)) as error:
            override(HParams(), [text])
        assert "\n" not in str(error.value)


def test_what_an_old_file_lacks_takes_todays_default_and_what_is_gone_is_dropped():
    assert hparams.from_dict({"width": 16, "schedule": "cyclic"}) == HParams(width=16)
    new = HParams(width=16, mask_at_eval=True, noise_gate=0.2, weighting="mel", stft_lookahead=3)
    assert hparams.from_dict(json.loads(json.dumps(asdict(new)))) == new


def test_settings_of_another_version_are_refused_by_name():
    with pytest.raises(InputError, match=r"^unknown settings blur, zoom; written by another"):
        hparams.from_dict({"zoom": 1, "width": 16, "blur": 2})
