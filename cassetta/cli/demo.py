"""Train a network to find grey and white matter in a brain, and test it where it has not looked.

Without --image, the brain is the ICBM152 template that nilearn ships: the average of 152 brains.
It is symmetric to the last bit, so left and right are the same data. The network therefore learns
from the front half of the brain and is tested on the back half, with a gap between them that is
wider than a patch. All it knows of the back half is the scale of its brightness: the image is
standardized as a whole.
"""

import argparse
import json
import math
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import cassetta
from cassetta.cli import network
from cassetta.cli.errors import CommandError, need, writable
from cassetta.cli.figure import draw
from cassetta.cli.patches import AXES, Sampler, box
from cassetta.cli.predict import probabilities
from cassetta.cli.training import History, dice, peak_memory, train
from cassetta.cli.volume import Split, Volume, labelled, read, split, template
from cassetta.kernels import machine

PATCH = {3: 24, 2: 32, 1: 32}
BATCH = {3: 4, 2: 64, 1: 512}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    own = parser.add_argument_group("the data")
    own.add_argument("--image", type=Path, help="a 3-D NIfTI image of your own")
    own.add_argument(
        "--labels", type=Path, help="its labels, on the same grid; the lowest is the background"
    )
    own.add_argument("--resolution", type=float, default=2.0, help="voxel size in mm [2]")
    net = parser.add_argument_group("the network")
    net.add_argument("--backbone", default="MeshNet", help="MeshNet, UNet or ATrousNet [MeshNet]")
    net.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE",
        help="option of the backbone, such as nb_features=16 or norm=instance; repeat at will",
    )  # fmt: skip
    net.add_argument("--ndim", type=int, choices=(1, 2, 3), default=3, help="dimensions [3]")
    how = parser.add_argument_group("the training")
    how.add_argument("--steps", type=int, default=300, help="optimizer steps [300]")
    how.add_argument(
        "--patch",
        type=int,
        help="size of a patch in voxels [24; 32 below 3-D; less if the image is small]",
    )
    how.add_argument("--batch", type=int, help="patches per step [4; 64 in 2-D, 512 in 1-D]")
    how.add_argument("--lr", type=float, default=0.02, help="largest learning rate [0.02]")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... [auto]")
    how.add_argument("--seed", type=int, default=0, help="same seed, same result on a CPU [0]")
    how.add_argument("--out", type=Path, default=Path("demo"), help="folder for results [demo]")


def run(arguments: argparse.Namespace) -> int:
    """Train, test, draw; 130 if Ctrl-C ended the training (the weights are saved all the same)."""
    console = Console(soft_wrap=True)
    _check(arguments)
    batch = arguments.batch or BATCH[arguments.ndim]
    device = network.device(arguments.device)
    need("matplotlib.figure")  # rather now than after the training
    volume = _volume(arguments)
    assert volume.labels is not None
    patch = arguments.patch or _patch(volume.labels, arguments.ndim)
    size = box(arguments.ndim, patch)
    part = split(volume.labels, patch + 1, size)
    torch.manual_seed(arguments.seed)
    chosen = network.options(arguments.option, arguments.backbone)
    net = network.build(arguments.ndim, len(volume.names), arguments.backbone, chosen, patch)
    weights = writable(arguments.out) / "weights.pt"
    _introduce(console, volume, part, net, arguments.backbone, chosen, device)

    front = (slice(None), part.learn)
    sampler = Sampler(volume.image[front], volume.labels[front], size, arguments.seed)
    history = train(net, sampler, arguments.steps, batch, arguments.lr, device)
    known = network.Surroundings(arguments.resolution, patch, volume.names, volume.values)
    network.save(net.cpu(), known, weights)
    if history.interrupted:
        console.print(f"stopped after {len(history.losses)} steps; the weights are in {weights}")
        return 130

    guess = probabilities(net, volume, patch, device, "testing ").argmax(0).cpu()
    unseen = (slice(None), part.test)
    scores = {
        name: dice(guess[unseen], volume.labels[unseen], label)
        for label, name in enumerate(volume.names)
        if label
    }
    _report(console, scores, history, device)
    known = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
    title = f"{arguments.backbone}, Dice on the unseen half: {known}"
    picture = arguments.out / "picture.png"
    draw(picture, volume, guess, part, history.losses, title)
    _write_result(arguments, scores, history, device, net)
    console.print(f"picture    {picture}\nweights    {weights}")
    console.print(f"next       cassetta predict IMAGE.nii.gz --weights {weights}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse numbers that make no sense, before anything is loaded."""
    for name in ("steps", "patch", "batch", "lr", "resolution"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise CommandError(f"--{name} {value} must be positive and finite")
    if not 0.1 <= arguments.resolution <= 20:
        raise CommandError(f"--resolution {arguments.resolution} must lie between 0.1 and 20 mm")
    if not 0 <= arguments.seed < 2**63:
        raise CommandError(f"--seed {arguments.seed} must lie between 0 and 2**63")
    if arguments.patch == 1:
        raise CommandError("--patch 1 leaves nothing to convolve: use at least 2")
    if (arguments.image is None) != (arguments.labels is None):
        raise CommandError("--image and --labels go together")


def _volume(arguments: argparse.Namespace) -> Volume:
    if arguments.image is None:
        return template(arguments.resolution)
    return read(arguments.image, arguments.labels, arguments.resolution)


def _patch(labels: torch.Tensor, ndim: int) -> int:
    """The usual size of a patch, or what fits into a smaller volume: a part, a gap, a part."""
    first, last = labelled(labels)
    return max(2, min(PATCH[ndim], (last - first - 1) // 3, *(labels.shape[n] for n in AXES[ndim])))


def _introduce(
    console: Console, volume: Volume, part: Split, net: torch.nn.Module, backbone: str,
    options: dict, device: torch.device,
) -> None:  # fmt: skip
    """Say what the data is and what is trained, before the waiting begins."""
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    parameters = sum(p.numel() for p in net.parameters())
    learned, tested = (s.stop - s.start for s in part)
    console.print(f"data       {volume.about}")
    console.print(
        f"split      learn from the front {learned} slices, test on the back {tested}, "
        f"with {part.learn.start - part.test.stop} between them that neither sees"
    )
    console.print(
        f"network    {backbone}({given}), {parameters:,} parameters, on {device}", markup=False
    )


def _report(
    console: Console, scores: dict[str, float], history: History, device: torch.device
) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("unseen half")
    table.add_column("Dice", justify="right")
    for name, score in scores.items():
        table.add_row(name, f"{score:.3f}")
    console.print(table)
    console.print(f"step       {history.seconds_per_step * 1000:.0f} ms (median)")
    console.print(f"memory     {peak_memory(device)} (peak)")


def _write_result(
    arguments: argparse.Namespace, scores: dict[str, float], history: History,
    device: torch.device, net: torch.nn.Module,
) -> None:  # fmt: skip
    """The figures of the run, with what it takes to make them again."""
    result = {
        "dice": scores,
        "ms_per_step": 1000 * history.seconds_per_step,
        "peak_memory": peak_memory(device),
        "final_loss": history.losses[-1],
        "parameters": sum(p.numel() for p in net.parameters()),
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
        "device": machine.gpu(device).name if device.type == "cuda" else platform.machine(),
        "versions": {"cassetta": cassetta.__version__, "torch": torch.__version__},
    }
    (arguments.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
