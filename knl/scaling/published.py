"""Published trainings of ImageNet, as their authors gave them: what the model is held against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """`units`: processors or nodes as counted in the source, `node_units` of them a node; `net`:
    resnet50 or alexnet; `batch`: global; `top1`: percent, None where not given; `node_speed`:
    training images/s of one node that was measured apart from this run, 0 where there is none;
    `cpu`: whether the model can say something about it; `why`: of the difference to the model."""

    name: str
    source: str
    net: str
    hardware: str
    units: int
    batch: int
    epochs: int
    minutes: float
    top1: float | None
    node_units: int = 1
    node_speed: float = 0.0
    cpu: bool = True
    why: str = ""

    @property
    def nodes(self) -> int:
        return self.units // self.node_units


# Of one Xeon Phi 7250 under Intel Caffe, at large batches, on a testbed of four nodes.
KNL_RESNET, KNL_ALEXNET = 79.0, 640.0

_YOU = "You et al. 2017, arXiv 1709.05011"
_SMALL = "16 images a node: the speed of a node at small batches is not known, 79 is at large ones"
_SOCKETS = "no speed of a node is published: the one that the model needs is shown"

PUBLISHED = (
    Published(
        "ResNet-50, 512 KNL", _YOU, "resnet50", "KNL 7250", 512, 32_768, 90, 60, 72.4,
        node_speed=KNL_RESNET,
        why="the hour has the reading of images and the start in it; scatter was not measured",
    ),
    Published(
        "ResNet-50, 2048 KNL", _YOU, "resnet50", "KNL 7250", 2048, 32_768, 90, 20, 75.4,
        node_speed=KNL_RESNET, why=_SMALL,
    ),
    Published(
        "ResNet-50, 2048 KNL, 64 epochs", _YOU, "resnet50", "KNL 7250", 2048, 32_768, 64, 14, 74.9,
        node_speed=KNL_RESNET, why=_SMALL,
    ),
    Published(
        "ResNet-50, Nurion, 2048 KNL", "Intel Caffe on Nurion (KISTI)", "resnet50", "KNL 7250",
        2048, 32_768, 90, 23, 73.0, node_speed=KNL_RESNET,
        why=_SMALL + "; other jobs on the network",
    ),
    Published(
        "AlexNet, 512 KNL", _YOU, "alexnet", "KNL 7250", 512, 32_768, 100, 24, 58.5,
        node_speed=KNL_ALEXNET,
        why="640 images/s is at large batches: at 64 a node the fully connected layers read their "
        "235 MB of weights for few images, and update and additions pass over 244 MB",
    ),
    Published(
        "ResNet-50, 1600 SKX", _YOU, "resnet50", "SKX", 1600, 32_768, 90, 32, 75.3, node_units=2,
        why=_SOCKETS,
    ),
    Published(
        "AlexNet, 1024 SKX", _YOU, "alexnet", "SKX", 1024, 32_768, 100, 11, None, node_units=2,
        why=_SOCKETS,
    ),
    Published(
        "ResNet-50, SURFsara, 448 SKX nodes", "SURFsara, Intel Caffe", "resnet50", "SKX node", 448,
        14_336, 90, 60, 75.6, why=_SOCKETS,
    ),
    Published(
        "ResNet-50, 256 P100", "Goyal et al. 2017, arXiv 1706.02677", "resnet50", "P100", 256,
        8_192, 90, 65, 76.3, node_units=8, cpu=False,
    ),
    Published(
        "ResNet-50, 1024 P100", "Akiba et al. 2017", "resnet50", "P100", 1024, 32_768, 90, 15, 74.9,
        node_units=8, cpu=False,
    ),
    Published(
        "ResNet-50, 1024 TPUv3", "Ying et al. 2018", "resnet50", "TPUv3", 1024, 32_768, 90, 2.2,
        76.3, cpu=False,
    ),
    Published(
        "ResNet-50, 2176 V100", "Mikami et al. 2018", "resnet50", "V100", 2176, 69_632, 90, 2.0,
        75.0, cpu=False,
    ),
)  # fmt: skip
