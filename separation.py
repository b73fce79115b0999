"""From a song to its vocals: block by block, in constant memory, at the song's own rate.

    samples ──▶ STFT ──▶ features ──▶ network ──▶ mask ──× STFT──▶ inverse ──▶ vocals

One unit of work is N frames, `block_frames` for files and 1 for live audio, counted from the start
of the song; how the samples arrive changes nothing. The network looks `context` (12) frames ahead,
so a unit's mask columns lie that much behind its frames:

    frames of unit k          │◀─ 24 remembered ─▶│ kN ……………………… kN + N - 1 │
    mask columns, vocals            kN - 12 ……………………… kN + N - 13 │
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import audio
import model as networks
import soundio
from hparams import MASK_SETTINGS, RANGES, TRAINED, UNTUNED_MASK, HParams, InputError, hparams

READ_SAMPLES = 1 << 16  # samples read at a time; has no influence on the result
MAX_CHANNELS = 1024  # as in libsndfile; more is an array that needs transposing
BLOCK_FRAMES = {"cpu": 256, "cuda": 2048}  # a CPU's cache wants few, a GPU many


class Separator:
    """A trained network, ready to separate.

    It takes over the `model` it is given, whose batch norms are folded in place.

    Attributes
    ----------
    hp : HParams
        Audio and network settings, as trained.
    mask_settings : dict
        ``mask_at_eval``, ``eval_mask_threshold``, ``noise_gate``, ``mask_sharpness`` in force.
    device : torch.device
    dtype : torch.dtype
        What the network computes in.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        hp: HParams,
        curve_db: torch.Tensor,
        mask_settings: dict[str, Any],
        device: torch.device,
    ) -> None:
        is_narrow = networks.is_narrow(hp, device, for_inference=True)
        self.dtype = torch.bfloat16 if is_narrow else torch.float32
        self.model = networks.for_inference(model).to(device, self.dtype)
        self.hp, self.device, self.mask_settings = hp, device, mask_settings
        self.curve_db = curve_db.to(device)
        self.block_frames = hp.block_frames or BLOCK_FRAMES[device.type]

    @classmethod
    def load(
        cls,
        path: Path | str,
        device: torch.device | str = "cpu",
        settings: HParams = hparams,
        explicit: dict[str, Any] | None = None,
    ) -> Separator:
        """Load a checkpoint.

        Parameters
        ----------
        path : Path or str
        device : torch.device or str
        settings : HParams
            Its mask settings, where they are not None, go before those tuned for the checkpoint.
        explicit : dict, optional
            Settings that the user named: refused where training fixed another value.

        Raises
        ------
        InputError
            If the checkpoint is missing or damaged, or contradicts `explicit`.
        """
        checkpoint = networks.load_checkpoint(Path(path))
        model, hp = networks.restore_model(Path(path), checkpoint)
        for name, value in (explicit or {}).items():
            if name in TRAINED and getattr(hp, name) != value:
                raise InputError(f"{path}: trained with {name}={getattr(hp, name)}, not {value}")
        for name in ("curve_db", "mask_settings"):
            if name not in checkpoint:
                raise InputError(f"{path}: holds no {name} (use one that train.py wrote)")
        mask_settings = {**UNTUNED_MASK, **checkpoint["mask_settings"]}
        for name in MASK_SETTINGS:
            if getattr(settings, name) is not None:
                mask_settings[name] = getattr(settings, name)
        hp = replace(hp, block_frames=settings.block_frames, precision=settings.precision)
        return cls(model, hp, checkpoint["curve_db"], mask_settings, torch.device(device))

    def stream(self, sample_rate: int, n_channels: int, **options: Any) -> Stream:
        """Start on a song of which the samples arrive bit by bit; options as for `Stream`."""
        return Stream(self, sample_rate, n_channels, **options)

    def separate(
        self, wav: np.ndarray | torch.Tensor, sample_rate: int, per_channel: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Separate a waveform that is in memory.

        Parameters
        ----------
        wav : np.ndarray or torch.Tensor, shape=(n_samples,) or (n_channels, n_samples)
            Full scale 1; not modified.
        sample_rate : int
            [Hz], 4000 to 384000.
        per_channel : bool
            As for `Stream`.

        Returns
        -------
        vocals, accompaniment : np.ndarray, float32
            Shaped like `wav`; they add up to it.

        Raises
        ------
        InputError
            If `wav` is of another shape, or `sample_rate` out of range.
        """
        wav = _copy(wav)
        if wav.ndim not in (1, 2):
            raise InputError(f"a waveform of shape {tuple(wav.shape)}: (n_channels, n_samples)?")
        n_channels = len(wav) if wav.ndim == 2 else 1
        stream = self.stream(sample_rate, n_channels, per_channel=per_channel)
        parts = [stream.push(wav.reshape(n_channels, wav.shape[-1])), stream.finish()]
        vocals = torch.cat(parts, -1).reshape(wav.shape)
        return vocals.numpy(), (wav - vocals).numpy()

    @torch.inference_mode()
    def mask(self, features: torch.Tensor, past: networks.Past | None = None) -> torch.Tensor:
        """Return the network's answer in 256 levels.

        Parameters
        ----------
        features : torch.Tensor, shape=(..., n_bins, n_columns + stft_frames - 1)
        past : dict, optional
            The network's memory: from the second call on, `features` are n_columns new frames.

        Returns
        -------
        torch.Tensor, shape=(..., n_bins, n_columns), in [0, 1]
        """
        x = features.to(self.dtype).reshape(-1, 1, *features.shape[-2:])
        logits = self.model(x, past).float()
        return audio.quantize_mask(logits.sigmoid()).reshape(*features.shape[:-1], -1)


class Stream:
    """The state of one song that is being separated: what later units need of earlier ones.

    Parameters
    ----------
    separator : Separator
    sample_rate : int
        [Hz]
    n_channels : int
    live : bool
        Work frame by frame, for the least delay: what comes out lies at most `delay` samples
        behind what went in. The network remembers its layers' last frames, so a frame costs one
        column of work; masks are those of a file to rounding.
    per_channel : bool
        Listen to every channel by itself, instead of one mask from their mean.
    saved : callable, optional
        Instead of the network: maps n to the song's next n mask columns,
        (1 or n_channels, n_bins, n), uint8.
    on_mask : callable, optional
        Called with the song's next mask columns, of that shape, as they are known.
    """

    def __init__(
        self,
        separator: Separator,
        sample_rate: int,
        n_channels: int,
        live: bool = False,
        per_channel: bool = False,
        saved: Callable[[int], np.ndarray] | None = None,
        on_mask: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        low, high = RANGES["sample_rate"]
        if not low <= sample_rate <= high:
            raise InputError(f"sample rate {sample_rate} Hz is not between {low} and {high} Hz")
        if not 1 <= n_channels <= MAX_CHANNELS:
            raise InputError(f"{n_channels} channels: (n_channels, n_samples)?")
        self.separator, hp, device = separator, separator.hp, separator.device
        self.per_channel, self.saved, self.on_mask = per_channel, saved, on_mask
        self.grid = grid = audio.grid_at(sample_rate, hp)
        self.n_pushed = self.n_returned = self.n_units = 0
        self.is_finished = False
        # Samples that wait for their unit: it begins half a window before its first frame's centre.
        self.waiting = [torch.zeros(n_channels, grid.n_fft // 2)]
        self.n_waiting = grid.n_fft // 2
        self.n_frames = 1 if live else separator.block_frames  # of one unit
        self.step = self.n_frames * grid.hop_length  # samples from one unit to the next
        self.unit_samples = self.step - grid.hop_length + grid.n_fft
        # What the first unit remembers is silence.
        n_masks = n_channels if per_channel else 1
        self.features = torch.zeros(n_masks, hp.n_bins, 2 * hp.context, device=device)
        self.past: networks.Past | None = {} if live else None
        self.spec = torch.zeros(n_channels, hp.context, grid.n_bins, device=device).mT + 0j
        self.carry = torch.zeros(n_channels, grid.n_fft - grid.hop_length, device=device)
        # Finished samples that lie before the song: the mask's delay and half a window.
        self.n_early = hp.context * grid.hop_length + grid.n_fft // 2
        n_before = grid.n_fft // grid.hop_length - 1
        self.inner_envelope = self._envelope(n_before, n_before + self.n_frames)

    @property
    def delay(self) -> int:
        """Samples that the vocals lie behind what was pushed, at most, before `finish`."""
        return self.separator.hp.context * self.grid.hop_length + self.unit_samples

    def push(self, wav: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Take samples; return the vocals that they finish, on the CPU.

        Parameters
        ----------
        wav : np.ndarray or torch.Tensor, shape=(n_channels, n)

        Returns
        -------
        torch.Tensor, shape=(n_channels, m)
            The vocals that follow those returned so far; `m` may be 0.
        """
        assert not self.is_finished, "the song has been finished; start another stream"
        assert wav.ndim == 2, "push (n_channels, n), also where n_channels is 1"
        assert len(wav) == len(self.carry), f"{len(wav)} channels in a song of {len(self.carry)}"
        wav = _copy(wav)  # the caller may fill the same array again
        self.n_pushed += wav.shape[-1]
        self.waiting.append(wav)
        self.n_waiting += wav.shape[-1]
        if self.n_waiting < self.unit_samples:
            return wav.new_zeros(len(wav), 0)
        n_units = 1 + (self.n_waiting - self.unit_samples) // self.step
        return self._run(n_units, n_frames=None)

    def finish(self) -> torch.Tensor:
        """Return the vocals that are left; all together are as long as what was pushed."""
        assert not self.is_finished, "the song has been finished already"
        self.is_finished = True
        n_left = self.n_pushed - self.n_returned
        n_units = -(-(self.n_early + n_left) // self.step)
        silence = torch.zeros(len(self.carry), n_units * self.step + self.grid.n_fft)
        self.waiting.append(silence)
        return self._run(n_units, n_frames=self.grid.n_frames(self.n_pushed))[:, :n_left]

    def _run(self, n_units: int, n_frames: int | None) -> torch.Tensor:
        """Work off `n_units` units; `n_frames` is the song's, None while it goes on."""
        samples = torch.cat(self.waiting, -1)
        starts = range(0, n_units * self.step, self.step)
        units = [self._unit(samples[:, i : i + self.unit_samples], n_frames) for i in starts]
        self.waiting = [samples[:, n_units * self.step :].clone()]
        self.n_waiting = self.waiting[0].shape[-1]
        finished = torch.cat(units, -1) if units else samples[:, :0]
        n_dropped = min(self.n_early, finished.shape[-1])
        self.n_early -= n_dropped
        self.n_returned += finished.shape[-1] - n_dropped
        return finished[:, n_dropped:]

    @torch.inference_mode()
    def _unit(self, samples: torch.Tensor, n_frames: int | None) -> torch.Tensor:
        """Map (n_channels, unit_samples) to (n_channels, step) samples of finished vocals."""
        separator, hp, grid = self.separator, self.separator.hp, self.grid
        block, first = self.n_frames, self.n_units * self.n_frames
        n_frames = first + block if n_frames is None else n_frames
        spec = audio.frames_to_spec(samples.to(separator.device), grid)
        spec[..., max(0, n_frames - first) :] = 0  # after the song there is silence, as before it

        begin = min(block, max(0, hp.context - first))  # columns begin … end - 1 are the song's
        end = max(begin, min(block, n_frames + hp.context - first))
        mask = self._listen(spec) if self.saved is None else self._recall(begin, end)
        if self.on_mask is not None:
            self.on_mask(audio.mask_levels(mask[..., begin:end]).cpu().numpy())

        spec = torch.cat([self.spec.mT, spec.mT], -2).mT  # (n_channels, n_bins, context + block)
        applied = audio.vocals_mask(mask, **separator.mask_settings)
        wav = audio.spec_to_frames(audio.apply_mask(spec[..., :block], applied), grid)
        wav[:, : self.carry.shape[-1]] += self.carry

        self.spec, self.carry = spec[..., block:], wav[:, self.step :]
        self.n_units += 1
        return (wav[:, : self.step] / self._envelope(first - hp.context, n_frames)).cpu()

    def _listen(self, spec: torch.Tensor) -> torch.Tensor:
        """Ask the network about a unit's frames; returns (n_masks, n_bins, n_frames)."""
        separator, hp = self.separator, self.separator.hp
        seen = audio.to_network_bins(spec, hp)
        seen = seen if self.per_channel else audio.mono(seen)[None]
        seen = audio.features(seen, separator.curve_db, hp.mixture_power, hp)
        seen = torch.cat([self.features, seen], -1)  # (n_masks, hp.n_bins, 2 context + n_frames)
        # A network that remembers was told of these 24 frames with the first unit.
        self.features = seen[..., self.n_frames if self.past is None else seen.shape[-1] :]
        return separator.mask(seen, self.past)

    def _recall(self, begin: int, end: int) -> torch.Tensor:
        """Take a unit's mask from the saved one; returns (n_masks, n_bins, n_frames)."""
        levels = torch.from_numpy(self.saved(end - begin)).to(self.separator.device)
        mask = torch.zeros(*levels.shape[:-1], self.n_frames, device=levels.device)
        mask[..., begin:end] = levels.float().div(255)
        return mask.mT.contiguous().mT  # time varies slowest, as in what the network gives

    def _envelope(self, first: int, n_frames: int) -> torch.Tensor:
        """Sum the squared windows over the hops that frames `first` … finish."""
        n_before = self.grid.n_fft // self.grid.hop_length - 1  # earlier frames reach in
        if self.n_units and n_before <= first and first + self.n_frames <= n_frames:
            return self.inner_envelope
        frames = torch.arange(first - n_before, first + self.n_frames, device=self.carry.device)
        present = ((frames >= 0) & (frames < n_frames)).float()
        start = n_before * self.grid.hop_length
        # Inside a song at least 0.25; the clamp only keeps what is dropped from dividing by zero.
        return audio.envelope(present, self.grid)[start : start + self.step].clamp(min=0.1)


class Part(NamedTuple):
    """A stretch of a separated song, in codes of (n_channels, n) that add up."""

    mixture: np.ndarray
    vocals: np.ndarray
    accompaniment: np.ndarray
    n_limited: int  # samples of the vocals that were limited, so that the accompaniment fits


def split(
    stream: Stream, blocks: Iterable[np.ndarray], sample_format: soundio.SampleFormat
) -> Iterator[Part]:
    """Separate the codes of a sound file into vocals and accompaniment that add up to them.

    Parameters
    ----------
    stream : Stream
    blocks : iterable of np.ndarray, shape=(n_channels, n)
        Codes of `sample_format`, block by block.
    sample_format : soundio.SampleFormat

    Yields
    ------
    Part
        What each block finishes; parts may be empty. In integer formats vocals + accompaniment
        is the mixture, sample by sample.
    """
    waiting: np.ndarray | None = None

    def part(vocals: torch.Tensor) -> Part:
        nonlocal waiting
        mixture, waiting = waiting[:, : vocals.shape[-1]], waiting[:, vocals.shape[-1] :]
        codes = soundio.to_codes(vocals.numpy(), sample_format)
        codes, n_limited = soundio.limit_to_remainder(codes, mixture, sample_format)
        return Part(mixture, codes, mixture - codes, n_limited)

    for codes in blocks:
        is_first = waiting is None or not waiting.size
        waiting = codes if is_first else np.concatenate([waiting, codes], axis=1)
        yield part(stream.push(soundio.to_float(codes, sample_format)))
    if waiting is not None:
        yield part(stream.finish())


def _copy(wav: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Copy an array of any layout, or a tensor from any device, to float32 on the CPU."""
    if torch.is_tensor(wav):
        return wav.detach().to("cpu", torch.float32, copy=True)
    return torch.from_numpy(np.array(wav, dtype=np.float32))
