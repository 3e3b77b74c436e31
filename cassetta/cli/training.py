"""Training: the loss, the loop, and what was measured on the way."""

import math
import sys
import time
from dataclasses import dataclass, field
from statistics import median

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from torch.nn import functional as F

from cassetta.cli.errors import CommandError
from cassetta.cli.patches import Sampler
from cassetta.models import SegNet


@dataclass
class History:
    """What happened in a training run."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    interrupted: bool = False

    @property
    def seconds_per_step(self) -> float:
        """The median, so that the first steps, which warm up, do not count."""
        return median(self.seconds) if self.seconds else float("nan")


def train(
    net: SegNet, sampler: Sampler, steps: int, batch: int, lr: float, device: torch.device
) -> History:
    """Train a network on random patches; Ctrl-C ends the training, not the program.

    AdamW with a one-cycle schedule [arXiv:1711.05101, arXiv:1708.07120].
    """
    history = History()
    net.to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    # one more than there are, so that the last step counts too; and it rises for one at least
    total = steps + 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=total, pct_start=max(0.2, 1.5 / total)
    )
    columns = (
        TextColumn("learning"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
        TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn(), TextColumn("left"),
    )  # fmt: skip
    with Progress(*columns) as progress:
        task = progress.add_task("", total=steps, loss=float("nan"))
        try:
            for _ in range(steps):
                start = time.perf_counter()
                patches, labels = (tensor.to(device) for tensor in sampler(batch))
                loss = segmentation_loss(net.predict_logits(patches), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                history.losses.append(loss.item())
                if not math.isfinite(history.losses[-1]):
                    raise CommandError(
                        f"the loss became {history.losses[-1]} at step {len(history.losses)}: "
                        f"use a smaller learning rate than --lr {lr}"
                    )
                history.seconds.append(time.perf_counter() - start)
                progress.update(task, advance=1, loss=history.losses[-1])
        except KeyboardInterrupt:
            history.interrupted = True
    return history


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy plus one minus the mean soft Dice coefficient of the classes.

    Parameters
    ----------
    logits : (B, K, *size) tensor
    labels : (B, *size) tensor[long]
    """
    truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    guess = logits.softmax(1)
    space = [0, *range(2, logits.ndim)]
    overlap = (2 * (guess * truth).sum(space) + 1) / ((guess + truth).sum(space) + 1)
    return F.cross_entropy(logits, labels) + 1 - overlap.mean()


def dice(guess: Tensor, truth: Tensor, label: int) -> float:
    """Overlap of a label in two maps: 1 where they agree, 0 where they share nothing."""
    one, other = guess == label, truth == label
    size = int(one.sum() + other.sum())
    return 2 * int((one & other).sum()) / size if size else 1.0


def peak_memory(device: torch.device) -> str:
    """The most memory that was in use, in words: on the GPU, or of the whole process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB on the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return "not measured on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / (2**20 if sys.platform == 'darwin' else 2**10):.0f} MiB, whole process"
