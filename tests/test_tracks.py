from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hparams import InputError
from sound import tracks

RATE = 8000


def write(path: Path, wav: np.ndarray | float = 0.1, rate: int = RATE) -> Path:
    """Write a wav of 0.1 s where only a level is given; (n_samples, n_channels) as soundfile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wav = np.full(rate // 10, wav) if np.ndim(wav) == 0 else wav
    soundfile.write(path, wav, rate, subtype="FLOAT" if path.suffix == ".wav" else None)
    return path


def write_all(root: Path, *paths: str) -> Path:
    for path in paths:
        write(root / path)
    return root


def read(track: tracks.Track, n_samples: int = 300) -> np.ndarray:
    return np.concatenate(list(tracks.read_blocks(track, n_samples)), 1)


def splits(found: tracks.Found) -> dict[str, str]:
    return {track.name: track.split for track in found.tracks}


def dsd100(root: Path, *places: str) -> Path:
    for place in places:
        write_all(root, f"Mixtures/{place}/mixture.wav", f"Sources/{place}/vocals.wav")
        write_all(root, f"Sources/{place}/bass.wav", f"Sources/{place}/drums.wav")
    return root


def test_dsd100_as_distributed_divides_dev_from_test(tmp_path):
    found = tracks.find_tracks(dsd100(tmp_path, "Dev/051 - A", "Dev/052 - B", "Test/001 - C"))
    assert found.layout == "DSD100"
    assert splits(found) == {"001 - C": "test", "051 - A": "train", "052 - B": "train"}
    assert [path.name for path in found.tracks[0].paths] == ["mixture.wav", "vocals.wav"]
    assert found.tracks[0].signals == ("vocals", "accompaniment")


def test_flattened_dsd100_tests_on_the_first_fifty(tmp_path):
    found = tracks.find_tracks(dsd100(tmp_path, "001 - A", "050 - B", "051 - C", "100 - D"))
    assert found.layout == "DSD100, flattened"
    assert list(splits(found).values()) == ["test", "test", "train", "train"]


def test_musdb18_hq_has_a_folder_for_every_song(tmp_path):
    for song in ("train/A", "train/B", "test/C"):
        write_all(tmp_path, f"{song}/mixture.wav", f"{song}/vocals.wav", f"{song}/bass.wav")
    found = tracks.find_tracks(tmp_path)
    assert found.layout == "MUSDB18-HQ"
    assert splits(found) == {"A": "train", "B": "train", "C": "test"}


def test_mir1k_sings_on_the_right_channel(tmp_path):
    stereo = np.tile([0.25, 0.5], (800, 1))
    for clip in ("abjones_1_01", "amy_2_03", "Ani_1_01"):
        write(tmp_path / "Wavfile" / f"{clip}.wav", stereo)
    found = tracks.find_tracks(tmp_path)
    assert found.layout == "MIR-1K"
    assert splits(found) == {"Ani_1_01": "test", "abjones_1_01": "train", "amy_2_03": "train"}
    assert [(track.singer, track.group) for track in found.tracks][1] == ("abjones", "abjones_1")
    np.testing.assert_array_equal(read(found.tracks[0])[:, :2], [[0.5, 0.5], [0.25, 0.25]])


def test_mir1k_may_come_as_one_folder_a_clip(tmp_path):
    for clip in ("train/amy_1_01", "rest/bug_1_01"):
        write_all(tmp_path, f"{clip}/vocals.flac", f"{clip}/accompaniment.flac")
    found = tracks.find_tracks(tmp_path)
    assert found.layout == "MIR-1K, one folder a clip"
    assert splits(found) == {"amy_1_01": "train", "bug_1_01": "test"}


def test_stems_are_divided_by_what_their_names_say(tmp_path):
    names = ("Vox Lead", "Bgvox Ooh", "Backing Vocals", "voc_2", "Drums", "Vocoder", "No Vocals")
    write_all(tmp_path, *(f"song/{name}.wav" for name in names))
    (track,) = tracks.find_tracks(tmp_path).tracks
    assert {part.path.stem for part in track.vocals} == set(names[:4])
    assert {part.path.stem for part in track.accompaniment} == set(names[4:])
    (track,) = tracks.find_tracks(tmp_path, voice_pattern="vocoder").tracks
    assert [part.path.stem for part in track.vocals] == ["Vocoder"]


def test_all_stems_summed_are_the_mixture_and_short_ones_end_in_silence(tmp_path):
    write(tmp_path / "song/vox.wav", np.full(500, 0.5))
    write(tmp_path / "song/bv.wav", np.full(800, 0.25))
    write(tmp_path / "song/bass.wav", np.tile([0.5, 0.0], (1000, 1)))
    (track,) = tracks.find_tracks(tmp_path).tracks
    vocals = np.repeat([0.75, 0.25, 0], [500, 300, 200])
    np.testing.assert_array_equal(read(track), [vocals, np.full(1000, 0.25)])
    assert tracks.measure(track) == (RATE, 1000, ())


def test_a_mixture_beside_the_vocals_gives_the_accompaniment_by_subtraction(tmp_path):
    write(tmp_path / "song/Mixture.wav", np.full(800, 0.75))
    write(tmp_path / "song/vocals.wav", np.full(800, 0.5))
    write(tmp_path / "song/drums.wav", np.full(800, 0.1))  # already in the mixture
    (track,) = tracks.find_tracks(tmp_path).tracks
    np.testing.assert_array_equal(read(track), [np.full(800, 0.5), np.full(800, 0.25)])


def test_the_folder_itself_may_be_the_song(tmp_path):
    found = tracks.find_tracks(write_all(tmp_path / "My Song", "vocals.wav", "accompaniment.wav"))
    assert splits(found) == {"My Song": "train"}


@pytest.mark.parametrize(("name", "part"), [("voices", "vocals"), ("Backings", "accompaniment")])
def test_material_for_remixing_is_told_by_the_name_of_its_folder(tmp_path, name, part):
    found = tracks.find_tracks(write_all(tmp_path / name, "x.wav", "Anna/1.wav", "Anna/2.flac"))
    assert [track.signals for track in found.tracks] == [(part,)] * 3
    assert [track.name for track in found.tracks] == ["Anna/1", "Anna/2", "x"]
    assert [track.singer for track in found.tracks] == ["Anna", "Anna", "x"]


def test_material_that_cannot_be_told_needs_the_option(tmp_path):
    root = write_all(tmp_path / "takes", "1.wav", "2.wav")
    with pytest.raises(InputError, match="--as voices or --as backings"):
        tracks.find_tracks(root)
    assert tracks.find_tracks(root, kind="backings").tracks[0].signals == ("accompaniment",)
    root = write_all(tmp_path / "voices", "song/vox.wav", "song/drums.wav")
    with pytest.raises(InputError, match=r"--as songs .* --as voices"):
        tracks.find_tracks(root)
    assert len(tracks.find_tracks(root, kind="songs").tracks) == 1
    assert len(tracks.find_tracks(root, kind="voices").tracks) == 2


def test_a_folder_without_songs_says_what_was_expected(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        tracks.find_tracks(tmp_path / "missing")
    with pytest.raises(InputError, match="not a folder"):
        tracks.find_tracks(write(tmp_path / "song.wav"))
    for name in ("empty", "Mixtures", "train"):
        (tmp_path / "root" / name).mkdir(parents=True)
        with pytest.raises(InputError, match=r"no songs .* Mixtures/<set>/<song>/mixture.wav"):
            tracks.find_tracks(tmp_path / "root" / name if name == "empty" else tmp_path / "root")
        (tmp_path / "root" / name).rmdir()


def test_two_layouts_at_once_are_refused(tmp_path):
    dsd100(tmp_path, "Dev/051 - A")
    write_all(tmp_path, "train/B/mixture.wav", "train/B/vocals.wav")
    with pytest.raises(InputError, match="two layouts"):
        tracks.find_tracks(tmp_path)
    dsd100(tmp_path / "mixed", "Dev/051 - A", "052 - B")
    with pytest.raises(InputError, match="holds Dev or Test and also songs"):
        tracks.find_tracks(tmp_path / "mixed")


def test_every_bad_song_is_named_and_the_others_are_kept(tmp_path):
    root = dsd100(tmp_path, "Dev/051 - A", "Dev/052 - B", "Dev/053 - C", "Dev/054 - D")
    (root / "Sources/Dev/051 - A/vocals.wav").unlink()
    (root / "Mixtures/Dev/052 - B/mixture.wav").unlink()
    write(root / "Mixtures/Dev/053 - C/mixture (1).wav")
    write_all(root, "Sources/Dev/055 - E/vocals.wav")
    found = tracks.find_tracks(root)
    assert list(splits(found)) == ["054 - D"]
    told = ["no vocals.*", "no audio file", "not mixture (1).wav, mixture.wav", "no such folder"]
    for message, song, what in zip(found.bad, "ABCE", told, strict=True):
        assert f" - {song}: " in message
        assert what in message


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("vocals.wav", "vocals.flac", "bass.wav"), "same stem more than once: vocals.flac, voc"),
        (("mix.wav", "mixture.wav", "vox.wav"), "2 mixtures"),
        (("vocals.wav", "bv.wav"), "only voices"),
        (("bass.wav", "drums.wav"), "no file's name says voice"),
    ],
)
def test_a_folder_of_stems_must_hold_voices_and_others(tmp_path, files, message):
    write_all(tmp_path, *(f"bad/{name}" for name in files), "good/vox.wav", "good/bass.wav")
    found = tracks.find_tracks(tmp_path)
    assert list(splits(found)) == ["good"]
    assert len(found.bad) == 1
    assert message in found.bad[0]


def test_what_operating_systems_leave_behind_is_ignored(tmp_path):
    root = dsd100(tmp_path, "Dev/051 - A")
    for name in (".DS_Store", "Thumbs.db", "._mixture.wav", "desktop.ini", "notes.txt"):
        for folder in (root, root / "Mixtures", root / "Mixtures/Dev/051 - A"):
            (folder / name).write_bytes(b"x")
    found = tracks.find_tracks(root)
    assert (list(splits(found)), found.bad) == (["051 - A"], [])


def test_one_name_in_two_spellings_is_one_song(tmp_path):
    composed = unicodedata.normalize("NFC", "051 - Café")
    decomposed = unicodedata.normalize("NFD", composed)
    write(tmp_path / "Mixtures/Dev" / composed / "mixture.wav")
    write(tmp_path / "Sources/Dev" / decomposed / "vocals.wav")
    found = tracks.find_tracks(tmp_path)
    assert (list(splits(found)), found.bad) == ([composed], [])


def test_two_songs_of_one_name_are_both_bad(tmp_path):
    dsd100(tmp_path / "a", "Dev/001 - X", "Test/001 - X", "Test/002 - Y")
    found = tracks.find_tracks(tmp_path / "a")
    assert list(splits(found)) == ["002 - Y"]
    assert len(found.bad) == 2
    assert "2 songs are called '001 - X'" in found.bad[0]
    root = write_all(tmp_path / "voices", "Anna.wav", "anna.wav", "Ben.wav")
    if len(list(root.iterdir())) == 3:  # the disk tells upper from lower case
        assert list(splits(tracks.find_tracks(root))) == ["Ben"]


def test_links_that_lead_back_are_not_followed_and_dangling_ones_are_told(tmp_path):
    root = write_all(tmp_path / "voices", "a.wav", "folder/b.wav")
    (root / "folder" / "up").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "gone.wav").symlink_to("nowhere.wav")
    found = tracks.find_tracks(root)
    assert list(splits(found)) == ["a", "folder/b", "gone"]
    with pytest.raises(InputError, match=r"gone\.wav: no such file"):
        tracks.measure(found.tracks[-1])


def test_names_that_are_not_unicode_are_read(tmp_path):
    root = write_all(tmp_path / "voices", "a.wav")
    os.rename(root / "a.wav", os.fsencode(root) + b"/\xff.wav")
    (track,) = tracks.find_tracks(root).tracks
    assert read(track).shape == (1, 800)


def pair(tmp_path: Path, n_mixture: int, n_vocals: int, rate: int = RATE) -> tracks.Track:
    write(tmp_path / "song/mixture.wav", np.full(n_mixture, 0.5))
    write(tmp_path / "song/vocals.wav", np.full(n_vocals, 0.5), rate)
    return tracks.find_tracks(tmp_path).tracks[0]


@pytest.mark.parametrize(("n_mixture", "n_vocals"), [(1000, 1400), (1400, 1000)])
def test_fifty_milliseconds_are_trimmed_with_a_note(tmp_path, n_mixture, n_vocals):
    track = pair(tmp_path, n_mixture, n_vocals)
    extent = tracks.measure(track)
    assert extent.n_samples == 1000
    assert f"mixture {n_mixture} and vocals {n_vocals} samples" in extent.notes[0]
    assert read(track).shape == (2, 1000)


def test_more_than_fifty_milliseconds_are_an_error_with_both_lengths(tmp_path):
    track = pair(tmp_path, 1401, 1000)
    with pytest.raises(InputError, match=r"mixture 1401 and vocals 1000 samples, 0\.05 s apart"):
        tracks.measure(track)


def test_two_sample_rates_are_an_error_with_both(tmp_path):
    track = pair(tmp_path, 1000, 1000, rate=16000)
    with pytest.raises(InputError, match=r"vocals\.wav: 16000 Hz, but mixture\.wav has 8000 Hz"):
        tracks.measure(track)


@pytest.mark.parametrize("n_samples", [1, 7, 333, 5000])
def test_blocks_of_any_size_are_the_same_music(tmp_path, n_samples):
    rng = np.random.default_rng(0)
    for name, n in (("vox", 900), ("bv", 1000), ("bass", 700)):
        write(tmp_path / f"song/{name}.wav", rng.uniform(-1, 1, (n, 2)))
    (track,) = tracks.find_tracks(tmp_path).tracks
    np.testing.assert_array_equal(read(track, n_samples), read(track, 1000))


def test_whole_tracks_keep_their_channels_and_their_mean_is_what_blocks_give(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in (("vox", (900, 2)), ("bv", 1000), ("bass", (700, 2)), ("drums", 600)):
        write(tmp_path / f"song/{name}.wav", rng.uniform(-0.5, 0.5, shape))
    (track,) = tracks.find_tracks(tmp_path).tracks
    both = tracks.read_channels(track)
    assert (both.shape, both.dtype) == ((2, 2, 1000), np.float32)
    np.testing.assert_allclose(both.mean(1), read(track), atol=1e-6)
    vox, bv = (soundfile.read(tmp_path / f"song/{name}.wav")[0] for name in ("vox", "bv"))
    np.testing.assert_allclose(both[0, 1, :900], vox[:, 1] + bv[:900], atol=1e-6)


def test_whole_tracks_subtract_the_vocals_of_a_mixture_and_take_single_channels(tmp_path):
    wav = np.random.default_rng(0).uniform(-0.5, 0.5, (1010, 2))
    write(tmp_path / "a/song/mixture.wav", wav)
    write(tmp_path / "a/song/vocals.wav", 0.5 * wav[:1000])
    (track,) = tracks.find_tracks(tmp_path / "a").tracks
    np.testing.assert_allclose(tracks.read_channels(track)[1], 0.5 * wav[:1000].T, atol=1e-7)
    write(tmp_path / "b/Wavfile/amy_1_01.wav", wav)
    (track,) = tracks.find_tracks(tmp_path / "b").tracks
    np.testing.assert_allclose(tracks.read_channels(track), wav.T[::-1, None], atol=1e-7)


def test_stems_of_three_and_two_channels_do_not_go_together(tmp_path):
    write(tmp_path / "song/vocals.wav", np.zeros((100, 3)))
    write(tmp_path / "song/bass.wav", np.zeros((100, 2)))
    (track,) = tracks.find_tracks(tmp_path).tracks
    with pytest.raises(InputError, match=r"bass\.wav: 2 channels beside 3 of others"):
        tracks.read_channels(track)


def test_estimates_are_found_by_folder_by_name_and_as_generate_writes_them(tmp_path):
    for name in ("A", "B - c", "D.e", "deep/F"):
        write_all(tmp_path / "songs", f"{name}/vocals.wav", f"{name}/bass.wav")
    found = tracks.find_tracks(tmp_path / "songs").tracks
    root = write_all(
        tmp_path / "est",
        *("test/A/vocals.wav", "test/A/accompaniment.flac", "test/A/bass.wav"),
        *("B - c_Vocals.wav", "x/D.e_accompaniment.wav", "deep/F/mixture_vocals.wav"),
        *("not A_vocals.wav", "F_vocals.wav", "vocals of A.wav"),
    )
    assert tracks.find_estimates(root, found) == {
        "A": {
            "vocals": root / "test/A/vocals.wav",
            "accompaniment": root / "test/A/accompaniment.flac",
        },
        "B - c": {"vocals": root / "B - c_Vocals.wav"},
        "D.e": {"accompaniment": root / "x/D.e_accompaniment.wav"},
        "deep/F": {"vocals": root / "deep/F/mixture_vocals.wav"},
    }
    write_all(root, "A_vocals.wav")
    with pytest.raises(InputError, match=r"is vocals of 'A', too; keep one"):
        tracks.find_estimates(root, found)
    with pytest.raises(InputError, match="no such folder"):
        tracks.find_estimates(tmp_path / "gone", found)


def test_a_stem_that_is_cut_is_an_error_and_not_silence(tmp_path):
    wav = np.random.default_rng(0).uniform(-0.1, 0.1, 44100)
    write(tmp_path / "song/vocals.wav", wav, 44100)
    path = tmp_path / "song/drums.mp3"
    soundfile.write(path, wav, 44100)
    path.write_bytes(path.read_bytes()[:-4000])
    for n_samples in (1000, 44100, 100_000):
        with pytest.raises(InputError, match=r"drums\.mp3: header promises 44100 frames"):
            read(tracks.find_tracks(tmp_path, "songs").tracks[0], n_samples)


def test_real_music_is_recognised(data_folder):
    layouts = {
        "mir1k": "MIR-1K, one folder a clip",
        "dsd100": "a folder of stems per song",
        "voices": "only voices, to be remixed",
        "backings": "only backings, to be remixed",
    }
    for name in layouts.keys() & set(os.listdir(data_folder)):
        found = tracks.find_tracks(data_folder / name)
        assert (found.layout, found.bad) == (layouts[name], [])
        assert tracks.measure(found.tracks[0]).seconds > 1
