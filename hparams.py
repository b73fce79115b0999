"""Every number a user may turn, in one table, and the one instance that the scripts read.

Edit the defaults here, or override them for one run: every script takes ``--set name=value``.
The groups say how long a value can still change: the grid is fixed once a dataset is built,
features and network once a checkpoint is trained, the mask settings are free for every song.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

UNTUNED_MASK = {
    "mask_at_eval": False,
    "eval_mask_threshold": 0.5,
    "noise_gate": 0.0,
    "mask_sharpness": 1.0,
}
MASK_SETTINGS = tuple(UNTUNED_MASK)
GONE = ("reverb", "compression", "compile", "schedule")  # in older files; nothing reads them


class InputError(Exception):
    """Something the user can fix; the message names the thing, the value and the remedy."""


class UsageError(InputError):
    """A wrong command line: the script ends with 2 instead of 1."""


@dataclass(frozen=True)
class HParams:
    """All settings; frozen, so that a misspelt name is an error and nothing changes mid-run."""

    # --- The grid: fixed once a dataset is built -------------------------------------------------
    sample_rate: int = 22050  # Hz; other rates get windows of the same duration, no resampler
    n_fft: int = 1024  # samples per window: 46 ms, bins 21.5 Hz apart
    hop_length: int = 256  # samples between frames: 11.6 ms; n_fft is 4, 6, 8 … of them

    # --- Features and network: fixed once a checkpoint is trained --------------------------------
    weighting: Literal["linear", "mel"] = "linear"  # the A-curve of the bins, or as first published
    min_level_db: float = -100.0  # dB re full-scale sine; this level and below is feature 0
    mixture_power: float = 2.0  # exponent of |X| before dB in the network's input
    stft_frames: int = 25  # frames the network sees; 25 = 290 ms
    stft_lookahead: int | None = None  # of them after the answered one: the delay; None: half
    mask_frames: int = 1  # neighbouring frames with one column of the mask; 2: half the operations
    model_type: Literal["resnet18", "convnet"] = "resnet18"
    width: int = 32  # channels of the first convolution; operations grow with its square

    # --- Training: free for every run ------------------------------------------------------------
    stft_stride: int = 1  # frames between training slices; inference always has step 1
    mask_target: Literal["activity", "dominance", "ratio", "phase"] = "ratio"  # docs/training.md
    vocals_power: float = 3.0  # "activity": exponent of |vocals| before dB ("cubed")
    mask_threshold: float = 0.4  # "activity": scaled vocals level above which the voice is there
    loss: Literal["sdr", "cross-entropy"] = "sdr"  # "sdr": energy of what is wrong with the voice
    loss_weight: float = 0.5  # "cross-entropy": amplitude to this power weights a bin; 0: all alike
    chunk_slices: int = 64  # neighbouring slices trained in one dense pass; 1 = separate slices
    batch_size: int = 8  # chunks per step, on all GPUs together
    epochs: int = 10  # passes over every slice position of the training songs
    steps: int | None = None  # length of the run in steps; None: as many as the epochs have
    optimizer: Literal["muon", "adamw"] = "muon"  # "muon" (Jordan 2024) is for convolutions only
    learning_rate: float = 1e-2  # at the peak of the run's one cycle; 0.003 for "adamw"
    weight_decay: float = 1e-2  # of all weights, apart from the loss (Loshchilov and Hutter 2019)
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    ema_decay: float = 0.97  # weights are averaged over some 1 / (1 - this) steps; 0: the last
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # "auto": bfloat16 if native
    remix: float = 0.5  # share of chunks whose voice and backing come from different songs, 0..1
    instrumental: float = 0.05  # share of chunks that are left without their voice, 0..1
    second_voice: float = 0.0  # share of chunks with a voice in which another sings along, 0..1
    second_backing: float = 0.0  # share of chunks whose backing is two, 0..1
    gain_db: float = 6.0  # voice and backing are each moved by up to ± this, and by 0 for 0
    level_db: float = 12.0  # the mixture is moved by up to ± this; 0 for "activity", a fixed level
    equalizer_db: float = 0.0  # voice and backing: standard deviation of each octave's gain
    trim: float = 0.0  # "sdr": share of a batch's worst teacher-labelled chunks left out, 0..1
    valid_fraction: float = 0.1  # share of the songs' length held out for validation
    valid_seconds: float = 20.0  # seconds of each held-out song that are separated and scored
    seed: int = 0  # same seed, same data, same CPU: same weights

    # --- Separation: free for every song; None means "as tuned for the checkpoint" ---------------
    mask_at_eval: bool | None = None  # True: binary mask, cleaner pauses; False: soft, smoother
    eval_mask_threshold: float | None = None  # binary: bins above are voice, 0..1; higher = drier
    noise_gate: float | None = None  # soft: bins below are silence, 0..1; higher = fewer remains
    mask_sharpness: float | None = None  # soft: exponent of the mask; > 1 drier, < 1 more of all
    stereo: Literal["mean", "mid-side", "channels", None] = None  # one mask, two, one a channel
    block_frames: int | None = None  # mask columns per network call; None: 256, on a GPU 2048

    def __post_init__(self) -> None:
        """Reject nonsense in one sentence that names the setting and its value."""
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                known = ", ".join(map(str, allowed))
                raise InputError(f"{name} is {value!r}; choose one of {known}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"{name} is {value!r}; it must lie between {low:g} and {high:g}")
        if self.stft_frames % 2 == 0:
            raise InputError(f"stft_frames is {self.stft_frames}; it must be odd")
        if self.lookahead > self.lookback:
            raise InputError(
                f"stft_lookahead is {self.lookahead}; of {self.stft_frames} frames, at most "
                f"{self.stft_frames // 2} may lie ahead"
            )
        if self.lookahead % self.mask_frames or (self.stft_frames - 1) % (2 * self.mask_frames):
            raise InputError(
                f"mask_frames is {self.mask_frames}; stft_lookahead, {self.lookahead}, must be a "
                f"multiple of it, and stft_frames - 1, {self.stft_frames - 1}, of twice that"
            )
        # An odd number of hops could, at another rate, be a window without a middle sample.
        if self.n_fft % (2 * self.hop_length) or self.n_fft < 4 * self.hop_length:
            sizes = f"n_fft is {self.n_fft} and hop_length {self.hop_length}"
            raise InputError(f"{sizes}; n_fft must be 4, 6, 8 … whole hops")
        silence_db = -100 * min(self.mixture_power, self.vocals_power)
        if self.min_level_db < silence_db + 2:
            raise InputError(
                f"min_level_db is {self.min_level_db:g}; silence, which is taken as "
                f"{silence_db:g} dB, must lie below it"
            )

    @property
    def n_bins(self) -> int:
        """Frequency bins the network sees, 513 by default."""
        return self.n_fft // 2 + 1

    @property
    def lookahead(self) -> int:
        """Frames the network sees after the one it answers, 12 by default."""
        return self.stft_frames // 2 if self.stft_lookahead is None else self.stft_lookahead

    @property
    def lookback(self) -> int:
        """Frames the network sees before the one it answers, 12 by default."""
        return self.stft_frames - 1 - self.lookahead


KINDS = typing.get_type_hints(HParams)
CHOICES = {k: typing.get_args(v) for k, v in KINDS.items() if typing.get_origin(v) is Literal}
GRID = tuple(KINDS)[:3]  # bound by a dataset
TRAINED = tuple(KINDS)[: tuple(KINDS).index("stft_stride")]  # bound by a checkpoint
_NAMES_IN_RANGE: dict[tuple[float, float], str] = {
    (4000, 384_000): "sample_rate",
    (16, 65536): "n_fft block_frames",
    (4, 16384): "hop_length",
    (-200, -1): "min_level_db",
    (1, 999): "stft_frames stft_stride",
    (0, 499): "stft_lookahead",
    (1, 12): "mask_frames",
    (2, 512): "width",
    (0.1, 10): "mixture_power vocals_power mask_sharpness",
    (1, 65536): "chunk_slices batch_size",
    (1, 1_000_000): "epochs",
    (1, 1_000_000_000): "steps",
    (1e-9, 10): "learning_rate",
    (0, 10): "loss_weight weight_decay",
    (1e-6, 1e6): "max_grad_norm",
    (0, 0.999_999): "ema_decay",
    (0, 1): "mask_threshold remix instrumental second_voice second_backing eval_mask_threshold "
    "noise_gate",
    (0, 0.9): "trim valid_fraction",
    (0, 60): "gain_db level_db",
    (0, 20): "equalizer_db",
    (1, 3600): "valid_seconds",
    (0, 2**31 - 1): "seed",
}
RANGES = {name: limits for limits, names in _NAMES_IN_RANGE.items() for name in names.split()}

hparams = HParams()


def override(hp: HParams, settings: list[str]) -> HParams:
    """Apply ``name=value`` strings of the command line; UsageError if one of them is wrong."""
    try:
        return replace(hp, **parse_settings(settings))
    except InputError as error:
        raise UsageError(f"--set {error}") from error


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Turn ``["width=16", "noise_gate=none"]`` into ``{"width": 16, "noise_gate": None}``."""
    values = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"{setting}: write it as name=value")
        if name not in KINDS:
            near = difflib.get_close_matches(name, KINDS, n=1)
            hint = f"did you mean {near[0]}?" if near else "hparams.py lists the settings"
            raise InputError(f"{setting}: there is no setting {name!r} ({hint})")
        values[name] = _parse_value(name, text, KINDS[name])
    return values


def from_dict(stored: dict[str, Any]) -> HParams:
    """Rebuild hparams that a dataset or checkpoint stored.

    Names that are younger than the file take today's defaults, what was given up is dropped.
    InputError if one is unknown: a newer version wrote the file.
    """
    stored = {name: value for name, value in stored.items() if name not in GONE}
    if unknown := sorted(stored.keys() - KINDS.keys()):
        raise InputError(f"unknown settings {', '.join(unknown)}; written by another version")
    return replace(HParams(), **stored)


def differences(one: HParams, other: HParams, names: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """Return the settings among `names` on which two hparams disagree, with both values."""
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _parse_value(name: str, text: str, kind: Any) -> Any:
    """Read one value as the type that the table above declares."""
    kind, *others = typing.get_args(kind) or (kind,)  # of "float | None", or of a Literal
    if text.lower() in ("none", "") and {None, type(None)} & {*others}:
        return None
    if isinstance(kind, str):
        return text
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise InputError(f"{name}={text}: {text!r} is not {wanted}") from None
