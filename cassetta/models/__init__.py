"""Models are whole networks for a task; most put a backbone between two convolutions."""

from cassetta.models.segmentation import SegNet as SegNet
