"""demo/: songs whose parts are known, and the story that is told with them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

import cli
from demo import __main__ as demo
from demo import synthesis
from demo.synthesis import Sheet, Singer
from hparams import InputError
from scoring import metrics

RATE = 22050
# A plain voice: what is measured below is not moved by vibrato.
SINGER = Singer(tract=1.0, vibrato_hz=5.5, vibrato_depth=0.0)


def song(seed: int, seconds: float, sample_rate: int) -> dict[str, np.ndarray]:
    return synthesis.synthesize_song(np.random.default_rng(seed), seconds, sample_rate)


def sung(pitch: int, syllable: str) -> np.ndarray:
    sheet = Sheet(np.random.default_rng(0), beat=0.5, tonic=60, chords=[], sample_rate=RATE)
    return synthesis.sing(sheet, SINGER, pitch, 1.0, syllable)


def share(wav: np.ndarray, low: float, high: float) -> float:
    """Part of the energy between two frequencies."""
    energy = np.abs(np.fft.rfft(wav * np.hanning(len(wav)))) ** 2
    frequencies = np.fft.rfftfreq(len(wav), 1 / RATE)
    return energy[(frequencies >= low) & (frequencies < high)].sum() / energy.sum()


# --- Synthesis ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sample_rate", "seconds"), [(4000, 16.0001), (44100, 0.31)])
def test_parts_come_again_and_the_mixture_peaks_at_four_fifths(seconds, sample_rate):
    parts, again, other = (song(seed, seconds, sample_rate) for seed in (1, 1, 2))
    assert sorted(parts) == sorted(synthesis.PARTS)
    for name, wav in parts.items():
        assert (wav.shape, wav.dtype) == ((2, round(seconds * sample_rate)), np.float32)
        np.testing.assert_array_equal(wav, again[name])
        assert not np.allclose(wav, other[name])
    mixture = sum(parts.values())
    np.testing.assert_allclose(np.abs(mixture).max(), 0.8, rtol=1e-3)
    assert -3.5 < metrics.si_sdr(mixture, parts["vocals"]) < 0.5


def test_a_syllable_is_a_hiss_and_then_the_harmonics_and_resonances_of_a_vowel():
    a, i = (sung(pitch, syllable) for pitch, syllable in ((57, "sa"), (45, "hi")))
    assert share(a[: RATE // 10], 4000, 11025) > 0.8
    a, i = a[RATE // 3 :], i[RATE // 3 :]
    near = sum(share(a, k * 220 * 0.97, k * 220 * 1.03) for k in range(1, 9))
    far = sum(share(a, (k + 0.35) * 220, (k + 0.65) * 220) for k in range(1, 9))
    assert near > 0.6
    assert far < 0.01 * near
    assert share(a, 600, 1300) > 5 * share(i, 600, 1300)  # 730 and 1090 Hz
    assert share(i, 200, 400) > 5 * share(a, 200, 400)  # 270 Hz


def test_the_tree_is_that_of_dsd100_and_mixtures_are_exact_sums(toy_tree):
    mixtures = sorted(toy_tree.glob("Mixtures/*/*/mixture.wav"))
    names = [f"{file.parts[-3]}/{file.parts[-2]}" for file in mixtures]
    assert [name[:8] for name in names] == ["Dev/051 ", "Dev/052 ", "Dev/053 ", "Test/001"]
    for mixture, name in zip(mixtures, names, strict=True):
        sources = [toy_tree / "Sources" / name / f"{part}.wav" for part in synthesis.PARTS]
        total = sum(soundfile.read(file, dtype="int16")[0].astype(int) for file in sources)
        np.testing.assert_array_equal(soundfile.read(mixture, dtype="int16")[0], total)


def test_a_song_does_not_depend_on_how_many_there_are(tmp_path, toy_tree):
    synthesis.write_dsd100(tmp_path / "one", 1, 0, 4, RATE, seed=0)
    files = list(tmp_path.glob("one/**/*.wav"))
    assert len(files) == 5
    for file in files:
        assert file.read_bytes() == (toy_tree / file.relative_to(tmp_path / "one")).read_bytes()
    with pytest.raises(InputError, match="exists already"):
        synthesis.write_dsd100(tmp_path / "one", 1, 0, 0.5, RATE, seed=0)


# --- The story ------------------------------------------------------------------------------------


@pytest.fixture
def commands(tmp_path, monkeypatch) -> list[list[str]]:
    """What the demo would run in an empty folder; vocals are the truth, a little spoiled."""
    commands_run: list[list[str]] = []

    def run(script: str, *words: str | Path) -> None:
        commands_run.append([script, *map(str, words)])
        if script == "generate.py" and Path(words[1]).name == "mixture.wav":
            out = Path(words[-1])
            out.mkdir(parents=True, exist_ok=True)
            wav, rate = soundfile.read(next(demo.TREE.glob("Sources/Test/*/vocals.wav")))
            noise = np.random.default_rng(0).standard_normal(wav.shape)
            spoiled = {"generated": 0.01, "pretrained": 0.001, "noisy": 1}.get(out.name, 0)
            soundfile.write(out / "mixture_vocals.wav", wav + spoiled * noise, rate)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SONGS", {**demo.SONGS, "n_train": 1, "seconds": 2})
    monkeypatch.setattr(demo, "run", run)
    return commands_run


def test_the_demo_runs_the_projects_own_commands_and_reports_true_scores(commands, capsys):
    soundfile.write("mixture.wav", np.zeros((100, 2)), 44100)
    assert demo.main(["--song", "mixture.wav"]) == 0
    mixture = next(demo.TREE.glob("Mixtures/Test/*/mixture.wav"))
    assert [command[:3] for command in commands] == [
        ["build_dataset.py", "runs/demo/dsd100", "runs/demo/dataset"],
        ["train.py", "runs/demo/dataset", "--name"],
        ["generate.py", "runs/demo/best.pth", str(mixture)],
        ["generate.py", str(cli.PRETRAINED), str(mixture)],
        ["generate.py", str(cli.PRETRAINED), str(Path("mixture.wav").absolute())],
    ]
    assert len({command[-1] for command in commands[2:]}) == 3, "one song overwrites no other"
    truth = soundfile.read(next(demo.TREE.glob("Sources/Test/*/vocals.wav")))[0]
    generated = (demo.GENERATED, demo.GENERATED / "pretrained")
    files = (mixture, *(path / "mixture_vocals.wav" for path in generated))
    before, trained, pretrained = (metrics.si_sdr(soundfile.read(f)[0].T, truth.T) for f in files)
    printed = capsys.readouterr().out
    assert f"as it is              {before:5.1f} dB" in printed
    assert f"trained here       {trained:5.1f} dB   ({trained - before:+.1f} dB)" in printed
    assert f"pretrained         {pretrained:5.1f} dB   ({pretrained - before:+.1f} dB)" in printed
    assert {path.name for path in Path().iterdir()} == {"runs", "mixture.wav"}


def test_a_voice_that_is_not_cleaner_fails_the_demo(commands, capsys, monkeypatch):
    monkeypatch.setattr(demo, "NETWORKS", {"trained here": (Path("x.pth"), Path("noisy"))})
    assert demo.main([]) == 1
    assert re.search(r"the voice gained -?\d+\.\d dB; at least 5", capsys.readouterr().err)


def test_wrong_arguments_are_told_before_any_work(commands, capsys):
    assert demo.main(["--song", "no such.mp3"]) == 1
    assert demo.main(["--set", "widht=8"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "no such.mp3: no such file" in first
    assert "width" in second
    assert not commands
    assert not demo.TREE.exists()


def test_a_command_is_shown_as_one_would_type_it_and_its_failure_ends_the_demo(
    tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "HERE", tmp_path)
    Path("good.py").write_text("import sys; print(sys.argv[1:])")
    Path("bad.py").write_text("raise SystemExit(1)")
    demo.run("good.py", Path("my song.wav"), "--background")
    shown, output = capfd.readouterr().out.strip().split("\n")
    assert shown.endswith("good.py 'my song.wav' --background")
    assert output == "['my song.wav', '--background']"
    with pytest.raises(InputError, match=r"bad\.py failed"):
        demo.run("bad.py")
