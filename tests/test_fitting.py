"""What is said to fit does, and the next larger does not."""

import pytest
import torch

import cassetta
from cassetta.backbones import MeshNet, UNet
from cassetta.fitting import largest
from cassetta.layers import ConvGroup
from cassetta.rehearsal import Rehearsal

NETS = {
    "meshnet": lambda: MeshNet(2, 6, nb_layers=3),
    "unet": lambda: UNet(2, 4, nb_levels=4, norm="instance"),
}
MEMORY = 20 * 2**20


def need(net, shape, fused, inference, autocast=None):
    rehearsal = Rehearsal(net, autocast)
    if inference:
        return rehearsal.inference_peak(shape, fused=fused)
    return rehearsal.training_peak(shape, fused=fused) + rehearsal.optimizer_bytes


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_the_answer_fits_and_the_next_does_not(name, fused, inference):
    net = NETS[name]()
    c = net.inp_channels
    options = {"fused": fused, "inference": inference}
    n, channels, *size = largest(net, (1, c, 40, 48), MEMORY, **options)
    assert (channels, size) == (c, [40, 48])
    assert need(net, (n, c, 40, 48), **options) <= MEMORY < need(net, (n + 1, c, 40, 48), **options)
    n, channels, *size = largest(net, (3, c, 40, 48), MEMORY, vary="size", step=4, **options)
    edge = size[0]
    assert (n, channels, size) == (3, c, [edge, edge])
    assert edge % 4 == 0
    more = edge + 4
    assert need(net, (3, c, edge, edge), **options) <= MEMORY
    assert need(net, (3, c, more, more), **options) > MEMORY


@pytest.mark.parametrize("exactly", [1, 2, 3, 4, 5, 8, 9])
def test_to_the_byte(exactly):
    net = NETS["meshnet"]()
    memory = need(net, (exactly, 6, 8, 8), fused=True, inference=False)
    assert largest(net, (1, 6, 8, 8), memory)[0] == exactly
    if exactly > 1:
        assert largest(net, (1, 6, 8, 8), memory - 1)[0] == exactly - 1


def test_fused_blocks_and_lower_precision_make_room():
    net = ConvGroup(3, 8, nb_conv=6, norm="batch")
    shape = (1, 8, 16, 16, 16)
    plain, fused, rounded = (
        largest(net, shape, 32 * 2**20, **options)[0]
        for options in ({"fused": False}, {}, {"autocast": torch.bfloat16})
    )
    assert plain < fused < rounded


def test_a_network_that_needs_a_size_begins_there():
    """Four levels and an instance norm need 16 voxels, and a batch norm two values."""
    net = NETS["unet"]()
    memory = need(net, (1, 4, 16, 16), fused=True, inference=False)
    assert largest(net, (1, 4, 32, 32), memory, vary="size", step=1)[2:] == (16, 16)
    net = MeshNet(1, 4, nb_layers=1, norm="batch")
    memory = need(net, (3, 4, 1), fused=True, inference=False)
    assert largest(net, (2, 4, 1), memory)[0] == 3


@pytest.mark.parametrize("vary", ["batch", "size"])
def test_what_cannot_fit_is_said_with_what_it_would_take(vary):
    net = NETS["unet"]()
    with pytest.raises(ValueError, match=r"memory=1000 is too small: \(1, 4, 16, 16\) already"):
        largest(net, (1, 4, 16, 16), 1000, vary=vary)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"memory": 0}, ValueError, "memory=0 must be"),
        ({"memory": float("nan")}, ValueError, "memory=nan must be"),
        ({"memory": 2**60}, ValueError, "below 2\\*\\*50"),
        ({"memory": "24"}, TypeError, "memory='24'"),
        ({"memory": True}, TypeError, "memory=True"),
        ({"vary": "bach"}, ValueError, "vary='bach' is unknown: use 'batch'"),
        ({"step": 0}, ValueError, "step=0 is too small"),
        ({"shape": (1, 6)}, ValueError, "has no size"),
        ({"shape": (1, 6, 0, 8)}, ValueError, r"shape\[2\]=0"),
        ({"shape": (10**6, 5, 8, 8)}, ValueError, "a 2-D image of shape"),
        ({"shape": (1, 6, 8)}, ValueError, "a 2-D image of shape"),
        ({"autocast": torch.int8}, ValueError, "autocast=torch.int8"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(changes, kind, message):
    with pytest.raises(kind, match=message):
        largest(NETS["meshnet"](), **{"shape": (1, 6, 8, 8), "memory": MEMORY, **changes})


def test_it_is_in_the_package():
    assert cassetta.largest is largest
