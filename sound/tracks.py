"""Music on the user's disk, in the layouts people have: folders → tracks, read on demand.

`find_tracks` recognises the layout and lists every song as a `Track`: a name, a split and the
files of its signals. `measure` reads only headers; `read_blocks` decodes, mixes to mono and
yields vocals and accompaniment block by block, so memory does not grow with the song;
`read_channels` returns them whole, with the channels that they have.
Names are compared as people read them: composed Unicode, upper and lower case alike.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hparams import InputError
from sound import reading

# Some of them cannot be read: the reader says so, which is better than a song without that stem.
AUDIO = {
    *(".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc"),
    *(".caf", ".w64", ".rf64", ".au", ".m4a", ".aac", ".wma", ".webm"),
}
STEM_MP4 = ".stem.mp4"
STEM_MIXTURE, STEM_VOCALS = 0, 4  # streams of a MUSDB18 file: mixture, drums, bass, other, vocals
KINDS = ("songs", "voices", "backings")
MIXTURE_NAMES = ("mixture", "mix", "full mix", "fullmix", "master")
# Searched in a file's name in lower case, with everything but letters and digits as one space.
VOICE_PATTERN = (
    r"(?<!\bno )(?<!\bnon )(?<!\bwithout )(?<!\bminus )"
    r"(vocal|vox|voice|choir|singer|acc?app?ella|\b(voc|bv|bgv)s?\d*\b)"
)
BACKING_PATTERN = r"backing|accompaniment|instrumental|karaoke"
TRIM_SECONDS = 0.05  # encoders pad by less; a mixture and vocals further apart do not belong
MIR1K_TRAIN = ("abjones", "amy")


@dataclass(frozen=True)
class Part:
    """One file, or what is taken of it; a signal is the sum of its parts."""

    path: Path
    channel: int | None = None  # None: the mean of all channels
    stream: int = 0  # of a .stem.mp4


@dataclass(frozen=True)
class Track:
    """One song: where its signals are. Accompaniment is mixture − vocals where it has no parts."""

    name: str  # unique among the tracks found together
    split: str  # "train" or "test"
    singer: str  # where the layout tells, else the same as `group`
    group: str  # the song: its clips are never divided between training and validation
    mixture: tuple[Part, ...] = ()
    vocals: tuple[Part, ...] = ()
    accompaniment: tuple[Part, ...] = ()
    speed: float = 1.0  # how much faster than recorded it is played, and higher

    @property
    def parts(self) -> dict[str, tuple[Part, ...]]:
        """The parts of every signal that has some."""
        signals = ("mixture", "vocals", "accompaniment")
        return {name: getattr(self, name) for name in signals if getattr(self, name)}

    @property
    def signals(self) -> tuple[str, ...]:
        """What `read_blocks` yields, in order."""
        have = {"vocals": self.vocals, "accompaniment": self.accompaniment or self.mixture}
        return tuple(name for name, parts in have.items() if parts)

    @property
    def paths(self) -> list[Path]:
        """Every file that is read, once each, in order."""
        return list(dict.fromkeys(part.path for parts in self.parts.values() for part in parts))


class Found(NamedTuple):
    """What `find_tracks` saw."""

    layout: str
    tracks: list[Track]  # sorted by name
    bad: list[str]  # one message per song that cannot be used


class Extent(NamedTuple):
    """What the headers say about a track."""

    sample_rate: int  # [Hz]
    n_samples: int
    notes: tuple[str, ...]  # what was trimmed, and what is odd about a file; for the user to read

    @property
    def seconds(self) -> float:
        """Duration [s]."""
        return self.n_samples / self.sample_rate


# --- Finding --------------------------------------------------------------------------------------


def find_tracks(root: Path, kind: str | None = None, voice_pattern: str = VOICE_PATTERN) -> Found:
    """Recognise the layout of a folder of music and list its songs.

    Parameters
    ----------
    root : Path
    kind : {"songs", "voices", "backings"}, optional
        What a folder is that follows no data set's layout: songs as folders of stems, only
        voices, or only backings. By default its own name and its files' names decide.
    voice_pattern : str
        Regular expression that says which stems are the vocals, see `VOICE_PATTERN`.

    Raises
    ------
    InputError
        If the folder is missing, holds no songs, or could be read in two ways.
    """
    _refuse_missing(root)
    try:
        voice = re.compile(voice_pattern, re.IGNORECASE)
    except re.error as error:
        raise InputError(f"voice pattern {voice_pattern!r}: {error}") from error
    names = {_key(entry.name) for entry in _entries(root) if entry.is_dir()}
    layouts = {"mixtures": _dsd100, "wavfile": _mir1k, "rest": _mir1k_clips, "test": _musdb18}
    if "rest" not in names:
        layouts["train"] = _musdb18
    readers = list(dict.fromkeys(layouts[name] for name in layouts if name in names))
    if kind is None and len(readers) > 1:
        raise InputError(f"{root}: holds {' and '.join(sorted(names & set(layouts)))}: two layouts")
    found = readers[0](root) if kind is None and readers else _folder(root, kind, voice)
    if not found.tracks and not found.bad:
        raise InputError(
            f"{root}: no songs found as {found.layout}; expected for example "
            "Mixtures/<set>/<song>/mixture.wav, train/<song>/mixture.wav or <song>/vocals.wav"
        )
    return _without_twins(found)


def _refuse_missing(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")


def _dsd100(root: Path) -> Found:
    """DSD100: {Mixtures,Sources}/{Dev,Test}/<song>/{mixture,vocals}.wav."""
    mixtures, sources = (_songs(root / _named(root, part)) for part in ("mixtures", "sources"))

    def track(key: tuple[str, str]) -> Track:
        folder, stems = mixtures.get(key), sources.get(key)
        if folder is None or stems is None:
            part = "Sources" if stems is None else "Mixtures"
            raise InputError(f"{folder or stems}: has no folder of the same name in {part}")
        return _track(
            folder.name, key[0] == "test", _only(folder, "mixture"), _only(stems, "vocals")
        )

    return _found("DSD100", track, sorted(mixtures | sources))


def _songs(root: Path) -> dict[tuple[str, str], Path]:
    """List {Dev,Test}/<song> by set and name."""
    sets = [folder for folder in _entries(root) if _key(folder.name) in ("dev", "test")]
    return {(_key(s.name), _key(p.name)): p for s in sets for p in _entries(s) if p.is_dir()}


def _musdb18(root: Path) -> Found:
    """MUSDB18-HQ: {train,test}/<song>/{mixture,vocals}.wav; MUSDB18: <song>.stem.mp4 instead."""

    def track(path: Path) -> Track:
        is_test = _key(path.parent.name) == "test"
        if path.is_dir():
            return _track(path.name, is_test, _only(path, "mixture"), _only(path, "vocals"))
        parts = (Part(path, stream=STEM_MIXTURE),), (Part(path, stream=STEM_VOCALS),)
        return _track(path.name[: -len(STEM_MP4)], is_test, *parts)

    songs = [p for split in ("train", "test") for p in _entries(root / _named(root, split))]
    stems = [path for path in songs if path.name.lower().endswith(STEM_MP4)]
    folders = [path for path in songs if path.is_dir()]
    if stems and folders:
        raise InputError(f"{root}: holds both .stem.mp4 files and song folders; keep one kind")
    return _found("MUSDB18" if stems else "MUSDB18-HQ", track, stems or folders)


def _mir1k(root: Path) -> Found:
    """MIR-1K: Wavfile/<singer>_<song>_<clip>.wav, left the accompaniment, right the voice."""

    def track(path: Path) -> Track:
        channels = reading.probe(path).n_channels
        if channels != 2:
            raise InputError(
                f"{path}: {channels} channels; MIR-1K has the accompaniment left, voice right"
            )
        is_test = path.stem.split("_")[0] not in MIR1K_TRAIN
        return _clip(path.stem, is_test, (Part(path, channel=1),), (Part(path, channel=0),))

    return _found("MIR-1K", track, _audio_files(root / _named(root, "wavfile")))


def _mir1k_clips(root: Path) -> Found:
    """MIR-1K cut into files: {train,rest}/<clip>/{vocals,accompaniment}.*; rest is the test set."""

    def track(path: Path) -> Track:
        parts = _only(path, "vocals"), _only(path, "accompaniment")
        return _clip(path.name, _key(path.parent.name) == "rest", *parts)

    songs = [p for split in ("train", "rest") for p in _entries(root / _named(root, split))]
    return _found("MIR-1K, one folder a clip", track, [path for path in songs if path.is_dir()])


def _found(layout: str, track: Callable[..., Track], jobs: Iterable) -> Found:
    """Make the tracks of a layout; what cannot be one is told."""
    tracks, bad = [], []
    for job in jobs:
        try:
            tracks.append(track(job))
        except InputError as error:
            bad.append(str(error))
    return Found(layout, tracks, bad)


def _track(name: str, is_test: bool, *signals: tuple[Part, ...]) -> Track:
    """Make a song; `signals` are mixture, vocals and accompaniment."""
    name = _composed(name)
    return Track(name, "test" if is_test else "train", name, name, *signals)


def _clip(name: str, is_test: bool, *signals: tuple[Part, ...]) -> Track:
    """Make a clip called <singer>_<song>_<clip>; `signals` are vocals and accompaniment."""
    name, split = _composed(name), "test" if is_test else "train"
    return Track(name, split, name.split("_")[0], name.rpartition("_")[0], (), *signals)


def _folder(root: Path, kind: str | None, voice: re.Pattern[str]) -> Found:
    """No data set's layout: songs as folders of stems, or a folder of only voices or backings."""
    folders = {folder: files for folder in _walk(root) if (files := _audio_files(folder))}
    if kind is None and folders:
        kind = _guess_kind(root, folders, voice)
    if kind in ("voices", "backings"):
        return _material(root, kind, [path for files in folders.values() for path in files])
    return _stems(root, folders, voice)


def _guess_kind(root: Path, folders: dict[Path, list[Path]], voice: re.Pattern[str]) -> str:
    """Decide by the folder's own name, unless what is inside it says otherwise."""
    name = _words(root.resolve().name)
    is_backing = re.search(BACKING_PATTERN, name)
    named = "voices" if voice.search(name) else "backings" if is_backing else None
    sung = [[bool(voice.search(_words(path.stem))) for path in files] for files in folders.values()]
    songs = any(any(song) and not all(song) for song in sung)
    if named and songs:
        raise InputError(
            f"{root}: is called {named} but holds songs with and without voice; "
            f"--as songs reads each folder as a song, --as {named} every file as one of {named}"
        )
    if not named and not songs:
        raise InputError(
            f"{root}: no folder holds both a file whose name says voice and another; "
            "for songs see --voice-pattern, for material to remix --as voices or --as backings"
        )
    return named or "songs"


def _stems(root: Path, folders: dict[Path, list[Path]], voice: re.Pattern[str]) -> Found:
    """Songs as folders: those stems whose names say voice are the vocals, all summed the song."""

    def track(folder: Path) -> Track:
        files = folders[folder]
        if len({_key(path.stem) for path in files}) < len(files):  # they would be summed
            raise InputError(f"{folder}: the same stem more than once: {_names(files)}; keep one")
        mixture = tuple(Part(path) for path in files if _words(path.stem) in MIXTURE_NAMES)
        others = [path for path in files if _words(path.stem) not in MIXTURE_NAMES]
        vocals = tuple(Part(path) for path in others if voice.search(_words(path.stem)))
        rest = tuple(Part(path) for path in others if not voice.search(_words(path.stem)))
        if len(mixture) > 1:
            raise InputError(f"{folder}: {len(mixture)} mixtures among {_names(files)}; keep one")
        if not vocals:
            raise InputError(f"{folder}: no file's name says voice (see --voice-pattern)")
        if not mixture and not rest:
            raise InputError(f"{folder}: only voices; add the other stems or the mixture")
        name = folder.relative_to(root).as_posix() if folder != root else root.resolve().name
        return _track(name, False, mixture, vocals, () if mixture else rest)

    return _found("a folder of stems per song", track, folders)


def _material(root: Path, kind: str, files: list[Path]) -> Found:
    """Only voices or only backings; a folder inside is a singer or an album."""
    tracks = []
    for path in files:
        name = _composed(path.relative_to(root).with_suffix("").as_posix())
        signals = ((), (Part(path),), ()) if kind == "voices" else ((), (), (Part(path),))
        tracks.append(Track(name, "train", name.split("/")[0], name, *signals))
    return Found(f"only {kind}, to be remixed", tracks, [])


def _without_twins(found: Found) -> Found:
    """Sort; two songs of one name would overwrite each other, or leak from train into test."""
    counts = Counter(_key(track.name) for track in found.tracks)
    twins = [track for track in found.tracks if counts[_key(track.name)] > 1]
    bad = [f"{t.paths[0]}: {counts[_key(t.name)]} songs are called {t.name!r}" for t in twins]
    tracks = [track for track in found.tracks if track not in twins]
    return found._replace(tracks=sorted(tracks, key=lambda t: t.name), bad=found.bad + bad)


def _only(folder: Path, stem: str) -> tuple[Part]:
    """Return the one audio file of that name in a folder; InputError if there is not one."""
    files = [path for path in _audio_files(folder) if _key(path.stem) == stem]
    if len(files) != 1:
        raise InputError(f"{folder}: one {stem}.* is expected, not {_names(files) or 'none'}")
    return (Part(files[0]),)


def find_songs(root: Path, output_dir: Path) -> dict[Path, Path]:
    """List the songs that `root` is or holds, each with its folder within `root`.

    What an earlier run wrote into `output_dir` is no song. InputError if there is none, or if a
    folder cannot be read.
    """
    if not os.path.isdir(root):
        return {root: Path()}
    songs, outputs = _all_audio(root), output_dir.resolve()
    if outputs == root.resolve():
        stems = ("vocals", "accompaniment")
        written = {(p.parent, f"{p.stem}_{stem}") for p in songs for stem in stems}
        songs = [path for path in songs if (path.parent, path.stem) not in written]
    else:
        songs = [path for path in songs if not path.resolve().is_relative_to(outputs)]
    if not songs:
        raise InputError(f"{root}: no audio files in this folder (name another one)")
    return {path: path.parent.relative_to(root) for path in songs}


def find_estimates(folder: Path, found: list[Track]) -> dict[str, dict[str, Path]]:
    """Find what a system has written for some songs: the files of each, by the signal they hold.

    They are, anywhere in the folder, ``<song>/vocals.*``, ``<song>_vocals.*`` or, made from a file
    called mixture, ``<song>/mixture_vocals.*``; the same with accompaniment. InputError if the
    folder is missing, or holds two files for the same signal of a song.
    """
    _refuse_missing(folder)
    place = folder.resolve().name
    files = {path: _key(f"/{place}/{path.relative_to(folder)}") for path in _all_audio(folder)}
    estimates: dict[str, dict[str, Path]] = {track.name: {} for track in found}
    for track, signal in itertools.product(found, ("vocals", "accompaniment")):
        endings = tuple(f"/{_key(track.name)}{end}{signal}" for end in ("/", "_", "/mixture_"))
        paths = [
            p for p, name in files.items() if name.removesuffix(_key(p.suffix)).endswith(endings)
        ]
        if len(paths) > 1:
            raise InputError(f"{paths[0]}: {paths[1]} is {signal} of {track.name!r}, too; keep one")
        if paths:
            estimates[track.name][signal] = paths[0]
    return estimates


def _all_audio(root: Path) -> list[Path]:
    """List the audio files in a folder and in those inside it, by their extension, in order."""
    return [path for folder in _walk(root) for path in _audio_files(folder)]


def _walk(root: Path) -> Iterator[Path]:
    """Yield a folder and those inside it, once each: a link that leads back is not followed."""
    seen, waiting = set(), [root]
    while waiting:
        folder = waiting.pop(0)
        status = folder.stat()
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            yield folder
            waiting += [path for path in _entries(folder) if os.path.isdir(path)]


def _named(root: Path, key: str) -> str:
    """Return how a folder inside `root` is spelled; `key` itself where there is none."""
    return next((path.name for path in _entries(root) if _key(path.name) == key), key)


def _entries(folder: Path) -> list[Path]:
    """List a folder in one order everywhere, without what operating systems leave behind."""
    if not os.path.isdir(folder):
        return []
    try:
        paths = [path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX"))]
    except PermissionError:
        raise InputError(f"{folder}: permission denied") from None
    return sorted(paths, key=lambda path: (_key(path.name), path.name))


def _audio_files(folder: Path) -> list[Path]:
    """List the audio files of a folder; a dangling link is one, to be complained of later."""
    return [p for p in _entries(folder) if p.suffix.lower() in AUDIO and not os.path.isdir(p)]


def _composed(name: str) -> str:
    """Return é as one character: macOS stores two."""
    return unicodedata.normalize("NFC", name)


def _key(name: str) -> str:
    """Return what two names share that are one to a reader, or to a Mac."""
    return _composed(name).casefold()


def _words(name: str) -> str:
    """Return a name in lower case, with one space for everything but letters and digits."""
    return re.sub(r"[\W_]+", " ", _key(name)).strip()


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)


# --- Reading --------------------------------------------------------------------------------------


def measure(track: Track) -> Extent:
    """Read a track's headers; played faster, the same samples have a higher rate.

    Raises
    ------
    InputError
        If a file cannot be read, if sample rates differ, or if mixture and vocals differ in length
        by more than 50 ms. Stems that end early are silent from there.
    """
    probed = {
        name: [reading.probe(part.path, stream=part.stream) for part in parts]
        for name, parts in track.parts.items()
    }
    infos = [info for infos in probed.values() for info in infos]
    first, rate = infos[0].path, infos[0].sample_rate
    played = round(rate * track.speed)
    for info in infos:
        if info.sample_rate != rate:
            raise InputError(
                f"{info.path}: {info.sample_rate} Hz, but {first.name} has {rate} Hz; convert one"
            )
    notes = [f"{info.path}: {text}" for info in infos for text in info.warnings]
    lengths = {name: max(info.n_samples for info in infos) for name, infos in probed.items()}
    apart = abs(lengths.get("mixture", 0) - lengths.get("vocals", 0))
    if "mixture" not in lengths or "vocals" not in lengths or not apart:
        return Extent(played, max(lengths.values()), tuple(dict.fromkeys(notes)))
    both = f"mixture {lengths['mixture']} and vocals {lengths['vocals']} samples"
    if apart > TRIM_SECONDS * rate:
        raise InputError(
            f"{track.vocals[0].path}: {both}, {apart / rate:.2f} s apart; "
            "export both again from the same start to the same end"
        )
    notes.append(f"{track.vocals[0].path}: {both}; trimmed to the shorter")
    return Extent(played, min(lengths["mixture"], lengths["vocals"]), tuple(dict.fromkeys(notes)))


def read_blocks(track: Track, n_samples: int) -> Iterator[np.ndarray]:
    """Decode a track as mono vocals and accompaniment.

    Yields
    ------
    np.ndarray, shape=(len(track.signals), <=n_samples), float32
        In the order of ``track.signals``. Channels are averaged, parts are summed.

    Raises
    ------
    InputError
        If a file cannot be read to its end.
    """
    for block in _signals(track, n_samples, is_mono=True):
        yield block[:, 0]


def read_channels(track: Track) -> np.ndarray:
    """Decode a whole track with all its channels.

    Returns
    -------
    np.ndarray, shape=(len(track.signals), n_channels, n_samples), float32
        In the order of ``track.signals``, at the rate that `measure` tells. Parts are summed; a
        mono part beside others is the same in all channels.

    Raises
    ------
    InputError
        If a file cannot be read to its end, or if numbers of channels do not go together.
    """
    return np.concatenate(list(_signals(track, reading.DISK_BLOCK, is_mono=False)), axis=-1)


def _signals(track: Track, n_samples: int, is_mono: bool) -> Iterator[np.ndarray]:
    """Yield (len(track.signals), n_channels, <= n_samples), mixed to mono where asked."""
    total = measure(track).n_samples
    sums = [_sum(parts, n_samples, total, is_mono) for parts in track.parts.values()]
    for blocks in zip(*sums, strict=True):
        n_channels = max(map(len, blocks))
        for (part, *_), block in zip(track.parts.values(), blocks, strict=True):
            _check_channels(part, len(block), n_channels)
        signals = dict(zip(track.parts, blocks, strict=True))
        if track.mixture:
            signals["accompaniment"] = signals["mixture"] - signals.get("vocals", np.float32(0))
        shape = (n_channels, blocks[0].shape[1])
        yield np.stack([np.broadcast_to(signals[name], shape) for name in track.signals])


def _sum(parts: tuple[Part, ...], n_samples: int, total: int, mono: bool) -> Iterator[np.ndarray]:
    """Yield the sum of all parts, exactly `total` samples; a part that ends early is silent."""
    sources, n_channels = [_blocks(part, n_samples, mono) for part in parts], 1
    for start in range(0, total, n_samples):
        n = min(n_samples, total - start)
        summed = np.zeros((n_channels, n), np.float32)  # as many also where a part has ended
        for part, source in zip(parts, sources, strict=True):
            block = next(source, np.zeros((1, 0), np.float32))[:, :n]
            if block.shape[1]:
                _check_channels(part, len(block), len(summed))
                summed = summed + np.pad(block, ((0, 0), (0, n - block.shape[1])))
        n_channels = len(summed)
        yield summed
    for source in sources:  # to its end, where what is missing is noticed
        for _ in source:
            pass


def _check_channels(part: Part, n_channels: int, n_others: int) -> None:
    if n_channels != n_others and 1 not in (n_channels, n_others):
        raise InputError(
            f"{part.path}: {n_channels} channels beside {n_others} of others; "
            "export all with as many"
        )


def _blocks(part: Part, n_samples: int, is_mono: bool) -> Iterator[np.ndarray]:
    """Yield all channels of a file, (n_channels, n), the one that is taken, or their mean."""
    with reading.Reader(part.path, stream=part.stream) as reader:
        for block in reader.float_blocks(n_samples):
            if part.channel is not None:
                yield block[part.channel : part.channel + 1]
            elif is_mono and len(block) > 1:
                yield (sum(block[1:], block[0]) / np.float32(len(block)))[None]
            else:
                yield block
