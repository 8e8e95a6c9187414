from collections import defaultdict
from typing import Annotated

import torch
from mmpretrain.models import MoCoV3
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from ser_mm.arguments import InitCfg, Name, between, checked


@MODELS.register_module()
@checked(base_momentum=Annotated[float, between(0, 1)], pretrained=Name | None, init_cfg=InitCfg)
class MultiCropMoCoV3(MoCoV3):
    """MoCo v3 with local crops, which predict both keys of their image (SwAV, arXiv 2006.09882).

    The first two views are those of ``MoCoV3``, with its two terms. Each further view adds two of
    the same weight, for the keys of both; the momentum branch never sees it. Four crops make ten
    terms, as in SER's release.

    Args:
        *args: Those of ``MoCoV3``.
        turn_crops (bool): Let each further view stand for four, its quarter turns: E-SSL's crops as
            plain positives, a control of :class:`~ser_mm.models.RotationHead`. Defaults to False.
        **kwargs: Those of ``MoCoV3``.
    """

    def __init__(self, *args, turn_crops: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.turn_crops = turn_crops

    def loss(
        self, inputs: list[Tensor], data_samples: list[DataSample] | None = None, **kwargs
    ) -> dict[str, Tensor]:
        """Update the momentum branch, and compute the loss of all views.

        Args:
            inputs (list[Tensor]): Two views (N, 3, H, W), then any number of local crops. Those of
                one size go through the backbone together.
            data_samples (list[DataSample], optional): Unused.
            **kwargs: Unused.

        Returns:
            dict[str, Tensor]: ``loss``.
        """
        views, crops = inputs[:2], inputs[2:]
        if self.turn_crops:
            crops = [torch.rot90(crop, k, (2, 3)) for crop in crops for k in range(4)]
        queries = [self.neck(self.backbone(view))[0] for view in views]
        by_size = defaultdict(list)
        for crop in crops:
            by_size[crop.shape[-2:]].append(crop)
        for same in by_size.values():
            outs = self.backbone(torch.cat(same))[-1].chunk(len(same))
            queries += [self.neck((out,))[0] for out in outs]
        with torch.no_grad():
            self.momentum_encoder.update_parameters(nn.Sequential(self.backbone, self.neck))
            keys = [self.momentum_encoder(view)[0] for view in views]
        loss = self.head.loss(queries[0], keys[1]) + self.head.loss(queries[1], keys[0])
        for query in queries[2:]:
            loss = loss + self.head.loss(query, keys[0]) + self.head.loss(query, keys[1])
        return dict(loss=loss)
