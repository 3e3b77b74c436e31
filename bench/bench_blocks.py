"""Blocks and backbones of `cassetta.measure`: ours against plain `torch.nn` modules.

    make bench

Runs on the GPU if there is one, and with small images if not. What is timed is what `cassetta
bench` times, prepared by the same code: ours is refused if it does not compute the same. What our
layers add on a CPU is the check of their input, which only shows on small images. `cassetta bench`
measures all cases, in turns, and more of their rivals.
"""

import itertools

import pytest
import torch

from cassetta.measure import cases, peers, roofs, stages

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
NAMES = ("meshnet", "block-16-d1", "block-64-d4", "model5_gw_ae", "unet2d")


RIVALS = [
    pytest.param(name, rival, id=f"{name}, {rival.engine}")
    for name in NAMES
    for rival in peers.rivals(cases.find(name), DEVICE, "eager", ["first"])
]


@pytest.mark.parametrize("what", stages.PASSES)
@pytest.mark.parametrize(("name", "rival"), RIVALS)
def test_rival(benchmark, monkeypatch, name, rival, what):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    task = stages.Task(cases.find(name), what, DTYPE, DEVICE, small=DEVICE.type == "cpu")
    stage = stages.NetworkStage(task, ["first"], roofs.roofs(DEVICE, DTYPE))
    ready = stage.prepare(rival)
    rounds = itertools.count()

    def run():
        ready.run(next(rounds))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{name}, {' x '.join(map(str, task.shape))}, {what}"
    benchmark.name = rival.engine
    benchmark.extra_info.update(ready.columns)
    benchmark(run)
