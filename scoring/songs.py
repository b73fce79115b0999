"""From a song's files to its scores: of a network, of other systems' files, of the ideal masks.

    true vocals, accompaniment ──▶ mixture ──▶ systems' vocals, accompaniment ──▶ scores

Waveforms of a song are float32 of (2, n_channels, n_samples): vocals, then accompaniment. BSSEval
gets them rounded to 16 bits: what a lossy decoder leaves below that makes museval's own scores
change by 0.3 dB when all signals are scaled alike. Where a true source is silent nobody has a
score; a silent estimate of what can be heard scores `WORST_DB` in every metric (museval leaves it
out, which would reward silence where a song is hard).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import audio
import cli
from hparams import UNTUNED_MASK, HParams, InputError, hparams, override, parse_settings
from model import learnt_songs, load_checkpoint, song_key
from scoring import metrics
from scoring.tables import BEST_DB, FLOOR, FORMAT, IDEALS, STEMS, WORST_DB, Record, rounded
from separation import Separator
from sound import pairs, reading, tracks
from sound.reading import sha256
from sound.tracks import Track

ROOT = Path(__file__).parents[1]
CODE = (  # a changed line in these may change every score
    *("audio.py", "model.py", "separation.py"),
    *(f"scoring/{name}.py" for name in ("metrics", "songs", "tables")),
    *(f"sound/{name}.py" for name in ("containers", "decoding", "pairs", "reading", "tracks")),
)

BITS_DB = 98.0  # SIR and SAR of a whole song go no higher: 16 bits hold no more


class Evaluation(NamedTuple):
    """What is done with every song; small enough to be sent to other processes."""

    checkpoint: Path | None  # None: no network, only the STFT of the ideal masks
    device: str
    settings: tuple[str, ...]  # of --set
    seconds: float | None  # of the middle of every song; None: all of it


class Job(NamedTuple):
    """A song, and the files that systems have made of it: by system, by stem."""

    track: Track
    estimates: dict[str, dict[str, Path]]


@functools.lru_cache(maxsize=1)  # once in each process
def load_network(task: Evaluation) -> Separator:
    """Load the network."""
    return Separator.load(task.checkpoint, task.device, parse_settings(task.settings))


def hparams_of(task: Evaluation) -> HParams:
    """Return the network's settings; without one, those of the ideal masks."""
    return load_network(task).hp if task.checkpoint else override(hparams, task.settings)


def conditions(task: Evaluation) -> dict[str, Any]:
    """Collect what decides all songs' scores, as JSON keeps it."""
    about = {"format": FORMAT, "seconds": task.seconds, "hparams": asdict(hparams_of(task))}
    if task.checkpoint:
        separator = load_network(task)
        about |= {
            "checkpoint": {"file": task.checkpoint.name, "sha256": sha256(task.checkpoint)},
            "computed_in": f"{separator.dtype} on {separator.device.type}",
            "mask_settings": {**separator.mask_settings, "stereo": separator.stereo},
        }
    about["code"] = {name: sha256(ROOT / name) for name in CODE}
    about["versions"] = {"torch": torch.__version__, "numpy": np.__version__}
    return json.loads(json.dumps(about))


def known_songs(checkpoint: Path | None) -> dict[str, set[str]]:
    """Name the songs that a checkpoint was made with, by what for, as `song_key` spells them."""
    contents = load_checkpoint(checkpoint) if checkpoint else {}
    tuned_on = {song_key(song["name"]) for song in contents.get("tuned_on", ())}
    return {
        "the checkpoint learnt from": set(learnt_songs(contents).values()),
        "its mask settings were tuned on": tuned_on,
    }


def jobs_of(songs: list[Track], folders: dict[str, Path]) -> tuple[list[Job], list[str]]:
    """Give each song the files that systems made of it; `folders` are the systems'.

    Returns the jobs, the largest first, as a long song at the end would keep all waiting, and a
    message for every song that lacks an estimate.
    """
    files = {name: tracks.find_estimates(folder, songs) for name, folder in folders.items()}
    jobs, bad = [], []
    for song in songs:
        estimates = {name: of_songs[song.name] for name, of_songs in files.items()}
        if missing := [str(folders[name]) for name, stems in estimates.items() if not stems]:
            where = "<song>/vocals.wav or <song>_vocals.wav"
            bad.append(f"{song.name}: no estimate in {', '.join(missing)} ({where})")
        else:
            jobs.append(Job(song, estimates))
    jobs.sort(key=lambda job: -tracks.n_bytes(job.track))
    return jobs, bad


def scores_of(
    task: Evaluation, about: dict[str, Any], folder: Path, job: Job
) -> tuple[Record, bool]:
    """Return a song's scores, which are kept as a JSON file, and whether they are new.

    A file that does not parse, or is not about what `conditions` says and these very files, is
    replaced.
    """
    files = [sha256(path) for path in job.track.paths]
    estimates = {
        system: {stem: sha256(path) for stem, path in paths.items()}
        for system, paths in job.estimates.items()
    }
    about = {**about, "files": files, "estimates": estimates}
    path = folder / f"{hashlib.sha256(job.track.name.encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(path.read_text())
        if stored["about"] == about:
            return stored["song"], False
    song = {**score_files(task, job), "files": files}
    text = json.dumps({"about": about, "song": song}, allow_nan=False)
    cli.replace_atomically(path, lambda file: file.write(text.encode()))
    return song, True


def middle(wavs: np.ndarray, sample_rate: int, seconds: float | None) -> np.ndarray:
    """Cut out the middle of waveforms (..., n_samples); None wants all."""
    n = wavs.shape[-1]
    n_kept = n if seconds is None else max(1, min(n, round(seconds * sample_rate)))
    return np.ascontiguousarray(wavs[..., (n - n_kept) // 2 :][..., :n_kept])


def read_estimates(
    system: str, files: dict[str, Path], mixture: np.ndarray, sample_rate: int
) -> tuple[np.ndarray, list[str]]:
    """Read what a system made of a song: "vocals", "accompaniment", or both.

    Returns (2, n_channels, n_samples), float32, like the `mixture` (n_channels, n_samples), of
    which a missing one is what the other leaves; and notes on what was done to them. InputError if
    rate, length (by more than ``tracks.TRIM_SECONDS``) or channels do not go with the song's.
    """
    n_channels, n_samples = mixture.shape
    wavs, notes = {}, []
    for stem, path in files.items():
        with reading.Reader(path) as reader:
            if (rate := reader.info.sample_rate) != sample_rate:
                raise InputError(f"{path}: {rate} Hz, the song has {sample_rate} Hz; convert it")
            wav = reader.read()
        length = f"{wav.shape[-1]} samples, the song has {n_samples}"
        missing = n_samples - wav.shape[-1]
        if abs(missing) > tracks.TRIM_SECONDS * sample_rate:
            raise InputError(f"{path}: {length}; export it again from the same start to the end")
        if missing:
            done = "trimmed" if missing < 0 else "padded with silence"
            notes.append(f"{stem} of {system}: {length}; {done}")
            wav = np.pad(wav[:, :n_samples], ((0, 0), (0, max(0, missing))))
        if len(wav) != n_channels:
            if 1 not in (len(wav), n_channels):
                raise InputError(f"{path}: {len(wav)} channels, the song has {n_channels}")
            done = "copied" if n_channels > 1 else "averaged"
            notes.append(f"{stem} of {system}: {len(wav)} channels {done} to {n_channels}")
            wav = np.broadcast_to(wav.mean(0), mixture.shape)
        wavs[stem] = wav
    vocals = wavs["vocals"] if "vocals" in wavs else mixture - wavs["accompaniment"]
    return np.stack([vocals, wavs.get("accompaniment", mixture - vocals)]), notes


def score_files(task: Evaluation, job: Job) -> Record:
    """Separate one song in every way, and score it; InputError if a file does not fit."""
    track, extent = job.track, tracks.measure(job.track)
    rate, notes, systems = extent.sample_rate, list(extent.notes), {}
    references = tracks.read_channels(track)
    pair, mono = pairs.Pair(), references.mean(1)
    for start in range(0, mono.shape[-1], pairs.BLOCK):
        pair.add(*mono[:, start : start + pairs.BLOCK])
    notes += filter(None, pair.findings())
    whole = references.sum(0)
    references = middle(references, rate, task.seconds)
    mixture, hp = middle(whole, rate, task.seconds), hparams_of(task)
    if task.checkpoint:
        systems["model"] = np.stack(load_network(task).separate(mixture, rate))
    for name, files in job.estimates.items():
        wavs, done = read_estimates(name, files, whole, rate)
        systems[name] = middle(wavs, rate, task.seconds)
        notes += done
    for name, mask in ideal_masks(references, rate, hp).items():
        systems[name] = separate_by_mask(mixture, mask, rate, hp, UNTUNED_MASK)
    return {
        "name": track.name,
        "group": track.group,
        "seconds": mixture.shape[-1] / rate,
        "notes": notes,
        "scores": score_song(references, systems, rate),
    }


def ideal_masks(references: np.ndarray, sample_rate: int, hp: HParams) -> dict[str, torch.Tensor]:
    """Return the masks (1, hp.n_bins, n_frames) of somebody who knows the truth.

    Each is one for all channels and has 8 bits: the ceiling of a network with one mask.
    """
    mono = torch.from_numpy(references.mean(1))
    truth = audio.to_network_bins(audio.stft(mono, audio.grid_at(sample_rate, hp)), hp)
    masks = (audio.ideal_binary_mask(*truth), audio.ideal_ratio_mask(*truth))
    return {n: audio.quantize_mask(mask)[None] for n, mask in zip(IDEALS, masks, strict=True)}


def separate_by_mask(
    mixture: np.ndarray,
    mask: torch.Tensor,
    sample_rate: int,
    hp: HParams,
    settings: dict[str, Any],
    is_mid_side: bool = False,
) -> np.ndarray:
    """Apply a mask to a mixture (n_channels, n_samples); returns (2, n_channels, n_samples).

    The mask is of the mixture, or one of mid and one of side, in `hp`'s bins; `settings` are all of
    ``MASK_SETTINGS``.
    """
    grid, wav = audio.grid_at(sample_rate, hp), torch.from_numpy(mixture)
    spec = audio.stft(audio.mid_side(wav) if is_mid_side else wav, grid)
    spec = audio.apply_mask(spec, audio.vocals_mask(mask, **settings))
    wav = audio.istft(spec, grid, mixture.shape[-1])
    vocals = (audio.left_right(wav) if is_mid_side else wav).numpy()
    return np.stack([vocals, mixture - vocals])


def score_song(
    references: np.ndarray, estimates: dict[str, np.ndarray], sample_rate: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Score all systems on one song, the mixture as ``floor`` among them.

    `references`, and the estimates of every system, are float32 (2, n_channels, n_samples).
    Returns, by system and stem: lists of ``sdr``, ``isr``, ``sir``, ``sar`` (BSSEval v4, a number a
    second); ``si_sdr`` and, of mono songs, of which it has been reported, ``v3_sdr``, ``v3_sir``,
    ``v3_sar`` (BSSEval v3) and ``nsdr`` (minus the floor's), all limited, as they are averaged over
    songs. None is a score that nobody has: a reference is silent in the frame or song.
    """
    mixture = references.sum(0)
    estimates = {FLOOR: np.stack([mixture, mixture]), **estimates}
    truth = _to_16_bits(references)
    guesses = torch.empty(len(estimates), *truth.shape)  # filled one by one: they are large
    for guess, estimate in zip(guesses, estimates.values(), strict=True):
        guess.copy_(_to_16_bits(estimate))
    scores = metrics.bss_eval_v4(truth, guesses, sample_rate)
    if is_mono := len(mixture) == 1:
        for name, score in metrics.bss_eval_v3(truth[:, 0], guesses[:, :, 0]).items():
            most_db = BEST_DB if name == "sdr" else BITS_DB
            scores[f"v3_{name}"] = score.clamp(WORST_DB, most_db)
    for name, score in scores.items():  # of a silent estimate the worst, where others have one
        is_nan = score.isnan()  # (n_systems, 2, ...)
        scores[name] = torch.where(is_nan & ~is_nan.all(0), WORST_DB, score)
    if is_mono:
        scores["nsdr"] = scores["v3_sdr"] - scores["v3_sdr"][0]
    has_truth = truth.flatten(1).any(-1).all()
    si_sdr = [
        [metrics.limited_si_sdr(*pair) for pair in zip(both, references, strict=True)]
        for both in estimates.values()
    ]
    scores["si_sdr"] = torch.tensor(si_sdr, dtype=torch.float64).where(has_truth, math.nan)
    return {
        system: {
            stem: {name: rounded(score[i, j].tolist()) for name, score in scores.items()}
            for j, stem in enumerate(STEMS)
        }
        for i, system in enumerate(estimates)
    }


def _to_16_bits(wav: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(wav).mul(2**15).round_().div_(2**15)
