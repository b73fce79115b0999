from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from demo import __main__ as demo
from scoring import metrics

HERE = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder, small songs, and no run that takes minutes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SONGS", {**demo.SONGS, "n_train": 1, "seconds": 2})
    monkeypatch.setattr(demo, "HERE", tmp_path)
    return tmp_path


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """What the demo would run; generating writes as vocals the truth, a little spoiled."""
    said: list[list[str]] = []

    def run(script: str, *words: str | Path) -> None:
        said.append([script, *map(str, words)])
        if script == "generate.py" and Path(words[1]).name == "mixture.wav":
            folder = Path(words[-1])
            folder.mkdir(parents=True, exist_ok=True)
            truth = next(demo.TREE.glob("Sources/Test/*/vocals.wav"))
            wav, rate = soundfile.read(truth)
            noise = np.random.default_rng(0).standard_normal(wav.shape)
            soundfile.write(
                folder / "mixture_vocals.wav", wav + spoiled.get(folder.name, 0) * noise, rate
            )

    spoiled = {"generated": 0.01, "pretrained": 0.001}
    monkeypatch.setattr(demo, "run", run)
    return said


def test_demo_runs_the_projects_own_commands_in_order(folder, commands, capsys):
    assert demo.main([]) == 0
    scripts = ["build_dataset.py", "train.py", "generate.py", "generate.py"]
    assert [command[0] for command in commands] == scripts
    mixture = next(demo.TREE.glob("Mixtures/Test/*/mixture.wav"))
    assert commands[0][1:] == ["runs/demo/dsd100", "runs/demo/dataset"]
    assert commands[1][1:4] == ["runs/demo/dataset", "--name", "demo"]
    assert commands[2][1:3] == ["runs/demo/best.pth", str(mixture)]
    assert commands[3][1:3] == [str(demo.cli.PRETRAINED), str(mixture)]
    assert "mixture_vocals.wav" in capsys.readouterr().out


def test_demo_reports_the_scores_of_the_files_it_names(folder, commands, capsys):
    assert demo.main([]) == 0
    truth = soundfile.read(next(demo.TREE.glob("Sources/Test/*/vocals.wav")))[0]
    files = [
        next(demo.TREE.glob("Mixtures/Test/*/mixture.wav")),
        "runs/demo/generated/mixture_vocals.wav",
        "runs/demo/generated/pretrained/mixture_vocals.wav",
    ]
    before, ours, theirs = (metrics.si_sdr(soundfile.read(file)[0], truth) for file in files)
    printed = capsys.readouterr().out
    assert f"as it is              {before:5.1f} dB" in printed
    assert f"trained here       {ours:5.1f} dB   ({ours - before:+.1f} dB)" in printed
    assert f"pretrained         {theirs:5.1f} dB   ({theirs - before:+.1f} dB)" in printed
    assert theirs > ours + 1


def test_a_voice_that_is_not_cleaner_fails_the_demo(folder, commands, capsys, monkeypatch):
    def generate_nothing(script: str, *words: str | Path) -> None:
        if script == "generate.py":
            Path(words[-1]).mkdir(parents=True, exist_ok=True)
            shutil.copy(words[1], Path(words[-1]) / "mixture_vocals.wav")

    monkeypatch.setattr(demo, "run", generate_nothing)
    assert demo.main([]) == 1
    assert "the voice gained 0.0 dB" in capsys.readouterr().err


def test_a_second_demo_keeps_the_songs_and_trains_anew(folder, commands):
    assert demo.main([]) == 0
    written = {file: file.stat().st_mtime_ns for file in demo.TREE.rglob("*.wav")}
    assert demo.main([]) == 0
    assert commands[1] == commands[5]
    assert "--overwrite" in commands[5]
    assert {file: file.stat().st_mtime_ns for file in demo.TREE.rglob("*.wav")} == written


def test_own_song_is_separated_with_the_pretrained_network_in_a_folder_of_its_own(folder, commands):
    soundfile.write("mixture.wav", np.zeros((100, 2)), 44100)
    assert demo.main(["--song", "mixture.wav"]) == 0
    *others, (script, network, song, *_, own_folder) = commands
    assert (script, song) == ("generate.py", str(folder / "mixture.wav"))
    assert network == str(demo.cli.PRETRAINED)
    assert Path(network).is_file()
    assert all(own_folder not in words for words in others)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--song", "no such.mp3"], 1, "no such.mp3: no such file"),
        (["--song", "."], 1, ".: is a directory"),
        (["--song", __file__], 1, "not audio"),
        (["--set", "widht=8"], 2, "width"),
    ],
)
def test_wrong_arguments_are_told_before_any_work(
    folder, commands, capsys, arguments, code, message
):
    assert demo.main(arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not commands
    assert not demo.TREE.exists()


def test_a_command_is_shown_as_one_would_type_it_and_its_failure_ends_the_demo(folder, capfd):
    (folder / "good.py").write_text("import sys; print(sys.argv[1:])")
    (folder / "bad.py").write_text("raise SystemExit(1)")
    demo.run("good.py", Path("my song.wav"), "--background")
    shown, said = capfd.readouterr().out.strip().split("\n")
    assert shown.endswith("good.py 'my song.wav' --background")
    assert said == "['my song.wav', '--background']"
    with pytest.raises(demo.InputError, match=r"bad\.py failed"):
        demo.run("bad.py")


@pytest.mark.slow
def test_whole_demo_ends_well_twice(tmp_path):
    for _ in range(2):
        command = [sys.executable, "-m", "demo"]
        run = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(HERE)},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
    made = {path.relative_to(tmp_path).parts[0] for path in tmp_path.iterdir()}
    assert made == {"runs"}
    assert os.path.getsize(tmp_path / "runs/demo/generated/mixture_vocals.wav") > 1000
