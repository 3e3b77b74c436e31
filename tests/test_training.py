"""What the demo is made of: the split, patches, loss, and putting a volume together."""

import math

import numpy as np
import pytest
import torch

from cassetta.cli import figure
from cassetta.cli.errors import CommandError
from cassetta.cli.patches import Sampler, box, sweep
from cassetta.cli.training import dice, segmentation_loss
from cassetta.cli.volume import Split, Volume, split, standardize

from compare import assert_near


def test_the_split_leaves_a_gap_and_shares_nothing():
    labels = torch.zeros(10, 60, 10, dtype=torch.long)
    labels[2:8, 5:55, 2:8] = 1
    part = split(labels, gap=13)
    assert part == Split(learn=slice(37, 55), test=slice(5, 23))
    assert part.learn.start - part.test.stop >= 13
    with pytest.raises(CommandError, match="50 slices long, too short .* gap of 49"):
        split(labels, gap=49)
    with pytest.raises(CommandError, match="gap of 13 between two parts of at least 19"):
        split(labels, 13, (1, 19, 1))
    with pytest.raises(CommandError, match=r"\(10, 60, 10\) voxels, too few for a patch of 12"):
        split(labels, 13, (12, 1, 12))


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_patches_are_cut_from_image_and_labels_alike(ndim):
    image = torch.arange(9 * 10 * 11).reshape(9, 10, 11).float()
    labels = image.long() % 7 * (image > 300)
    sampler = Sampler(image, labels, box(ndim, 4), seed=3)
    patches, truth = sampler(50)
    assert patches.shape == (50, 1, *[4] * ndim)
    assert truth.shape == (50, *[4] * ndim)
    assert torch.equal(truth, patches[:, 0].long() % 7 * (patches[:, 0] > 300))
    assert (truth.flatten(1) > 0).any(1).all()
    again = Sampler(image, labels, box(ndim, 4), seed=3)(50)
    assert torch.equal(again[0], patches)
    other = Sampler(image, labels, box(ndim, 4), seed=4)(50)
    assert not torch.equal(other[0], patches)


def test_half_of_the_patches_are_flipped():
    image = torch.arange(8.0)[:, None, None].expand(8, 8, 8)
    patches, _ = Sampler(image, torch.ones(8, 8, 8, dtype=torch.long), box(3, 4), seed=0)(200)
    rising = (patches[:, 0, 1, 0, 0] > patches[:, 0, 0, 0, 0]).float().mean().item()
    assert 0.4 < rising < 0.6


@pytest.mark.parametrize("shape", [(12, 13, 9), (5, 20, 6), (6, 6, 6), (7, 1, 30)])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_sweep_puts_every_voxel_back(shape, ndim):
    image = torch.randn(shape)
    calls = []

    def predict(patches):
        calls.append(patches.shape)
        return torch.cat([patches, 2 * patches], dim=1)

    out = sweep(predict, image, box(ndim, 6), nb_classes=2, batch=3)
    assert out.shape == (2, *shape)
    assert_near(out[0], image, tolerance=1e-6)
    assert_near(out[1], 2 * image, tolerance=1e-6)
    assert all(call[1:] == (1, *[6] * ndim) and call[0] <= 3 for call in calls)


def test_sweep_trusts_the_middle_of_a_box_more_than_its_edges():
    def edges_are_wrong(patches):
        out = torch.zeros_like(patches)
        out[:, :, [0, -1]] = 1
        return out

    out = sweep(edges_are_wrong, torch.zeros(24, 1, 1), (6, 1, 1), nb_classes=1)
    assert out[0, 3:-3].max() < 0.3


def test_loss_is_zero_for_certainty_and_falls_towards_the_truth():
    labels = torch.randint(0, 3, (2, 5, 5, 5))
    truth = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    certain = segmentation_loss(100 * truth, labels)
    assert certain.item() < 1e-3
    assert segmentation_loss(truth, labels) < segmentation_loss(0 * truth, labels)
    flat = segmentation_loss(0 * truth, labels).item()
    assert flat == pytest.approx(math.log(3) + 1 - 1 / 3, abs=0.05)


def test_dice():
    truth, guess = torch.tensor([0, 1, 1, 2]), torch.tensor([1, 1, 0, 2])
    assert dice(guess, truth, 1) == 0.5
    assert dice(guess, truth, 2) == 1
    assert dice(guess, truth, 3) == 1
    assert dice(torch.zeros(4), truth, 2) == 0


def test_standardize():
    values = np.zeros((10, 10, 10), dtype=np.float32)
    values[2:8, 2:8, 2:8] = np.random.default_rng(0).normal(100, 10, (6, 6, 6))
    out = standardize(values)
    inside = out[2:8, 2:8, 2:8]
    assert abs(inside.mean().item()) < 1e-5
    assert inside.numpy().std() == pytest.approx(1, abs=1e-5)
    assert_near(standardize(3 * values + 0), out, tolerance=1e-4)
    values[0, 0, 0] = np.nan
    assert standardize(values).isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_picture_of_any_number_of_labels(tmp_path):
    labels = torch.zeros(20, 40, 16, dtype=torch.long)
    labels[4:16, 4:36, 4:12] = torch.randint(0, 12, (12, 32, 8))
    names = tuple(f"label {n}" for n in range(12))
    volume = Volume(torch.randn(20, 40, 16), labels, names, tuple(range(12)), np.eye(4), "noise")
    path = tmp_path / "picture.png"
    figure.draw(path, volume, labels.flip(0), split(labels, 5), [1.0], "title")
    assert path.stat().st_size > 10_000
