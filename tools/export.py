"""Write a checkpoint's network as an ONNX file that runs where there is no torch, as in a browser.

It goes on from call to call: the layers' last frames are further inputs and outputs. Weights are
stored in half precision, as published, and computed with in float32.

    python -m tools.export pretrained/resnet18.pth web/model.onnx
    python -m tools.export runs/resnet18/best.pth mine.onnx
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import cli
from hparams import UNTUNED_MASK, HParams, InputError, UsageError

if TYPE_CHECKING:
    import onnx
    import torch

SMALL = 1024  # numbers; shorter arrays stay in float32


@cli.script
def main(argv: list[str] | None = None) -> int:
    """Export one checkpoint."""
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a .pth file that train.py wrote")
    add("output", type=Path, help="the .onnx to write")
    args = parser.parse_args(argv)
    if args.settings:
        raise UsageError("--set: a network is exported as it is (evaluate.py tune changes it)")
    if args.output.suffix != ".onnx":
        raise UsageError(f"{args.output}: an exported network's name ends in .onnx")
    cli.refuse_missing(args.checkpoint)

    import model  # here: wrong arguments are told before torch is loaded

    checkpoint = model.load_checkpoint(args.checkpoint)
    network, hp = model.restore_model(args.checkpoint, checkpoint)
    if "curve_db" not in checkpoint:
        raise InputError(f"{args.checkpoint}: holds no curve_db (use one that train.py wrote)")
    turn(network.eval().requires_grad_(False))
    facts = {
        "hparams": asdict(hp) | {"lookahead": hp.lookahead, "n_bins": hp.n_bins},
        "curve_db": [round(db, 4) for db in checkpoint["curve_db"].tolist()],
        "mask_settings": {**UNTUNED_MASK, **checkpoint.get("mask_settings", {})},
        "licence": checkpoint.get("licence", ""),
    }
    exported = to_onnx(network, hp)
    for name, value in facts.items():
        exported.metadata_props.add(key=name, value=json.dumps(value))
    data = exported.SerializeToString()
    cli.replace_atomically(args.output, lambda file: file.write(data))
    print(f"{cli.printable(args.output)}: {len(data) / 1e6:.1f} MB")
    return 0


def to_onnx(network: torch.nn.Module, hp: HParams) -> onnx.ModelProto:
    """Trace a network that was `turn`ed: n_columns is any multiple of ``mask_frames``.

    ``features``, n_columns new frames, (n, 1, n_bins, n_columns), become ``mask``, (n, n_bins,
    n_columns). In ``past_0``, ``past_1`` … it gets what each layer remembers, (n, n_channels,
    n_frames, n_bins), and returns that, for the next call, in ``next_0``, ``next_1`` …
    """
    import torch

    past, step = {}, hp.mask_frames
    network(torch.zeros(2, 1, hp.n_bins, hp.stft_frames - 1 + step), past)
    # Skips that wait for no later frame remember nothing but that they were called.
    layers = [layer for layer, frames in past.items() if frames.numel()]
    names = [f"past_{i}" for i in range(len(layers))]

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, features: torch.Tensor, pasts: list[torch.Tensor]) -> tuple:
            memory = past | dict(zip(layers, (frames.mT for frames in pasts), strict=True))
            mask = self.network(features, memory).sigmoid()
            return (mask, *(memory[layer].mT for layer in layers))

    n, frames = torch.export.Dim("n"), step * torch.export.Dim("steps", min=1)
    example = torch.zeros(2, 1, hp.n_bins, 8 * step)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # torchvision is not missed
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            Graph().eval(),
            (example, [past[layer].mT.contiguous() for layer in layers]),
            input_names=["features", *names],
            output_names=["mask", *(name.replace("past", "next") for name in names)],
            dynamic_shapes=({0: n, 3: frames}, [{0: n} for _ in names]),
            optimize=False,  # folded batch norms would no longer round to what is published
            verbose=False,
        )
    from onnxscript import optimizer

    optimizer.inline(program.model)
    optimizer.fold_constants(program.model)
    optimizer.remove_unused_nodes(program.model)
    return halve(program.model_proto)


def turn(network: torch.nn.Module) -> None:
    """Let every convolution see (n, channels, frames, bins), in place.

    onnxruntime moves the transposes to where there is nothing to do, and then copies rows of bins
    instead of single numbers: live, the network of width 32 takes half the time.
    """
    import torch

    import model

    for layer in network.modules():
        if isinstance(layer, model.ConvNorm):
            conv = layer.conv
            conv.weight = torch.nn.Parameter(conv.weight.mT.contiguous(), requires_grad=False)
            for name in ("kernel_size", "stride", "padding", "dilation"):
                setattr(conv, name, getattr(conv, name)[::-1])
            conv.register_forward_pre_hook(lambda _, seen: seen[0].mT)
            layer.norm.register_forward_hook(lambda _, seen, answer: answer.mT)


def halve(exported: onnx.ModelProto) -> onnx.ModelProto:
    """Store large weights in half precision; whoever loads them casts them to float32, once."""
    import numpy as np
    import onnx

    graph, casts = exported.graph, []
    for weight in graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype == np.float32 and values.size > SMALL:
            name = weight.name
            weight.CopyFrom(onnx.numpy_helper.from_array(values.astype("f2"), f"{name}_half"))
            casts.append(onnx.helper.make_node("Cast", [weight.name], [name], to=1))
    nodes = [*casts, *graph.node]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    for entry in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        del entry.metadata_props[:]  # a tenth of the file: which line of Python made it
    return exported


if __name__ == "__main__":
    sys.exit(main())
