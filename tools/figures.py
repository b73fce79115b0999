"""Draw pictures with matplotlib: those of the README, of any song, and evaluate.py's ``--plot``.

masks.png shows mixture, mask and vocals. Where the true vocals are known, why.png shows what makes
masking possible, and approach.png what a network is asked. Bright is loud, or voice.

    python -m tools.figures runs/demo/best.pth song.wav pictures
    python -m tools.figures runs/demo/best.pth mixture.wav pictures --vocals vocals.wav --seconds 4
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli
from hparams import InputError, parse_settings

if TYPE_CHECKING:
    import numpy as np
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hparams import HParams
    from scoring.tables import Record
    from separation import Separator

WIDTH = 9.6  # of every picture [inches of 100 pixels]
CLEAR_DB = 10.0  # a bin belongs clearly to what is this much louder
Images = dict[str, "torch.Tensor"]  # by name: spectrograms and masks (n_bins, n_frames) in [0, 1]


@cli.script
def main(argv: list[str] | None = None) -> int:
    """Draw one excerpt of one song."""
    parser = cli.make_parser(__doc__, "examples:\n" + __doc__.split("\n\n")[-1])
    add = parser.add_argument
    add("checkpoint", type=Path, help="a .pth file that train.py wrote")
    add("audio", type=Path, help="a song")
    add("folder", type=Path, help="where the pictures are written")
    add("--vocals", type=Path, help="its true vocals, for two more pictures")
    add("--start", type=float, default=0.0, help="seconds into the song (0)")
    add("--seconds", type=cli.positive_number, default=8.0, help="length shown (%(default)s)")
    args = parser.parse_args(argv)
    settings = cli.settings_of(args)
    cli.refuse_missing(args.checkpoint)
    wav, sample_rate = read_mono(args.audio, args.start, args.seconds)
    waves = {"mixture": wav}
    if args.vocals:
        truth, rate = read_mono(args.vocals, args.start, args.seconds)
        if (rate, len(truth)) != (sample_rate, len(wav)):
            raise InputError(f"{args.vocals}: differs in rate or length (name this song's vocals)")
        waves |= {"true vocals": truth, "true accompaniment": wav - truth}

    from separation import Separator

    explicit = parse_settings(args.settings)
    separator = Separator.load(args.checkpoint, settings=settings, explicit=explicit)
    images = look(separator, waves, sample_rate)
    pictures = {"masks.png": draw_masks(images, len(wav) / sample_rate)}
    if args.vocals:
        range_db = -2 * separator.hp.min_level_db / separator.hp.mixture_power
        pictures["why.png"] = draw_why(waves, images, range_db)
        pictures["approach.png"] = draw_approach(images, separator.hp)
    for name, picture in pictures.items():
        save_picture(picture, args.folder / name)
        print(cli.printable(args.folder / name))
    return 0


def read_mono(path: Path, start: float, seconds: float) -> tuple[np.ndarray, int]:
    """Read an excerpt as mono, (n_samples,), and its rate; InputError if there is none."""
    from sound.reading import Reader

    with Reader(path, start=start, duration=seconds) as reader:
        return reader.read().mean(0), reader.info.sample_rate


def look(separator: Separator, waves: dict[str, np.ndarray], sample_rate: int) -> Images:
    """Return waveforms as the network sees them, its vocals, its mask and, if known, the target."""
    import torch

    import audio
    from learning import targets

    hp, curve_db = separator.hp, separator.curve_db
    grid, specs, images = audio.grid_at(sample_rate, hp), {}, {}
    vocals, _ = separator.separate(waves["mixture"], sample_rate)
    for name, wave in {**waves, "vocals": vocals}.items():
        specs[name] = audio.to_network_bins(audio.stft(torch.from_numpy(wave), grid), hp)
        images[name] = audio.features(specs[name], curve_db, hp.mixture_power, hp)
    padded = torch.nn.functional.pad(images["mixture"], (hp.lookback, hp.lookahead))
    images["mask"] = separator.mask(padded)
    if "true vocals" in specs:
        parts = specs["true vocals"], specs["true accompaniment"]
        images["target"] = targets.mask_target(*parts, curve_db, hp)
    return images


def draw_masks(images: Images, seconds: float) -> Figure:
    """Show mixture, mask and vocals, one above the other."""
    picture, extent = new_figure(6.4), (0, seconds, 0, 1)
    top, middle, bottom = picture.subplots(3, sharex=True)
    draw_image(top, images["mixture"], "mixture", extent)
    draw_image(middle, images["mask"], "mask: is this the voice?", extent)
    draw_image(bottom, images["vocals"], "vocals", extent)
    bottom.set_xlabel("seconds")
    return picture


def draw_why(waves: dict[str, np.ndarray], images: Images, range_db: float) -> Figure:
    """Show that voice and band overlap in every sample, and little in the spectrogram."""
    import numpy as np

    titles = ("the voice", "the band", "both: as samples, nothing tells them apart")
    names = ("true vocals", "true accompaniment", "mixture")
    picture, peak = new_figure(6.4), abs(waves["mixture"]).max() or 1
    panels = picture.subplots(4, 2)
    for (left, right), name, title in zip(panels, names, titles, strict=False):
        left.plot(waves[name], linewidth=0.3)
        left.set(xlim=(0, len(waves[name])), ylim=(-peak, peak), xticks=[], yticks=[])
        left.set_title(title, loc="left", fontsize=9)
        draw_image(right, images[name])
    voice, band = images["true vocals"].numpy(), images["true accompaniment"].numpy()
    orange = np.clip(range_db * (voice - band) / (2 * CLEAR_DB) + 0.5, 0, 1)[..., None]
    hues = orange * np.array([1.0, 0.67, 0.24]) + (1 - orange) * np.array([0.27, 0.51, 1.0])
    draw_image(panels[3][1], images["mixture"].numpy()[..., None] * hues)
    panels[3][0].axis("off")
    percent = percent_clear(images, range_db)
    words = (
        "But at one time and frequency often only one is heard.\n"
        "Orange: the voice is louder; blue: the band.\n"
        f"{percent:.0f} % of the energy, weighted like the ear, is in bins\n"
        f"where one is {CLEAR_DB:g} dB or more above the other."
    )
    panels[3][0].text(0, 0.5, words, fontsize=9, verticalalignment="center")
    return picture


def percent_clear(images: Images, range_db: float) -> float:
    """Return how much of the mixture's energy, weighted like the ear, is clearly voice or band."""
    is_clear = range_db * (images["true vocals"] - images["true accompaniment"]).abs() >= CLEAR_DB
    energy = 10 ** (range_db * images["mixture"].double() / 10)
    return float(100 * energy[is_clear].sum() / energy.sum())


def draw_approach(images: Images, hp: HParams) -> Figure:
    """Show a slice of the mixture, the network's answer for its column, and the true answer."""
    column = int(images["true vocals"].mean(0).argmax())
    first = max(0, column - 2 * hp.stft_frames)
    around, at = slice(first, first + 4 * hp.stft_frames), slice(column, column + 1)
    seen = slice(max(0, column - hp.lookback), column + hp.lookahead + 1)
    picture = new_figure(4.0)
    top, bottom = picture.subplots(2, 3, width_ratios=[5, 2, 0.4])
    for axes, name, title, marked in (
        (top[0], "mixture", "the mixture, as the network sees it", seen),
        (bottom[0], "target", "what it should answer (known in training)", at),
    ):
        shown = images[name][:, around]
        draw_image(axes, shown, title, (first, first + shown.shape[1], 0, 1))
        axes.axvspan(marked.start, marked.stop, fill=False, edgecolor="white", linewidth=1.5)
    draw_image(top[1], images["mixture"][:, seen], f"a slice, {hp.stft_frames} frames →")
    draw_image(top[2], images["mask"][:, at], "answer")
    draw_image(bottom[2], images["target"][:, at], "truth")
    bottom[1].axis("off")
    return picture


def plot_scores(path: Path, songs: list[Record]) -> None:
    """Draw SDR and SI-SDR of both stems: a column for every system, a point for every song."""
    import numpy as np

    from scoring.tables import METRICS, STEMS, ordered, song_score

    picture = new_figure(5.6)
    systems = ordered(songs[0]["scores"]) if songs else []
    metrics = [metric for metric in METRICS if metric.name in ("sdr", "si_sdr")]
    for row, stem in zip(picture.subplots(2, 2), STEMS, strict=True):
        for axes, metric in zip(row, metrics, strict=True):
            for i, system in enumerate(systems):
                scores = [song_score(song["scores"][system][stem], metric.name) for song in songs]
                values = np.sort([score for score in scores if np.isfinite(score)])
                offsets = np.resize([0, 0.1, -0.1, 0.2, -0.2], len(values))  # side by side
                axes.plot(i + offsets, values, "o", markersize=4, alpha=0.6)
                if len(values):
                    axes.plot([i - 0.3, i + 0.3], [np.median(values)] * 2, "k", linewidth=2)
            axes.set_xticks(range(len(systems)), [name.replace("_", "\n") for name in systems])
            axes.set_title(f"{metric.label} of the {stem} [dB]", loc="left", fontsize=9)
            axes.grid(axis="y", alpha=0.3)
    save_picture(picture, path)


def new_figure(height: float) -> Figure:
    """Make an empty picture, `height` inches high; InputError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("pictures need matplotlib (pip install matplotlib)") from error
    return Figure((WIDTH, height), dpi=100, layout="constrained")


def draw_image(axes: Axes, image: Any, title: str = "", extent: Any = None) -> None:
    """Show a spectrogram in [0, 1] or a picture of colours, the lowest bin at the bottom."""
    import numpy as np

    options = {"origin": "lower", "aspect": "auto", "cmap": "magma", "vmin": 0, "vmax": 1}
    axes.imshow(np.asarray(image), extent=extent, **options)
    axes.set_yticks([])
    axes.xaxis.set_visible(extent is not None and extent[0] == 0)
    axes.set_title(title, loc="left", fontsize=9)


def save_picture(picture: Figure, path: Path) -> None:
    """Write a picture whole or not at all."""
    cli.replace_atomically(path, lambda file: picture.savefig(file, format=path.suffix[1:]))


if __name__ == "__main__":
    sys.exit(main())
