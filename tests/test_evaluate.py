"""evaluate.py: scores of songs on disk, kept as they come; comparing; tuning."""

from __future__ import annotations

import contextlib
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


# --- Scores -------------------------------------------------------------------------------------


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


@pytest.mark.torture
def test_two_processes_give_the_same_file(results, checkpoint, toy_tree, tmp_path):
    words = (*ALL_SONGS, "--workers", 2, "--output", tmp_path / "b.json")
    assert run(checkpoint, toy_tree, *words) == 0
    assert (tmp_path / "b.json").read_bytes() == results.read_bytes()


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
    for setting in ("noise_gate=0.3", "stereo=mean"):
        assert [values("--set", setting)[1] for _ in range(2)] == [False, True]
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


def test_other_systems_files_are_scored_on_the_same_songs(toy_tree, tmp_path, capsys):
    write_estimates(toy_tree, tmp_path / "truth")
    write_estimates(toy_tree, tmp_path / "short", lambda wav: wav[:-300])
    words = [f"--estimates={name}={tmp_path / name}" for name in ("truth", "short")]
    of = score(tmp_path / "a.json", "bounds", toy_tree, *words)["summary"]
    assert of["truth"]["vocals"]["sdr"]["value"] > 100
    assert of["truth"]["accompaniment"]["sdr"]["value"] > 100
    assert of["ideal_ratio"]["vocals"]["sdr"]["value"] < of["short"]["vocals"]["sdr"]["value"]
    assert "87900 samples, the song has 88200; padded with silence" in capsys.readouterr().err


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


def test_what_generate_wrote_scores_as_the_model_does(checkpoint, toy_tree, tmp_path):
    mixtures = toy_tree / "Mixtures" / "Test"
    words = ["--background", "--output-dir", str(tmp_path / "gen")]
    assert generate.main([str(checkpoint), str(mixtures), *words]) == 0
    words = ("--estimates", f"files={tmp_path / 'gen'}")
    of = score(tmp_path / "a.json", checkpoint, toy_tree, *words)["summary"]
    for stem in STEMS:
        of_model, files = (of[name][stem]["sdr"]["value"] for name in ("model", "files"))
        assert of_model == pytest.approx(files, abs=0.02)


def test_bounds_follow_the_grid_that_set_describes(toy_tree, tmp_path):
    of = []
    for n_fft in (256, 1024):
        words = ("--set", f"n_fft={n_fft}", "--set", f"hop_length={n_fft // 4}", "--seconds", 2)
        summary = score(tmp_path / f"{n_fft}.json", "bounds", toy_tree, *words)["summary"]
        of.append({name: summary[name]["vocals"]["si_sdr"]["value"] for name in summary})
    assert of[0]["floor"] == of[1]["floor"]
    assert of[1]["ideal_ratio"] > of[0]["ideal_ratio"] + 0.5


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("gone.pth", "TREE"), 1, "gone.pth: no such checkpoint"),
        (("bounds", "gone"), 1, "gone: no such folder"),
        (("bounds", "BUILT"), 1, "a dataset that build_dataset.py made (give the folder of music"),
        (("tune", "NET", "BUILT"), 1, "a dataset that build_dataset.py made"),
        (("bounds", "TREE", "--estimates", "x"), 2, "write it as name=folder"),
        (("bounds", "TREE", "--estimates", "floor=a"), 2, "the name is taken"),
        (("bounds", "TREE", "--estimates", "x=gone"), 1, "gone: no such folder"),
        (("bounds", "TREE", "--seconds", "0"), 2, "0 is not more than 0"),
        (("bounds", "TREE", "--every", "0"), 2, "0 is not 1 or more"),
        (("bounds", "TREE", "--output", "net.pth"), 2, "net.pth: is written as json"),
        (("bounds", "TREE", "--output", "my.json"), 1, "my.json: is there and holds no scores"),
        (("bounds", "TREE", "--plot", "net.pth"), 2, "net.pth: a picture's name ends in .svg"),
        (("bounds", "TREE", "--output", "file/a.json"), 1, "file/a.songs: "),
        (("compare", "gone.json", "gone.json"), 1, "gone.json: no such file"),
        (("tune", "gone.pth", "TREE"), 1, "gone.pth: no such checkpoint"),
        (("tune", "gone.pth", "TREE", "--set", "noise_gate=0.1"), 2, "is what is being chosen"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words, code, message, toy_tree, toy_dataset, checkpoint, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("my.json").write_text("{}")
    folders = {"TREE": str(toy_tree), "BUILT": str(toy_dataset), "NET": str(checkpoint)}
    words = [folders.get(word, word) for word in words]
    with contextlib.suppress(SystemExit):  # of argparse, which says 2
        code -= run(*words)
    assert code in (0, 2)
    assert message in capsys.readouterr().err
    assert Path("my.json").read_text() == "{}"


def test_layouts_without_a_split_for_testing_give_all_their_songs(toy_tree, tmp_path, capsys):
    for i, track in enumerate(tracks.find_tracks(toy_tree).tracks[:2]):
        shutil.copytree(track.vocals[0].path.parent, tmp_path / "music" / f"song {i}")
    words = ("bounds", tmp_path / "music", "--seconds", 1)
    score(tmp_path / "a.json", *words)
    assert "2 songs of the split 'all'" in capsys.readouterr().out
    assert run(*words, "--split", "test") == 1
    assert "no songs of the split 'test' (try --split all)" in capsys.readouterr().err


# --- Comparing ----------------------------------------------------------------------------------


def test_a_difference_is_called_one_only_if_the_interval_excludes_zero(results, tmp_path, capsys):
    """Of scores that are repeated as songs of their own, SI-SDR changed by 0.5 ± 0.3 dB in turn."""
    stored, pair = json.loads(results.read_text()), []
    for by in (0, 0.5):
        records = []
        for i in range(12):
            record = json.loads(json.dumps(stored["songs"][i % 4]))
            record["name"] = record["group"] = f"song {i}"
            record["scores"]["model"]["vocals"]["si_sdr"] = by + i % 3 + 0.6 * by * (-1) ** i
            records.append(record)
        pair.append(tmp_path / f"{by}.json")
        pair[-1].write_text(json.dumps({**stored, "songs": records}))
    for files, verdict in (
        (pair, "+0.50 dB on average, 95 % interval"),
        (pair[::-1], "excludes 0: worse"),
        (pair[:1] * 2, "holds 0"),
    ):
        assert run("compare", *files, "--metric", "si_sdr") == 0
        *songs, last = capsys.readouterr().out.splitlines()[1:]
        assert len(songs) == 12
        assert verdict in last


def test_comparing_needs_a_known_system_and_enough_songs(results, tmp_path, capsys):
    assert run("compare", results, results, "--systems", "floor", "model") == 0
    assert "4 songs are too few to tell" in capsys.readouterr().out
    assert run("compare", results, results, "--systems", "spleeter") == 1
    assert "no system 'spleeter' (--systems takes of: floor, model" in capsys.readouterr().err


# --- Tuning -------------------------------------------------------------------------------------


def test_tuning_stores_the_best_settings_of_songs_not_learnt_from_and_leaves_all_else(
    checkpoint, toy_tree, tmp_path, capsys, monkeypatch
):
    grid, path, shapes = tuning.mask_grid(), tmp_path / "net.pth", []
    names = [track.name for track in tracks.find_tracks(toy_tree).tracks if track.split == "train"]
    before = model.load_checkpoint(checkpoint) | {"data": [f"{names[0]} x1.15 0f"]}
    model.save_checkpoint(path, model.build_model(HP), HP, **before)
    as_it_was = path.read_bytes()

    def tune_song(separator, references, rate):
        shapes.append(references.shape)
        thresholds = [settings.get("eval_mask_threshold", 0) for settings in grid]
        soft = [s.get("noise_gate") == 0.2 and s.get("mask_sharpness") == 0.7 for s in grid]
        return [-abs(t - 0.65) + 2 * best for t, best in zip(thresholds, soft, strict=True)]

    monkeypatch.setattr(tuning, "tune_song", tune_song)
    words = (path, toy_tree, "--seconds", 1, "--workers", 1)
    assert run("tune", *words, "--dry-run") == 0
    assert path.read_bytes() == as_it_was
    assert run("tune", *words) == 0
    assert shapes == [(2, 2, 22050)] * 4  # two train songs, twice
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


def test_nothing_is_tuned_on_songs_that_were_all_learnt_from(
    checkpoint, toy_tree, tmp_path, capsys
):
    names = [track.name for track in tracks.find_tracks(toy_tree).tracks]
    contents = model.load_checkpoint(checkpoint) | {"learnt_before": [f"{n} 0f" for n in names]}
    model.save_checkpoint(tmp_path / "net.pth", model.build_model(HP), HP, **contents)
    assert run("tune", tmp_path / "net.pth", toy_tree) == 1
    assert "no validation songs: all 3 of the split 'train'" in capsys.readouterr().err
