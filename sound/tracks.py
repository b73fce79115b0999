"""Music on the user's disk, in the layouts people have: folders → tracks, read on demand.

`find_tracks` recognises the layout and lists every song as a `Track`: a name, a split and the
files of its signals. `measure` reads only headers; `read_blocks` yields vocals and accompaniment
block by block, so memory does not grow with the song; `read_channels` returns them whole.
Names are compared as people read them: composed Unicode, upper and lower case alike.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import cli
from hparams import InputError
from sound import decoding, reading, writing

# Some of them cannot be read: the reader says so, which is better than a song without that stem.
AUDIO = {
    *(".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc"),
    *(".caf", ".w64", ".rf64", ".au", ".m4a", ".aac", ".wma", ".webm"),
}
STEM_MIXTURE, STEM_VOCALS = 0, 4  # streams of a MUSDB18 file: mixture, drums, bass, other, vocals
KINDS = ("songs", "voices", "backings")
MIXTURE_NAMES = ("mixture", "mix", "full mix", "fullmix", "master")
_VOICE = (
    r"(vocal|vox(?!engo)|voice|choir|singer|singing(?! (bowl|saw))|harmonies|a ?[ck]{1,2}app?ell?a"
    r"|\b(ad ?libs?|screams?|growls?|rap(per)?|beatbox|spoken ?word|soprano|harmony ?\d)\b"
    r"|\b(gesang|stimme|voix|voz|voce|coro|chor)\b|\b((lead)?voc|bv|bg ?v|lv)s?\d*\b)"
)
# What says that there is no voice: a word for the band denies it for all of a name (unless that is
# the title, before " - ", or denied itself), others for the voice beside them.
_NO_VOICE = (
    r"(.*(?<!\bno )(?<!\bwithout )\b(inst|instrumentals?|karaoke|backing ?tracks?"
    r"|tv ?(mix(es)?|tracks?)|minus ?(one|1(?! ?d ?b))|off ?vocal)\b(?!.* - ).*$"
    r"|\b(vox ?(organ|continental|amp|ac ?\d+)|(choir|vox|vocal|voice)s? ?\d* ?(pads?|synth))\b"
    r"|\bde ?vocal\w*"
    r"|\b(no|non|not|without|w o|sans|ohne|minus|except|but|excl|excluding|zero)"
    r"( ?(any|lead|main|back(ing|ground)|bgd?|(fe)?male))* ?"
    rf"{_VOICE}\w*\b"
    rf"|{_VOICE}\w*? ?(muted?|remov\w*|eliminat\w*|suppressed|deleted)\b"
    rf"|{_VOICE}\w*? ?(less|free|off|out|cut)(?=$| - | (mix|ver|version|track|edit|\d+)\b))"
)
# Searched in a stem's name as `_words` gives it: a voice that is not in the part that denies it.
VOICE_PATTERN = rf"^({_NO_VOICE}|(?!{_NO_VOICE}|{_VOICE}).)*(?!{_NO_VOICE}){_VOICE}"
# What a file's name says beside the song's title, where files lie side by side in one folder.
_STEM_WORDS = (
    r"\b(no|without)?( ?(lead|main))? ?(vocals?|vox|voice|accompaniment|instrumentals?|inst|karaoke"
    r"|backing( ?track)?|band|music|a ?[ck]{1,2}app?ell?a|minus ?one|drums|bass|other|guitar"
    r"|piano)\b"
)
_TOLD = r"\((vocals|instrumental)\)"  # as Ultimate Vocal Remover writes, before a network's name
# What systems, servers and programs leave in folders; whatever else has a dot in front is music.
_LEFTOVERS = (
    r"(?i:\._.*|\.ds_store|\.apple(double|db|desktop)|\.(spotlight|documentrevisions)-v100"
    r"|\.fseventsd|\.trash(es|-\d+)?|\.temporaryitems|__macosx|thumbs\.db|desktop\.ini"
    r"|\$recycle\.bin|#recycle|@eadir|system volume information)|lost\+found|\.snapshots?"
    r"|\.stversions|\.(git|hg|svn)|\..*\.tmp-\d+"
)
TRIM_SECONDS = 0.05  # encoders pad by less; a mixture and vocals further apart do not belong
MIR1K_TRAIN = ("abjones", "amy")
SPLITS = ("train", "test", "rest")  # rest: what MIR-1K calls its test set


@dataclass(frozen=True)
class Part:
    """One file, or what is taken of it; a signal is the sum of its parts."""

    path: Path
    channel: int | None = None  # None: the mean of all channels
    stream: int = 0  # of a .stem.mp4


@dataclass(frozen=True)
class Track:
    """One song: where its signals are. Accompaniment is mixture − vocals where it has no parts."""

    name: str  # unique in its folder of music
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


def n_bytes(track: Track) -> int:
    """Return the size of a track's files, which grows with its length."""
    return sum(path.stat().st_size for path in track.paths if path.is_file())


class Collection(NamedTuple):
    """The songs of a folder of music."""

    layout: str
    tracks: list[Track]  # sorted by name
    bad: list[str]  # one message per song that cannot be used
    left_out: str = ""  # how many files are in no song, and why
    roles: str = ""  # which stems are taken for voice and which for the band, by their names


class Extent(NamedTuple):
    """What the headers say about a track."""

    sample_rate: int  # [Hz]
    n_samples: int
    n_channels: int | None  # None where its files have such that do not go together
    notes: tuple[str, ...]  # what was trimmed, and what is odd about a file; for the user to read


def find_tracks(
    root: Path, kind: str | None = None, voice_pattern: str = VOICE_PATTERN
) -> Collection:
    """Recognise the layout of a folder of music and list its songs.

    A folder that follows no data set's layout is of this `kind`, one of `KINDS`: songs as folders
    of stems (the default), those with `voice_pattern` in their names the vocals, or material to
    remix. InputError if it is missing, holds no songs, or could be read in two ways.
    """
    cli.refuse_missing_folder(root)
    try:
        voice = re.compile(voice_pattern, re.IGNORECASE)
    except re.error as error:
        raise InputError(f"voice pattern {voice_pattern!r}: {error}") from error
    layouts = {"mixtures": _dsd100, "wavfile": _mir1k, **dict.fromkeys(SPLITS, _split_folders)}
    names = {_key(entry.name) for entry in _entries(root) if entry.is_dir()} & set(layouts)
    readers = {layouts[name] for name in names}
    if kind is None and len(readers) > 1:
        raise InputError(f"{root}: holds {' and '.join(sorted(names))}: two layouts")
    if kind in ("voices", "backings"):
        music = _material(root, kind)
    else:
        music = readers.pop()(root) if kind is None and readers else _stems(root, voice)
    if not music.tracks and not music.bad:
        raise InputError(
            f"{root}: no songs found as {music.layout}; expected for example "
            "Mixtures/<set>/<song>/mixture.wav, train/<song>/mixture.wav or <song>/vocals.wav"
        )
    sounds = {path for track in music.tracks for path in track.paths}
    left_out = _left_out(_files(root), sounds, "that no usable song needs")
    return _without_twins(music)._replace(left_out=left_out)


def _dsd100(root: Path) -> Collection:
    """DSD100: {Mixtures,Sources}/{Dev,Test}/<song>/{mixture,vocals}.wav."""
    mixtures, sources = _inside(root, "mixtures"), _inside(root, "sources")
    sets = [folder for folder in _entries(mixtures) if _key(folder.name) in ("dev", "test")]

    def track(folder: Path) -> Track:
        stems = _inside(_inside(sources, folder.parent.name), folder.name)
        is_test = _key(folder.parent.name) == "test"
        return _track(folder.name, is_test, _only(folder, "mixture"), _only(stems, "vocals"))

    return _collect("DSD100", track, [p for s in sets for p in _entries(s) if p.is_dir()])


def _split_folders(root: Path) -> Collection:
    """MUSDB18-HQ: {train,test}/<song>/{mixture,vocals}.wav; MUSDB18: <song>.stem.mp4 instead.

    MIR-1K cut into files: {train,rest}/<clip>/{vocals,accompaniment}.*.
    """
    songs = [path for split in SPLITS for path in _entries(_inside(root, split))]
    stems = [path for path in songs if path.name.lower().endswith(decoding.STEM_MP4)]
    folders = [path for path in songs if path.is_dir()]
    is_mir1k = any(_key(path.parent.name) == "rest" for path in folders)

    def track(path: Path) -> Track:
        is_test = _key(path.parent.name) != "train"
        if stems:
            parts = (Part(path, stream=STEM_MIXTURE),), (Part(path, stream=STEM_VOCALS),)
            return _track(path.name[: -len(decoding.STEM_MP4)], is_test, *parts)
        if is_mir1k:
            parts = (), _only(path, "vocals"), _only(path, "accompaniment")
            return _track(path.name, is_test, *parts, is_clip=True)
        return _track(path.name, is_test, _only(path, "mixture"), _only(path, "vocals"))

    layout = "MIR-1K, one folder a clip" if is_mir1k else "MUSDB18-HQ"
    return _collect("MUSDB18" if stems else layout, track, stems or folders)


def _mir1k(root: Path) -> Collection:
    """MIR-1K: Wavfile/<singer>_<song>_<clip>.wav, left the accompaniment, right the voice."""

    def track(path: Path) -> Track:
        channels = reading.probe(path).n_channels
        if channels != 2:
            raise InputError(f"{path}: {channels} channels; MIR-1K has the voice on the right one")
        is_test = path.stem.split("_")[0] not in MIR1K_TRAIN
        parts = (), (Part(path, channel=1),), (Part(path, channel=0),)
        return _track(path.stem, is_test, *parts, is_clip=True)

    return _collect("MIR-1K", track, _audio_files(_inside(root, "wavfile")))


def _collect(layout: str, track: Callable[..., Track], jobs: Iterable) -> Collection:
    """Make the tracks of a layout, and messages for what cannot be one."""
    tracks, bad = [], []
    for job in jobs:
        try:
            tracks.append(track(job))
        except InputError as error:
            bad.append(str(error))
    return Collection(layout, tracks, bad)


def _track(name: str, is_test: bool, *signals: tuple[Part, ...], is_clip: bool = False) -> Track:
    """Make a song of mixture, vocals and accompaniment; a clip is <singer>_<song>_<clip>."""
    name = _composed(name)
    singer, song = (name.split("_")[0], name.rpartition("_")[0]) if is_clip else (name, name)
    return Track(name, "test" if is_test else "train", singer, song, *signals)


def _stems(root: Path, voice: re.Pattern[str]) -> Collection:
    """Songs as folders: those stems whose names say voice are the vocals, all summed the song."""
    folders = {folder: files for folder in _walk(root) if (files := _audio_files(folder))}
    roles = {"vocals": Counter(), "rest": Counter()}

    def track(job: tuple[Path, str, list[Path]]) -> Track:
        folder, title, files = job
        if len({_key(path.stem) for path in files}) < len(files):  # they would be summed
            raise InputError(f"{folder}: the same stem more than once: {_names(files)}; keep one")
        signals = {"mixture": (), "vocals": (), "rest": ()}
        for path in files:
            kind, words = "vocals" if _is_voice(path, voice) else "rest", _words(path.stem)
            if words in MIXTURE_NAMES or (words == title and len(files) > 1):
                kind = "mixture"
            else:
                roles[kind][words] += 1
            signals[kind] += (Part(path),)
        mixture, vocals, rest = signals.values()
        if len(mixture) > 1:
            raise InputError(f"{folder}: {len(mixture)} mixtures among {_names(files)}; keep one")
        if not vocals:
            what = "no file's name says voice (see --voice-pattern; for material to remix --as)"
            raise InputError(f"{folder}: {what}")
        if not mixture and not rest:
            what = "only voices; add the other stems or the mixture, or build it --as voices"
            raise InputError(f"{folder}: {what}")
        name = folder.relative_to(root).as_posix() if folder != root else root.resolve().name
        if files != folders[folder]:
            name = title if folder == root else f"{name}/{title}"
        return _track(name, False, mixture, vocals, () if mixture else rest)

    jobs = [
        (folder, title, some)
        for folder, files in folders.items()
        for title, some in _by_title(files, voice).items()
    ]
    music = _collect("a folder of stems per song", track, jobs)
    said = (f"{kind}: {_counted(names)}" for kind, names in roles.items() if names)
    return music._replace(roles="; ".join(said))


def _by_title(files: list[Path], voice: re.Pattern[str]) -> dict[str, list[Path]]:
    """Divide a folder into songs if its files come by title, voice and band, as separators write.

    What follows a stem's name, "vox 1" or "vox L", is no title unless it is a word.
    """
    songs: dict[str, list[Path]] = {}
    for path in files:
        words = _words(path.stem)
        title = " ".join(re.sub(_STEM_WORDS, " ", words).split())
        is_title = words.startswith(title) or re.search(r"[^\W\d]{2}", title)
        songs.setdefault(title if is_title else "", []).append(path)
    are_whole = all(len({_is_voice(path, voice) for path in some}) == 2 for some in songs.values())
    return songs if are_whole and "" not in songs else {"": files}


def _is_voice(path: Path, voice: re.Pattern[str]) -> bool:
    told = re.search(_TOLD, _key(path.stem))
    return bool(voice.search(told[1] if told else _words(path.stem)))


def _counted(names: Counter[str]) -> str:
    """List the most frequent names."""
    most = [f"{name} ×{n}" if n > 1 else name for name, n in names.most_common(6)]
    return ", ".join(most) + f" and {len(names) - 6} more" * (len(names) > 6)


def _material(root: Path, kind: str) -> Collection:
    """Only voices or only backings; a folder inside is a singer or an album."""
    tracks = []
    for path in filter(_is_sound, _files(root)):
        name = _composed(path.relative_to(root).with_suffix("").as_posix())
        signals = ((), (Part(path),), ()) if kind == "voices" else ((), (), (Part(path),))
        tracks.append(Track(name, "train", name.split("/")[0], name, *signals))
    return Collection(f"only {kind}, to be remixed", tracks, [])


def _without_twins(music: Collection) -> Collection:
    """Sort; two songs of one name would overwrite each other, or leak from train into test."""
    counts = Counter(_key(track.name) for track in music.tracks)
    twins = [track for track in music.tracks if counts[_key(track.name)] > 1]
    bad = [f"{t.paths[0]}: {counts[_key(t.name)]} songs are called {t.name!r}" for t in twins]
    tracks = [track for track in music.tracks if track not in twins]
    return music._replace(tracks=sorted(tracks, key=lambda t: t.name), bad=music.bad + bad)


def _only(folder: Path, stem: str) -> tuple[Part]:
    """Return the one audio file of that name in a folder; InputError if there is not one."""
    files = [path for path in _audio_files(folder) if _key(path.stem) == stem]
    if len(files) != 1:
        raise InputError(f"{folder}: one {stem}.* is expected, not {_names(files) or 'none'}")
    return (Part(files[0]),)


def find_songs(root: Path) -> tuple[dict[Path, Path], str]:
    """List the songs that `root` is or holds, each with its folder within `root`, and what is not.

    In a folder, what is called ``<song>_vocals.*`` or ``<song>_accompaniment.*`` and says that this
    project made it is no song. InputError if there is none, or if a folder cannot be read.
    """
    if not os.path.isdir(root):
        return {root: Path()}, ""
    files = _files(root)
    songs = {
        path: path.parent.relative_to(root)
        for path in filter(_is_sound, files)
        if not (path.stem.endswith(("_vocals", "_accompaniment")) and writing.record_in(path))
    }
    left_out = _left_out(files, songs, "written by earlier runs")
    if not songs:
        raise InputError(f"{root}: no songs in this folder; {left_out or 'it is empty'}")
    return songs, left_out


def _left_out(files: list[Path], taken: Container[Path], reason: str) -> str:
    """Say how many files are not taken: those that are no sound, and others for this reason."""
    others = [path for path in files if path not in taken]
    endings = Counter(path.suffix.lower() for path in others if not _is_sound(path))
    n_silent, n_sounds = endings.total(), len(others) - endings.total()
    names = ", ".join(ending or "none" for ending, _ in endings.most_common(5))
    silent = f"{n_silent} without a sound's extension ({names})"
    texts = [silent] * bool(n_silent) + [f"{n_sounds} {reason}"] * bool(n_sounds)
    return f"not taken: {' and '.join(texts)}" if texts else ""


def find_estimates(folder: Path, songs: list[Track]) -> dict[str, dict[str, Path]]:
    """Find what a system has written for some songs: the files of each, by the signal they hold.

    They are, anywhere in the folder, ``<song>/vocals.*``, ``<song>_vocals.*`` or, made from a file
    called mixture, ``<song>/mixture_vocals.*``; the same with accompaniment. InputError if the
    folder is missing, or holds two files for the same signal of a song.
    """
    cli.refuse_missing_folder(folder)
    place, sounds = folder.resolve().name, filter(_is_sound, _files(folder))
    files = {p: _key(f"/{place}/{p.relative_to(folder).with_suffix('')}") for p in sounds}
    estimates: dict[str, dict[str, Path]] = {track.name: {} for track in songs}
    for track, signal in itertools.product(songs, ("vocals", "accompaniment")):
        endings = tuple(f"/{_key(track.name)}{end}{signal}" for end in ("/", "_", "/mixture_"))
        paths = [path for path, name in files.items() if name.endswith(endings)]
        if len(paths) > 1:
            raise InputError(f"{paths[0]}: {paths[1]} is {signal} of {track.name!r}, too; keep one")
        if paths:
            estimates[track.name][signal] = paths[0]
    return estimates


def _files(root: Path) -> list[Path]:
    """List the files in a folder and in those inside it, in order."""
    return [p for folder in _walk(root) for p in _entries(folder) if not os.path.isdir(p)]


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


def _inside(folder: Path, name: str) -> Path:
    """Return what a folder holds under a name, however it is spelled there."""
    same = (path for path in _entries(folder) if _key(path.name) == _key(name))
    return next(same, folder / name)


def _entries(folder: Path) -> list[Path]:
    """List a folder in one order everywhere, without what is known to be no music."""
    if not os.path.isdir(folder):
        return []
    try:
        paths = [p for p in folder.iterdir() if not re.fullmatch(_LEFTOVERS, p.name)]
    except PermissionError:
        raise InputError(f"{folder}: permission denied") from None
    return sorted(paths, key=lambda path: (_key(path.name), path.name))


def _audio_files(folder: Path) -> list[Path]:
    """List the sounds of a folder; a dangling link is one, to be complained of later."""
    return [p for p in _entries(folder) if _is_sound(p) and not os.path.isdir(p)]


def _is_sound(path: Path) -> bool:
    return path.suffix.lower() in AUDIO


def _composed(name: str) -> str:
    """Return é as one character: macOS stores two."""
    return unicodedata.normalize("NFC", name)


def _key(name: str) -> str:
    """Return what two names share that are one to a reader, or to a Mac."""
    return _composed(name).casefold()


def _words(name: str) -> str:
    """Return a name in lower case, LeadVox as two words, with spaces between words; " - " stays."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]{2})", " ", _composed(name))
    return re.sub(r"[\W_]+", lambda m: " - " if m[0] == " - " else " ", _key(name)).strip()


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)


def measure(track: Track) -> Extent:
    """Read a track's headers; played faster, the same samples have a higher rate.

    InputError if a file cannot be read, if sample rates differ, or if mixture and vocals differ in
    length by more than 50 ms. Stems that end early are silent from there.
    """
    probed = {
        name: [(part, reading.probe(part.path, stream=part.stream)) for part in parts]
        for name, parts in track.parts.items()
    }
    files = [file for files in probed.values() for file in files]
    first = files[0][1]
    notes, counts = [], {1}
    for part, info in files:
        if info.sample_rate != first.sample_rate:
            other = f"{first.path.name} has {first.sample_rate} Hz"
            raise InputError(f"{info.path}: {info.sample_rate} Hz, but {other}; convert one")
        notes += [f"{info.path}: {text}" for text in info.warnings]
        counts.add(info.n_channels if part.channel is None else 1)
    lengths = {name: max(info.n_samples for _, info in files) for name, files in probed.items()}
    n_samples = max(lengths.values())
    apart = abs(lengths.get("mixture", n_samples) - lengths.get("vocals", n_samples))
    if track.mixture and track.vocals and apart:
        both = f"mixture {lengths['mixture']} and vocals {lengths['vocals']} samples"
        if apart > TRIM_SECONDS * first.sample_rate:
            raise InputError(
                f"{track.vocals[0].path}: {both}, {apart / first.sample_rate:.2f} s apart; "
                "export both again from the same start to the same end"
            )
        notes.append(f"{track.vocals[0].path}: {both}; trimmed to the shorter")
        n_samples -= apart
    n_channels = max(counts) if len(counts) < 3 else None
    played = round(first.sample_rate * track.speed)
    return Extent(played, n_samples, n_channels, tuple(dict.fromkeys(notes)))


def read_blocks(track: Track, n_samples: int) -> Iterator[np.ndarray]:
    """Decode a track: (len(track.signals), n_channels, <= n_samples), float32, in that order.

    Parts are summed; a mono part beside others is the same in all channels. Where numbers of
    channels do not go together, all are mixed to mono. InputError if a file cannot be read to its
    end.
    """
    extent = measure(track)
    size = n_samples, extent.n_samples, extent.n_channels or 1
    sums = [_sum(parts, *size) for parts in track.parts.values()]
    for blocks in zip(*sums, strict=True):
        signals = dict(zip(track.parts, blocks, strict=True))
        if track.mixture:
            signals["accompaniment"] = signals["mixture"] - signals.get("vocals", np.float32(0))
        yield np.stack([signals[name] for name in track.signals])


def read_channels(track: Track) -> np.ndarray:
    """Decode a whole track with all its channels: (len(track.signals), n_channels, n_samples).

    As `read_blocks`; InputError, too, if numbers of channels do not go together.
    """
    if measure(track).n_channels is None:
        raise InputError(f"{track.paths[0]}: its song's files have different numbers of channels")
    return np.concatenate(list(read_blocks(track, reading.DISK_BLOCK)), axis=-1)


def _sum(
    parts: tuple[Part, ...], n_samples: int, total: int, n_channels: int
) -> Iterator[np.ndarray]:
    """Yield the sum of all parts, exactly `total` samples; a part that ends early is silent."""
    with contextlib.ExitStack() as stack:
        readers = [
            stack.enter_context(reading.Reader(part.path, stream=part.stream)) for part in parts
        ]
        sources = [reader.float_blocks(n_samples) for reader in readers]
        for start in range(0, total, n_samples):
            n = min(n_samples, total - start)
            summed = np.zeros((n_channels, n), np.float32)
            for part, source in zip(parts, sources, strict=True):
                block = next(source, np.zeros((1, 0), np.float32))[:, :n]
                if part.channel is not None and block.size:
                    block = block[[part.channel]]
                if len(block) > n_channels:
                    block = block.mean(0, keepdims=True)
                summed[:, : block.shape[1]] += block
            yield summed
        for reader, source in zip(readers, sources, strict=True):
            for _ in source:  # to its end, where what is missing is noticed
                pass
            if reader.n_read - total > TRIM_SECONDS * reader.info.sample_rate:
                raise InputError(f"{reader.info.path}: longer than its header says (make it a wav)")
