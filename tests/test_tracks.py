import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import write_wav as write

from hparams import InputError
from sound import tracks, writing

RATE = 8000


def write_all(root: Path, *paths: str) -> Path:
    for path in paths:
        write(root / path)
    return root


def read(track: tracks.Track, n_samples: int = 300) -> np.ndarray:
    """The mean of the channels, (n_signals, n_samples), read in blocks."""
    return np.concatenate(list(tracks.read_blocks(track, n_samples)), -1).mean(1)


def splits(found: tracks.Collection) -> dict[str, str]:
    return {track.name: track.split for track in found.tracks}


def dsd100(root: Path, *places: str) -> Path:
    for place in places:
        write_all(root, f"Mixtures/{place}/mixture.wav", f"Sources/{place}/vocals.wav")
    return root


@pytest.mark.parametrize(
    ("layout", "files", "songs"),
    [
        ("DSD100", "Mixtures/{}/mixture Sources/{}/vocals Sources/{}/bass", "Dev/1 Dev/2 Test/3"),
        ("MUSDB18-HQ", "{}/vocals {}/mixture", "train/A test/C"),
        ("MIR-1K, one folder a clip", "{}/vocals {}/accompaniment", "train/a_1 rest/b_2"),
    ],
)
def test_data_sets_of_song_folders_are_recognised(tmp_path, layout, files, songs):
    for song in songs.split():
        write_all(tmp_path, *(f"{file.format(song)}.flac" for file in files.split()))
    found = tracks.find_tracks(tmp_path)
    assert found.layout == layout
    split_of = {"Dev": "train", "train": "train", "Test": "test", "test": "test", "rest": "test"}
    assert splits(found) == {s.split("/")[1]: split_of[s.split("/")[0]] for s in songs.split()}
    for track in found.tracks:
        assert track.signals == ("vocals", "accompaniment")
        assert {path.stem for path in track.paths} == {"vocals"} | {
            "accompaniment" if layout.startswith("MIR") else "mixture"
        }


def test_mir1k_sings_on_the_right_channel(tmp_path):
    stereo = np.tile([0.25, 0.5], (800, 1))
    for clip in ("abjones_1_01", "amy_2_03", "Ani_1_01"):
        write(tmp_path / "Wavfile" / f"{clip}.wav", stereo)
    found = tracks.find_tracks(tmp_path)
    assert found.layout == "MIR-1K"
    assert splits(found) == {"Ani_1_01": "test", "abjones_1_01": "train", "amy_2_03": "train"}
    assert [(track.singer, track.group) for track in found.tracks][1] == ("abjones", "abjones_1")
    np.testing.assert_array_equal(read(found.tracks[0])[:, :2], [[0.5, 0.5], [0.25, 0.25]])


VOICES = """
    Vocal; VOX; Vox Lead; LeadVox; lead_vocals_dry; BackingVox; BGVs; BV 2; voc_2; Male Voice;
    Choir; Singer 1; ACapella; a cappella; vocals no reverb; Vocals (no FX); lead vox no bvs;
    No Woman No Cry vocals; Say No - Vocals; piano vox; Casino Vocals; vocals minus 3 dB;
    Without You vocals; Vocals_offset; Instrumental Love - Vocals; LeadVoxOffAxis; NoVerbVox;
    Vocals Only (no instrumental); Lead Vocals without karaoke; Adlibs; ad-lib 2; Harmonies;
    Leadvoc; Singing; Gesang; Vocal Cuts; Screams; Harmony 1; LV; Akapella; Voix;
    a_(Vocals)_UVR-MDX-NET-Inst_HQ_3
"""
OTHERS = """
    NoVocals; NOVOX; no vox; no_voice; NoLeadVocals; Without Any Vocals; w_o vox; Minus One;
    MinusOne Vocals; Instrumental with backing vox; Karaoke w. Choir; VocalsRemoved; vox-off;
    vocals muted; Vocal Free; voiceless; off vocal ver.; nonvocal; sans voice; Drums; Vocoder;
    Vocal Cut; vocals out; TV mix (BV); Backing track with backing vocals; Inst w BVs; Vox Organ;
    Gtr VOX AC30; choir pad; everything except vocals; zero vocals; excl. lead vocals;
    Advocate; No BVs; Vocal Remover; 1_Song_(Instrumental)_Kim_Vocal_2; song (no vocals);
    devocalized; Voice 3 synth; vocal pad; ohne Vocals; TV tracks with BVs; Harmonica;
    TV mixes (BV); Vox Amp; Kick_Voxengo; Singing Bowl; everything but vocals; Rapid Drums
"""


def test_a_stem_is_a_voice_unless_its_name_denies_it(tmp_path):
    voices, others = (" ".join(names.split()).split("; ") for names in (VOICES, OTHERS))
    write_all(tmp_path, *(f"song/{i} {name}.wav" for i, name in enumerate(voices + others)))
    (track,) = tracks.find_tracks(tmp_path, "songs").tracks
    for parts, names in ((track.vocals, voices), (track.accompaniment, others)):
        assert {part.path.stem.partition(" ")[2] for part in parts} == set(names)
    (track,) = tracks.find_tracks(tmp_path, "songs", voice_pattern="vocoder|no bvs").tracks
    assert len(track.vocals) == 3, "lead vox no bvs, Vocoder, No BVs"


def test_pairs_side_by_side_in_one_folder_are_songs_of_their_own(tmp_path):
    for name, files, titles in (
        ("own", "One_vocals One_accompaniment Two_vocals Two_accompaniment", ["one", "two"]),
        ("uvr", "1_A_(Vocals)_Inst_HQ 1_A_(Instrumental)_Inst_HQ", ["uvr"]),
        (
            "mixed",
            "B - A,B - A (Acapella),C,C no vocals,C Vocals".replace(" ", "_"),
            ["b - a", "c"],
        ),
        ("demucs", "One_vocals One_drums One_bass Two_vocals Two_drums Two_other", ["one", "two"]),
        ("numbers", "01_vocals 01_band 02_vocals 02_band", ["01", "02"]),
        ("stems", "Vox_1 Vox_2 Drums_1 Bass_2", ["stems"]),
    ):
        names = files.replace(",", " ").split()
        write_all(tmp_path / name, *(f"{file.replace('_', ' ')}.wav" for file in names))
        found = tracks.find_tracks(tmp_path / name, "songs")
        assert list(splits(found)) == titles
        assert not found.bad
        assert all(track.mixture or track.accompaniment for track in found.tracks)
        assert bool(found.tracks[0].mixture) == (name == "mixed")
    assert found.roles == "vocals: vox 1, vox 2; rest: bass 2, drums 1"


def test_material_for_remixing_is_told_by_the_option(tmp_path):
    root = write_all(tmp_path / "voices", "x.wav", "Anna/1.wav", "Anna/2.flac")
    told = [message.partition(": ")[2] for message in tracks.find_tracks(root).bad]
    assert [message[:29] for message in told] == ["no file's name says voice (se"] * 2
    for kind, part in (("voices", "vocals"), ("backings", "accompaniment")):
        found = tracks.find_tracks(root, kind)
        assert [track.signals for track in found.tracks] == [(part,)] * 3
        assert [track.name for track in found.tracks] == ["Anna/1", "Anna/2", "x"]
        assert [track.singer for track in found.tracks] == ["Anna", "Anna", "x"]


def test_a_folder_without_songs_says_what_was_expected(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        tracks.find_tracks(tmp_path / "missing")
    with pytest.raises(InputError, match="not a folder"):
        tracks.find_tracks(write(tmp_path / "song.wav"))
    for name in ("empty", "Mixtures", "train"):
        (tmp_path / name / name).mkdir(parents=True)
        with pytest.raises(InputError, match=r"no songs .* Mixtures/<set>/<song>/mixture.wav"):
            tracks.find_tracks(tmp_path / name)
    dsd100(tmp_path / "train", "Dev/051 - A")
    with pytest.raises(InputError, match="two layouts"):
        tracks.find_tracks(tmp_path / "train")


def test_every_bad_song_is_named_and_the_others_are_kept(tmp_path):
    root = dsd100(tmp_path / "dsd", "Dev/051 - A", "Dev/052 - B", "Dev/053 - C", "Dev/054 - D")
    (root / "Sources/Dev/051 - A/vocals.wav").unlink()
    (root / "Mixtures/Dev/052 - B/mixture.wav").unlink()
    write(root / "Mixtures/Dev/053 - C/mixture.flac")
    songs = {
        "A": ("same stem more than once", "vocals.wav vocals.flac bass.wav"),
        "B": ("2 mixtures", "mix.wav mixture.wav vox.wav"),
        "C": ("only voices", "vocals.wav bv.wav"),
        "D": ("no file's name says voice", "bass.wav drums.wav"),
        "054 - D": (None, "vox.wav bass.wav"),
    }
    for name, (_, files) in songs.items():
        write_all(tmp_path / "songs" / name, *files.split())
    told = ["vocals.* is expected, not none", "mixture.* is expected, not none"]
    told += ["not mixture.flac, mixture.wav"]
    for folder, said in (
        (root, told),
        (tmp_path / "songs", [what for what, _ in songs.values() if what]),
    ):
        found = tracks.find_tracks(folder)
        assert list(splits(found)) == ["054 - D"]
        assert len(found.bad) == len(said)
        for message, song, what in zip(found.bad, "ABCD", said, strict=False):
            assert f"{song}: " in message
            assert what in message


def test_only_what_is_known_to_be_no_music_is_ignored(tmp_path):
    titles = ("...One More Time", "..Hits/track", ".38 Special", "__init", "Thumbs up")
    titles += (".trash talk/a", "Lost+Found/a")
    write_all(tmp_path / "voices", *(f"{title}.wav" for title in titles))
    left = ("._Hits.wav", "__MACOSX/a.wav", "@eaDir/b.wav", ".Trash-1000/c.wav", "lost+found/d.wav")
    write_all(tmp_path / "voices", *left)
    for name in (".DS_Store", "Thumbs.db", ".a.wav.tmp-12", "notes.txt", "x.JPG", "README"):
        (tmp_path / "voices" / name).write_bytes(b"x")
    found = tracks.find_tracks(tmp_path / "voices", "voices")
    assert sorted(track.name for track in found.tracks) == sorted(titles)
    assert found.left_out == "not taken: 3 without a sound's extension (.txt, none, .jpg)"
    songs, left_out = tracks.find_songs(tmp_path / "voices")
    assert sorted(str(f / path.stem) for path, f in songs.items()) == sorted(titles)
    assert left_out == found.left_out


def test_outputs_say_what_they_are_and_are_no_songs(tmp_path):
    write_all(tmp_path, "a.wav", "album/b_vocals.wav", "album/c.flac")
    info = tracks.reading.probe(tmp_path / "a.wav")
    fmt, silence = writing.choose_format(info), writing.Separated(*np.zeros((3, 1, 100), int))
    for record, name in (("0" * 24, "a_vocals"), ("0" * 24, "made"), ("", "d_vocals")):
        path = tmp_path / f"{name}.wav"
        with writing.SoundWriter(path, info, fmt, "vocals", record) as writer:
            writer.write(silence)
    found, left_out = tracks.find_songs(tmp_path)
    names = {path.stem: folder.as_posix() for path, folder in found.items()}
    assert names == {"a": ".", "b_vocals": "album", "c": "album", "d_vocals": ".", "made": "."}
    assert left_out == "not taken: 1 written by earlier runs"
    assert list(tracks.find_songs(tmp_path / "a_vocals.wav")[0]) == [tmp_path / "a_vocals.wav"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/cover.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no songs in this folder; .* extension \(\.jpg\)"):
        tracks.find_songs(tmp_path / "empty")


def test_two_spellings_of_a_name_are_one_song_and_two_songs_of_one_name_are_bad(tmp_path):
    composed = unicodedata.normalize("NFC", "051 - Café")
    decomposed = unicodedata.normalize("NFD", composed)
    write(tmp_path / "Mixtures/Dev" / composed / "mixture.wav")
    write(tmp_path / "Sources/Dev" / decomposed / "vocals.wav")
    dsd100(tmp_path, "Dev/001 - X", "Test/001 - x", "Test/002 - Y")
    found = tracks.find_tracks(tmp_path)
    assert list(splits(found)) == ["002 - Y", composed]
    assert ["2 songs are called" in message for message in found.bad] == [True, True]


def test_links_that_lead_back_are_not_followed_and_dangling_ones_are_told(tmp_path):
    root = write_all(tmp_path / "voices", "a.wav", "folder/b.wav")
    (root / "folder" / "up").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "gone.wav").symlink_to("nowhere.wav")
    os.rename(root / "a.wav", os.fsencode(root) + b"/\xff.wav")
    found = tracks.find_tracks(root, "voices")
    assert list(splits(found)) == ["folder/b", "gone", "\udcff"]
    with pytest.raises(InputError, match=r"gone\.wav: no such file"):
        tracks.measure(found.tracks[1])


def pair(tmp_path: Path, n_mixture: int, n_vocals: int, rate: int = RATE) -> tracks.Track:
    write(tmp_path / "song/mixture.wav", np.full(n_mixture, 0.5))
    write(tmp_path / "song/vocals.wav", np.full(n_vocals, 0.5), rate)
    return tracks.find_tracks(tmp_path).tracks[0]


def test_what_does_not_belong_together_is_trimmed_with_a_note_or_refused(tmp_path):
    for n_mixture, n_vocals in ((1000, 1400), (1400, 1000)):
        track = pair(tmp_path, n_mixture, n_vocals)
        extent = tracks.measure(track)
        assert extent.n_samples == 1000
        assert f"mixture {n_mixture} and vocals {n_vocals} samples" in extent.notes[0]
        np.testing.assert_array_equal(read(track), [[0.5] * 1000, [0] * 1000])
    with pytest.raises(InputError, match=r"mixture 1401 and vocals 1000 samples, 0\.05 s apart"):
        tracks.measure(pair(tmp_path, 1401, 1000))
    with pytest.raises(InputError, match=r"vocals\.wav: 16000 Hz, but mixture\.wav has 8000 Hz"):
        tracks.measure(pair(tmp_path, 1000, 1000, rate=16000))
    write(tmp_path / "song/vocals.wav", np.tile([0.1, 0.2, 0.3], (1000, 1)))
    write(tmp_path / "song/mixture.wav", np.tile([0.2, 0.4], (1000, 1)))
    np.testing.assert_allclose(read(track), [[0.2] * 1000, [0.1] * 1000], atol=1e-7)
    with pytest.raises(InputError, match=r"mixture\.wav: .* different numbers of channels"):
        tracks.read_channels(track)


def test_whole_tracks_keep_their_channels_and_their_mean_is_what_blocks_give(tmp_path, monkeypatch):
    monkeypatch.setattr(tracks.reading, "DISK_BLOCK", 250)
    rng = np.random.default_rng(0)
    for name, shape in (("vox", (900, 2)), ("bv", 1000), ("bass", (700, 2)), ("drums", 600)):
        write(tmp_path / f"song/{name}.wav", rng.uniform(-0.5, 0.5, shape))
    (track,) = tracks.find_tracks(tmp_path).tracks
    both = tracks.read_channels(track)
    assert (both.shape, both.dtype) == ((2, 2, 1000), np.float32)
    for n_samples in (1, 7, 333, 5000):
        np.testing.assert_allclose(both.mean(1), read(track, n_samples), atol=1e-6)
    assert tracks.measure(track) == (RATE, 1000, 2, ())
    assert not both[1, :, 700:].any()
    vox, bv = (soundfile.read(tmp_path / f"song/{name}.wav")[0] for name in ("vox", "bv"))
    np.testing.assert_allclose(both[0, 1, :900], vox[:, 1] + bv[:900], atol=1e-6)


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
