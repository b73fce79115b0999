"""evaluate.py: scores of songs on disk, kept as they come; comparing; tuning."""

import json
import shutil
from pathlib import Path

import pytest
import soundfile
import torch

import evaluate
import generate
import model
from hparams import MASK_SETTINGS, UNTUNED_MASK, HParams
from scoring import songs, tuning
from scoring.tables import STEMS
from sound import tracks

HP = HParams(width=2, stft_frames=3, model_type="convnet")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """An untrained network that claims to have learnt one of the toy songs."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "best.pth"
    extra = {"mask_settings": {"mask_at_eval": False, "noise_gate": 0.1}, "step": 7}
    extra |= {"data": ["other abc"], "optimizer": {"moments": [torch.randn(3)]}}
    extra |= {"curve_db": torch.zeros(HP.n_bins)}
    model.save_checkpoint(path, model.build_model(HP), HP, **extra)
    return path


def run(*words: object) -> int:
    return evaluate.main([str(word) for word in words])


def score(path: Path, *words: object, code: int = 0) -> dict:
    """Score in this process; return what was written."""
    assert run(*words, "--workers", 1, "--output", path) == code
    return json.loads(path.read_text())


ALL_SONGS = ("--split", "all", "--seconds", 2)


@pytest.fixture(scope="module")
def results(checkpoint, toy_tree, tmp_path_factory) -> Path:
    """All four toy songs, 2 s each."""
    path = tmp_path_factory.mktemp("results") / "all.json"
    score(path, checkpoint, toy_tree, *ALL_SONGS)
    return path


def test_a_table_a_figure_and_every_frame_of_the_test_songs(checkpoint, toy_tree, tmp_path, capsys):
    out = tmp_path / "new" / "a.json"
    stored = score(out, checkpoint, toy_tree, "--plot", tmp_path / "a.svg")
    (song,) = stored["songs"]
    assert list(song["scores"]) == ["floor", "model", "ideal_binary", "ideal_ratio"]
    assert len(song["scores"]["model"]["vocals"]["sir"]) == song["seconds"] == 4
    settings = {**UNTUNED_MASK, "noise_gate": 0.1, "stereo": "mid-side"}
    assert stored["about"]["mask_settings"] == settings
    assert stored["about"]["hparams"]["width"] == 2
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("model ")]
    assert len(rows) == 2
    assert f" {stored['summary']['model']['vocals']['sdr']['value']:.2f}" in rows[0]
    assert (tmp_path / "a.svg").stat().st_size > 10_000
    assert sorted(path.name for path in out.parent.iterdir()) == ["a.json", "a.songs"]


def test_an_interrupted_run_goes_on_and_ends_with_the_same_file(
    results, checkpoint, toy_tree, tmp_path, monkeypatch, capsys
):
    real, scored_now, out, may_score = songs.score_files, [], tmp_path / "b.json", 2

    def score_files(task, job):
        if len(scored_now) == may_score:
            raise KeyboardInterrupt
        scored_now.append(job.track.name)
        return real(task, job)

    monkeypatch.setattr(songs, "score_files", score_files)
    words = (checkpoint, toy_tree, *ALL_SONGS)
    assert run(*words, "--workers", 1, "--output", out) == 130
    assert not out.exists()
    first, _ = sorted((tmp_path / "b.songs").iterdir())
    first.write_text(first.read_text()[:100])  # as a disk leaves it that lost its power
    may_score = 5  # two before, the two that are missing, and the damaged one again
    for n_old in (1, 4):
        score(out, *words)
        assert f"{n_old} of 4 songs were scored before" in capsys.readouterr().out
        assert out.read_bytes() == results.read_bytes()
    assert len(scored_now) == may_score


def test_other_settings_other_files_and_another_network_are_scored_again(
    checkpoint, toy_tree, tmp_path, capsys
):
    """And what does not change is not."""
    est, network = tmp_path / "est", tmp_path / "net.pth"
    write_estimates(toy_tree, est, lambda wav: wav // 2)
    shutil.copy(checkpoint, network)
    words = (network, toy_tree, "--estimates", f"it={est}", "--seconds", 1)

    def values(*more: object) -> tuple[float, bool]:
        stored = score(tmp_path / "a.json", *words, *more)
        is_old = "1 of 1 songs were scored before" in capsys.readouterr().out
        return stored["summary"]["it"]["vocals"]["sdr"]["value"], is_old

    assert values() == (pytest.approx(6.02, abs=0.05), False)
    assert values("--every", 2) == (pytest.approx(6.02, abs=0.05), True)
    shutil.rmtree(est)
    write_estimates(toy_tree, est, lambda wav: wav // 3)
    assert values() == (pytest.approx(3.52, abs=0.05), False)
    assert values("--set", "stereo=mean")[1] is False
    assert values("--seconds", 2)[1] is False
    contents = model.load_checkpoint(network)
    model.save_checkpoint(network, model.build_model(HP), HP, **contents | {"step": 8})
    assert values("--seconds", 2)[1] is False


def write_estimates(root: Path, folder: Path, change=lambda wav: wav) -> list[tracks.Track]:
    """Write true vocals, changed, as <song>_vocals.wav."""
    listing = tracks.find_tracks(root).tracks
    folder.mkdir()
    for track in listing:
        wav, rate = soundfile.read(track.vocals[0].path, dtype="int16")
        soundfile.write(folder / f"{track.name}_vocals.wav", change(wav), rate)
    return listing


def test_estimates_that_do_not_fit_are_told_and_the_other_songs_go_on(toy_tree, tmp_path, capsys):
    listing = write_estimates(toy_tree, tmp_path / "est")
    files = [tmp_path / "est" / f"{track.name}_vocals.wav" for track in listing]
    soundfile.write(files[0], soundfile.read(files[0])[0][:-2000], 22050)
    soundfile.write(files[1], soundfile.read(files[1])[0], 16000)
    files[2].unlink()
    words = ("--estimates", f"x={tmp_path / 'est'}", "--split", "all", "--seconds", 1)
    stored = score(tmp_path / "a.json", "bounds", toy_tree, *words, code=1)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 3
    assert f"{listing[2].name}: no estimate in" in errors[0]
    assert {"86200 samples, the song has 88200" in line for line in errors[1:]} == {True, False}
    assert {"16000 Hz, the song has 22050 Hz" in line for line in errors[1:]} == {True, False}
    assert [song["name"] for song in stored["songs"]] == [listing[3].name]
    files[3].unlink()
    assert score(tmp_path / "a.json", "bounds", toy_tree, *words, code=1) == stored


def test_what_generate_wrote_scores_as_the_model_does(checkpoint, toy_tree, tmp_path):
    mixtures = toy_tree / "Mixtures" / "Test"
    words = ["--background", "--output-dir", str(tmp_path / "gen")]
    assert generate.main([str(checkpoint), str(mixtures), *words]) == 0
    words = ("--estimates", f"files={tmp_path / 'gen'}")
    of = score(tmp_path / "a.json", checkpoint, toy_tree, *words)["summary"]
    for stem in STEMS:
        of_model, files = (of[name][stem]["sdr"]["value"] for name in ("model", "files"))
        assert of_model == pytest.approx(files, abs=0.02)


def test_what_is_wrong_is_said_in_one_line(
    toy_tree, toy_dataset, checkpoint, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("my.json").write_text("{}")
    for words, code, message in (
        (("gone.pth", toy_tree), 1, "gone.pth: no such checkpoint"),
        (("bounds", "gone"), 1, "gone: no such folder"),
        (("bounds", "x" * 300), 1, "xxx: no such folder"),
        (("bounds", toy_dataset), 1, "a dataset that build_dataset.py made (give the folder"),
        (("tune", checkpoint, toy_dataset), 1, "a dataset that build_dataset.py made"),
        (("bounds", toy_tree, "--estimates", "x"), 2, "write it as name=folder"),
        (("bounds", toy_tree, "--estimates", "floor=a"), 2, "the name is taken"),
        (("bounds", toy_tree, "--estimates", "x=gone"), 1, "gone: no such folder"),
        (("bounds", toy_tree, "--every", "0"), 2, "0 is not 1 or more"),
        (("bounds", toy_tree, "--output", "net.pth"), 2, "net.pth: is written as json"),
        (("bounds", toy_tree, "--output", "my.json"), 1, "my.json: is there and holds no scores"),
        (("bounds", toy_tree, "--plot", "net.pth"), 2, "net.pth: a picture's name ends in .svg"),
        (("bounds", toy_tree, "--output", "file/a.json"), 1, "file/a.songs: "),
        (("compare", "gone.json", "gone.json"), 1, "gone.json: no such file"),
        (("tune", checkpoint, toy_tree, "--set", "noise_gate=0.1"), 2, "is what is being chosen"),
    ):
        try:
            found = run(*words)
        except SystemExit as error:  # of argparse
            found = error.code
        said = capsys.readouterr().err
        assert (found, message in said) == (code, True), said
    assert Path("my.json").read_text() == "{}"


def test_comparing_needs_enough_songs(results, capsys):
    assert run("compare", results, results, "--systems", "floor", "model") == 0
    assert "4 songs are too few to tell" in capsys.readouterr().out


def test_tuning_stores_the_best_settings_of_songs_not_learnt_from_and_leaves_all_else(
    checkpoint, toy_tree, tmp_path, capsys, monkeypatch
):
    grid, path, shapes = tuning.mask_grid(), tmp_path / "net.pth", []
    names = [track.name for track in tracks.find_tracks(toy_tree).tracks if track.split == "train"]
    before = model.load_checkpoint(checkpoint) | {"data": [f"{names[0]} x1.15 0f"]}
    model.save_checkpoint(path, model.build_model(HP), HP, **before)

    def tune_song(separator, references, rate):
        shapes.append(references.shape)
        thresholds = [settings.get("eval_mask_threshold", 0) for settings in grid]
        soft = [s.get("noise_gate") == 0.2 and s.get("mask_sharpness") == 0.7 for s in grid]
        return [-abs(t - 0.65) + 2 * best for t, best in zip(thresholds, soft, strict=True)]

    monkeypatch.setattr(tuning, "tune_song", tune_song)
    words = (path, toy_tree, "--seconds", 1, "--workers", 1)
    assert run("tune", *words) == 0
    assert shapes == [(2, 2, 22050)] * 2
    shown = capsys.readouterr().out
    assert "1 songs left out: they were learnt from" in shown
    assert "tuned on 2 songs" in shown
    after = model.load_checkpoint(path)
    best = (False, 0.65, 0.2, 0.7)
    assert after.pop("mask_settings") == dict(zip(MASK_SETTINGS, best, strict=True))
    assert after.pop("tuned_on") == [{"name": name} for name in names[1:]]
    del before["mask_settings"]
    assert after.keys() == before.keys()
    for name, weights in before.pop("weights").items():
        assert torch.equal(after["weights"][name], weights)
    assert all(str(after[key]) == str(value) for key, value in before.items())
    score(tmp_path / "a.json", path, toy_tree, *ALL_SONGS)
    warnings = capsys.readouterr().err
    assert "2 songs are called like songs that its mask settings were tuned on" in warnings
    assert "1 songs are called like songs that the checkpoint learnt from" in warnings
