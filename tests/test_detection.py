"""Detection models of torchvision: backbone and heads lose half of their units, on the same boxes nothing changes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection

import netsurgery
from netsurgery.passes import PruneChannels, RandomScore
from netsurgery.verification import permuted_difference
from oracles import parameters, snapshot

MODELS = [
    "tiny_maskrcnn",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in torchvision.models.list_models(module=torchvision.models.detection)
    ),
]

#: Small images and few boxes, none of which is too bad.
SIZES = {"min_size": 64, "max_size": 96}
TWO_STAGES = {"box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 5}
ONE_STAGE = {"score_thresh": 0.0, "topk_candidates": 20, "detections_per_img": 5}

#: What has classes, coordinates and anchors for units.
LAST = r"anchor_generator|cls_logits|bbox_(pred|reg|ctrness)|cls_score|mask_fcn_logits|kps_score|_head\.module_list"


class Backbone(nn.Module):
    """Two maps of 8 channels."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3, 4, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 1))
        self.second = nn.Sequential(nn.Conv2d(8, 10, 3, 2, 1), nn.ReLU(), nn.Conv2d(10, 8, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.first(x)
        return {"0": first, "1": self.second(first)}


def tiny_maskrcnn(num_classes: int, **settings: Any) -> nn.Module:
    """All that Mask R-CNN does, on few channels."""
    return detection.MaskRCNN(
        Backbone(),
        rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(((8,), (32,)), ((0.5, 1.0, 2.0),) * 2),
        box_head=detection.faster_rcnn.TwoMLPHead(8 * 7 * 7, 20),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(20, num_classes),
        mask_head=detection.mask_rcnn.MaskRCNNHeads(8, (10, 6), 1),
        mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(6, 9, num_classes),
        **settings,
    )


def build(name: str) -> nn.Module:
    """The model in eval mode and float64, with random weights, norms and statistics."""
    torch.manual_seed(0)
    settings = {**({} if name.startswith("ssd") else SIZES), **(TWO_STAGES if "rcnn" in name else ONE_STAGE)}
    classes = 2 if name.startswith("keypoint") else 5
    if name == "tiny_maskrcnn":
        model = tiny_maskrcnn(num_classes=classes, **settings)
    else:
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=classes, **settings)
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() > 1:
                bound = (6 / tensor[0].numel()) ** 0.5
                tensor.uniform_(-bound, bound)
            elif key.endswith(("bias", "running_mean")):
                tensor.normal_(0.0, 0.2)
            elif tensor.is_floating_point():
                tensor.uniform_(0.25, 1.0).add_(0.25 if key.endswith("running_var") else 0.0)
    return model.double().eval()


def images(seed: int = 0, sizes: tuple[tuple[int, int], ...] = ((64, 64), (60, 72))) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *size, dtype=torch.float64, generator=generator) for size in sizes]


@pytest.mark.parametrize("name", MODELS)
def test_half_of_every_group(name: str) -> None:
    model, inputs = build(name), (images(),)
    before, found = snapshot(model), model(*inputs)
    assert all(len(one["boxes"]) for one in found)
    network = netsurgery.trace(model, inputs)
    assert network.programs[0].values == "all"
    assert permuted_difference(model, network, inputs) < 1e-9
    locked = [g for g in network.groups if g.locked and not g.name.endswith(":in")]
    assert [g.name for g in locked if not re.search(LAST, g.name)] == []

    sorts = sorted({group.unit for group in network.prunable})  # one by one: a ratio cuts one factor of several
    edit = netsurgery.plan(model, [RandomScore(), *(PruneChannels(0.5, unit=one) for one in sorts)], inputs)
    assert all(len(edit.keep[group.name]) == group.size - group.size // 2 for group in network.prunable)
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, inputs) < 1e-9
    assert netsurgery.verify(model, small, edit, (images(1),)) < 1e-9  # along the path of the others
    assert parameters(small) < 0.4 * parameters(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not edit.replaced

    assert len(small(images(1, ((50, 90), (64, 64), (90, 50))))) == 3
    small.train()
    generator = torch.Generator().manual_seed(0)
    boxes = [torch.tensor([[5.0, 5.0, 40.0, 50.0], [20.0, 10.0, 55.0, 30.0]], dtype=torch.float64)] * 2
    targets = [
        {
            "boxes": box,
            "labels": torch.ones(2, dtype=torch.int64),
            "masks": torch.randint(2, (2, *image.shape[1:]), dtype=torch.uint8, generator=generator),
            "keypoints": torch.cat([box[:, None, :2] + 3, torch.ones(2, 1, 1)], 2).expand(2, 17, 3).float(),
        }
        for box, image in zip(boxes, *inputs, strict=True)
    ]
    sum(small(*inputs, targets).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters() if p.requires_grad)
