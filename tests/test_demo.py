"""demo/: songs whose parts are known, and the story that is told with them."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

import cli
from demo import __main__ as demo
from scoring import metrics


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
            spoiled = {"generated": 0.01, "noisy": 1}.get(out.name, 0)
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
        ["generate.py", str(cli.PRETRAINED), str(Path("mixture.wav").absolute())],
    ]
    assert len({command[-1] for command in commands[2:]}) == 2, "one song overwrites no other"
    truth = soundfile.read(next(demo.TREE.glob("Sources/Test/*/vocals.wav")))[0]
    files = (mixture, demo.GENERATED / "mixture_vocals.wav")
    before, after = (metrics.si_sdr(soundfile.read(f)[0].T, truth.T) for f in files)
    printed = capsys.readouterr().out
    assert f"as it is   {before:5.1f} dB" in printed
    assert f"separated     {after:5.1f} dB   ({after - before:+.1f} dB)" in printed
    assert {path.name for path in Path().iterdir()} == {"runs", "mixture.wav"}


def test_a_voice_that_is_not_cleaner_fails_the_demo(commands, capsys, monkeypatch):
    monkeypatch.setattr(demo, "GENERATED", Path("noisy"))
    assert demo.main([]) == 1
    assert re.search(r"the voice gained -?\d+\.\d dB; at least 8", capsys.readouterr().err)
