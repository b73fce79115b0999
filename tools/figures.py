"""Draw how the network hears a song: the pictures of the README, from a network's real output.

masks.png shows mixture, mask and vocals, and inference.png how they come about. Where the true
vocals are known, why.png shows what makes masking possible, and approach.png what is learnt.
Spectrograms show the bins of the network, usually 0 to 11 kHz, from bottom to top; bright is loud,
or voice.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cli
from hparams import InputError, parse_settings

if TYPE_CHECKING:
    import argparse

    import numpy as np
    import torch
    from PIL import Image

    from separation import Separator

EPILOG = """examples:
  python -m tools.figures runs/demo/best.pth song.wav pictures
  python -m tools.figures runs/demo/best.pth mixture.wav pictures --vocals vocals.wav --seconds 4"""
WIDTH = 960  # of every picture [px]
PANEL = 200  # height of a panel of masks.png [px]
MARGIN = 22  # above a panel, for its name [px]
CLEAR_DB = 10.0  # a bin belongs clearly to what is this much louder
VOICE, BAND = (255, 170, 60), (70, 130, 255)  # orange and blue: told apart by all eyes
Box = tuple[int, int, int, int]  # left, top, width, height [px]


@dataclass(frozen=True)
class Excerpt:
    """What is drawn: an excerpt of a song, heard by a network.

    Attributes
    ----------
    waves : dict of np.ndarray, shape=(n_samples,)
        "mixture" and what the network made of it, "vocals" and "accompaniment"; with the true
        vocals also "true vocals" and "true accompaniment".
    seen : dict of torch.Tensor, shape=(n_bins, n_frames), in [0, 1]
        Their spectrograms as the network sees them, and the "mask"; with the true vocals also
        the "target".
    stft_frames : int
    model_type : str
    range_db : float
        Between a level that is seen as 0 and one that is seen as 1.
    """

    waves: dict[str, np.ndarray]
    seen: dict[str, torch.Tensor]
    stft_frames: int
    model_type: str
    range_db: float

    def loudest(self, name: str) -> int:
        """Return the frame that is loudest in a spectrogram, its slice being inside."""
        half = self.stft_frames // 2
        level = self.seen[name].mean(0)
        if len(level) <= 2 * half:
            return len(level) // 2
        return half + int(level[half : len(level) - half].argmax())


@cli.script
def main(argv: list[str] | None = None) -> int:
    """Draw one excerpt of one song."""
    parser = cli.make_parser(__doc__, EPILOG)
    parser.add_argument("checkpoint", type=Path, help="a .pth file that train.py wrote")
    parser.add_argument("audio", type=Path, help="a song")
    parser.add_argument("folder", type=Path, help="where the pictures are written")
    parser.add_argument("--vocals", type=Path, help="its true vocals, for two more pictures")
    parser.add_argument("--start", type=float, default=0.0, help="seconds into the song (0)")
    parser.add_argument("--seconds", type=float, default=8.0, help="length shown (%(default)s)")
    args = parser.parse_args(argv)
    settings = cli.settings_of(args)
    if not (0 <= args.start < math.inf and 0 < args.seconds < math.inf):
        parser.error("--start must be 0 or more and --seconds more than 0")
    cli.refuse_missing(args.checkpoint)

    from sound import reading, writing

    pictures = {"masks.png": _masks, "inference.png": _inference}
    if args.vocals:
        pictures |= {"why.png": _why, "approach.png": _approach}
    for path in filter(None, (args.audio, args.vocals)):
        reading.probe(path)
    for name in pictures:
        writing.check_writable(args.folder / name)
    wav, sample_rate = _read(args.audio, args.start, args.seconds)
    truth = _true_vocals(args, wav, sample_rate) if args.vocals else None

    from separation import Separator

    explicit = parse_settings(args.settings)
    separator = Separator.load(args.checkpoint, settings=settings, explicit=explicit)
    excerpt = _hear(separator, wav, sample_rate, truth)
    for name, draw in pictures.items():
        image = draw(excerpt)
        path = args.folder / name
        writing.replace_atomically(path, lambda file, i=image: i.save(file, format="png"))
        print(cli.printable(path))
    return 0


def _read(path: Path, start: float, seconds: float) -> tuple[np.ndarray, int]:
    """Read an excerpt as mono, (n_samples,), and its rate; InputError if there is none."""
    import numpy as np

    from sound import reading

    with reading.Reader(path, start=start, duration=seconds) as reader:
        rate = reader.info.sample_rate
        return np.concatenate([block.mean(0) for block in reader.float_blocks(rate)]), rate


def _true_vocals(args: argparse.Namespace, wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Read the vocals of the same excerpt; InputError if they are not this song's."""
    vocals, rate = _read(args.vocals, args.start, args.seconds)
    if rate != sample_rate or len(vocals) != len(wav):
        raise InputError(
            f"{args.vocals}: {len(vocals)} samples at {rate} Hz, of the song {len(wav)} "
            f"at {sample_rate} Hz (name the vocals of this very song)"
        )
    return vocals


def _hear(
    separator: Separator, wav: np.ndarray, sample_rate: int, truth: np.ndarray | None
) -> Excerpt:
    """Separate an excerpt and look at everything as the network does."""
    import torch

    import audio
    from learning import sampling

    hp, curve_db = separator.hp, separator.curve_db
    vocals, _ = separator.separate(wav, sample_rate)
    waves = {"mixture": wav, "vocals": vocals, "accompaniment": wav - vocals}
    if truth is not None:
        waves |= {"true vocals": truth, "true accompaniment": wav - truth}
    grid = audio.grid_at(sample_rate, hp)
    specs = {
        name: audio.to_network_bins(audio.stft(torch.from_numpy(wave), grid), hp)
        for name, wave in waves.items()
    }
    seen = {
        name: audio.features(spec, curve_db, hp.mixture_power, hp) for name, spec in specs.items()
    }
    seen["mask"] = separator.song_mask(wav, sample_rate)[0]
    if truth is not None:
        parts = specs["true vocals"], specs["true accompaniment"]
        seen["target"] = sampling.mask_target(*parts, curve_db, hp)
    range_db = -hp.min_level_db * 2 / hp.mixture_power
    return Excerpt(waves, seen, hp.stft_frames, hp.model_type, range_db)


class _Canvas:
    """A white picture to put spectrograms, waveforms, words and arrows on."""

    def __init__(self, height: int) -> None:
        from PIL import Image, ImageDraw, ImageFont  # pillow comes with tensorboard

        self.image = Image.new("RGB", (WIDTH, height), "white")
        self._pen = ImageDraw.Draw(self.image)
        self._font = ImageFont.load_default(13)

    def text(self, x: int, y: int, words: str, anchor: str = "la") -> None:
        """Write words; `anchor` is pillow's, "la" being the top left, "mm" the middle."""
        self._pen.multiline_text((x, y), words, "black", self._font, anchor, 3)

    def spectrogram(self, seen: torch.Tensor, box: Box) -> None:
        """Show a picture in [0, 1], the lowest bin at the bottom."""
        from tools import charts

        self.colours(charts.colours(seen.flip(0).numpy()), box)

    def colours(self, rgb: np.ndarray, box: Box) -> None:
        """Show a picture of colours, (rows, columns, 3)."""
        from PIL import Image

        left, top, width, height = box
        picture = Image.fromarray(rgb)
        shrinks = picture.width > width
        how = Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST
        picture = picture.resize((width, picture.height), how)  # first along time, then frequency
        self.image.paste(picture.resize((width, height), Image.Resampling.BOX), (left, top))

    def wave(self, wave: np.ndarray, box: Box, peak: float) -> None:
        """Show a waveform, from its least to its greatest sample in every column of pixels."""
        import numpy as np

        left, top, width, height = box
        edges = np.linspace(0, len(wave), width + 1).astype(int)
        parts = [wave[a : max(b, a + 1)] for a, b in itertools.pairwise(edges)]
        middle, scale = top + height / 2, height / 2 / max(peak, 1e-9)
        self._pen.line((left, middle, left + width, middle), "#bbb")
        for x, part in enumerate(parts, left):
            if part.size:
                high, low = middle - part.max() * scale, middle - part.min() * scale
                self._pen.line((x, high, x, low), "#1b4f9c")

    def frame(self, box: Box, colour: str = "white", width: int = 2) -> None:
        """Draw around a box."""
        left, top, across, down = box
        self._pen.rectangle((left, top, left + across, top + down), None, colour, width)

    def arrow(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        """Draw an arrow."""
        turn = math.atan2(end[1] - start[1], end[0] - start[0])
        back = (end[0] - 9 * math.cos(turn), end[1] - 9 * math.sin(turn))
        self._pen.line((*start, *back), "black", 2)
        sides = [(back[0] - s * math.sin(turn), back[1] + s * math.cos(turn)) for s in (5, -5)]
        self._pen.polygon([end, *sides], "black")


def _masks(excerpt: Excerpt) -> Image.Image:
    """Show mixture, mask and vocals, one above the other."""
    names = {"mixture": "mixture", "mask": "mask: is this the voice?", "vocals": "vocals"}
    canvas = _Canvas(len(names) * (PANEL + MARGIN))
    for i, (key, name) in enumerate(names.items()):
        top = i * (PANEL + MARGIN)
        canvas.text(2, top + 3, name)
        canvas.spectrogram(excerpt.seen[key], (0, top + MARGIN, WIDTH, PANEL))
    return canvas.image


def _why(excerpt: Excerpt) -> Image.Image:
    """Show that voice and band overlap in every sample, and little in the spectrogram."""
    import numpy as np

    names = {
        "true vocals": "the voice",
        "true accompaniment": "the band",
        "mixture": "both: as samples, nothing tells them apart",
    }
    across, down, right = 470, 130, WIDTH - 470
    canvas = _Canvas((len(names) + 1) * (down + MARGIN) + 4)
    peak = max(float(np.abs(excerpt.waves[key]).max()) for key in names)
    for i, (key, name) in enumerate(names.items()):
        top = i * (down + MARGIN)
        canvas.text(2, top + 3, name)
        canvas.wave(excerpt.waves[key], (0, top + MARGIN, across, down), peak)
        canvas.spectrogram(excerpt.seen[key], (right, top + MARGIN, across, down))
    voice_db, band_db = (excerpt.range_db * excerpt.seen[key].numpy() for key in list(names)[:2])
    share = np.clip((voice_db - band_db) / (2 * CLEAR_DB) + 0.5, 0, 1)[..., None]
    hue = share * np.array(VOICE) + (1 - share) * np.array(BAND)
    rgb = (excerpt.seen["mixture"].numpy()[..., None] * hue).astype(np.uint8)
    top = len(names) * (down + MARGIN) + MARGIN
    canvas.colours(rgb[::-1], (right, top, across, down))
    canvas.text(
        2,
        top,
        "But at one time and frequency often only one is heard.\n"
        "Orange: the voice is louder; blue: the band.\n"
        f"{percent_clear(excerpt):.0f} % of the energy, weighted like the ear, is in bins\n"
        f"where one is {CLEAR_DB:g} dB or more above the other: there,\n"
        "to keep or to drop the bin is nearly all one has to know.",
    )
    return canvas.image


def percent_clear(excerpt: Excerpt) -> float:
    """Return how much of the mixture's energy, weighted like the ear, is clearly voice or band."""
    names = ("mixture", "true vocals", "true accompaniment")
    level_db, voice_db, band_db = (excerpt.range_db * excerpt.seen[key].double() for key in names)
    energy, is_clear = 10 ** (level_db / 10), (voice_db - band_db).abs() >= CLEAR_DB
    return float(100 * energy[is_clear].sum() / energy.sum())


def _approach(excerpt: Excerpt) -> Image.Image:
    """Show what is learnt from: a slice of the mixture, and the true mask at its centre."""
    centre, half, across, down = excerpt.loudest("true vocals"), excerpt.stft_frames // 2, 330, 170
    n_frames = excerpt.seen["mixture"].shape[1]
    first = max(0, min(centre - 4 * half, n_frames - 8 * half - 1))
    shown = slice(first, first + 8 * half + 1)
    n_shown = excerpt.seen["mixture"][:, shown].shape[1]
    canvas = _Canvas(2 * (down + MARGIN) + 60)
    low = MARGIN + down + 60
    canvas.text(0, 3, "the mixture, as the network sees it")
    canvas.spectrogram(excerpt.seen["mixture"][:, shown], (0, MARGIN, across, down))
    canvas.text(0, low - 19, "what it should answer (known in training)")
    canvas.spectrogram(excerpt.seen["target"][:, shown], (0, low, across, down))
    pixels = across / n_shown
    left = max(0, round((centre - half - first) * pixels))
    width = min(across - left, round(excerpt.stft_frames * pixels))
    canvas.frame((left, MARGIN, width, down))
    canvas.frame((round((centre - first) * pixels), low, max(3, round(pixels)), down))

    around = slice(max(0, centre - half), centre + half + 1)
    canvas.arrow((across + 8, MARGIN + down // 2), (across + 58, MARGIN + down // 2))
    canvas.text(across + 66, 3, f"a slice, {excerpt.stft_frames} wide")
    canvas.spectrogram(excerpt.seen["mixture"][:, around], (across + 66, MARGIN, 125, down))
    canvas.arrow((across + 199, MARGIN + down // 2), (across + 249, MARGIN + down // 2))
    box = (across + 257, MARGIN + 40, 110, down - 80)
    canvas.frame(box, "black")
    canvas.text(box[0] + 55, MARGIN + down // 2, excerpt.model_type, "mm")
    canvas.arrow((across + 375, MARGIN + down // 2), (across + 425, MARGIN + down // 2))
    column = slice(centre, centre + 1)
    canvas.text(across + 433, 3, "its answer for the centre frame")
    answer, truth = excerpt.seen["mask"][:, column], excerpt.seen["target"][:, column]
    canvas.spectrogram(answer, (across + 433, MARGIN, 60, down))
    canvas.arrow((across + 8, low + down // 2), (across + 425, low + down // 2))
    canvas.text(across + 433, low - 19, "the truth")
    canvas.spectrogram(truth, (across + 433, low, 60, down))
    canvas.text(
        across + 503,
        MARGIN + down - 6,
        "What differs, where\nit is loud, is what\nthe weights are\nmoved by.",
    )
    return canvas.image


def _inference(excerpt: Excerpt) -> Image.Image:
    """Show how a song is separated: slices to a mask, the mask times the STFT, and back."""
    import numpy as np

    across, down, wave = 280, 180, 80
    lefts, low = [0, 340, 680], MARGIN + 180 + 70
    canvas = _Canvas(low + wave + 4)
    names = {
        "mixture": f"STFT: {excerpt.stft_frames} frames at a time ...",
        "mask": "... give one column of the mask",
        "vocals": "mask times complex STFT",
    }
    for left, (key, name) in zip(lefts, names.items(), strict=True):
        canvas.text(left, 3, name)
        canvas.spectrogram(excerpt.seen[key], (left, MARGIN, across, down))
    pixels = across / excerpt.seen["mixture"].shape[1]
    width = min(across // 5, max(3, round(excerpt.stft_frames * pixels)))
    for share in (0.2, 0.5, 0.8):
        centre = round(across * share)
        canvas.frame((lefts[0] + centre - width // 2, MARGIN, width, down))
        canvas.frame((lefts[1] + centre, MARGIN, 2, down))
    for left in lefts[1:]:
        canvas.arrow((left - 54, MARGIN + down // 2), (left - 6, MARGIN + down // 2))
    peak = float(np.abs(excerpt.waves["mixture"]).max())
    waves = {"mixture": "the song", "accompaniment": "song minus vocals", "vocals": "the vocals"}
    for left, (key, name) in zip(lefts, waves.items(), strict=True):
        canvas.text(left, low - 19, name)
        canvas.wave(excerpt.waves[key], (left, low, across, wave), peak)
    middle = across // 2
    canvas.arrow((lefts[0] + middle, low - 8), (lefts[0] + middle, MARGIN + down + 8))
    canvas.arrow((lefts[2] + middle, MARGIN + down + 8), (lefts[2] + middle, low - 8))
    canvas.text(lefts[2] + middle + 12, MARGIN + down + 18, "inverse STFT")
    canvas.arrow((lefts[1] - 54, low + wave // 2), (lefts[1] - 6, low + wave // 2))
    canvas.arrow((lefts[2] - 6, low + wave // 2), (lefts[2] - 54, low + wave // 2))
    return canvas.image


if __name__ == "__main__":
    sys.exit(main())
