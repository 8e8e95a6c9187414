from collections import defaultdict
from typing import Annotated

import torch
from mmpretrain.models import BaseSelfSupervisor
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from ser_mm.arguments import InitCfg, ModuleCfg, Name, between, checked
from ser_mm.models.dino.dino_head import DINOHead
from ser_mm.models.dino.dino_neck import DINONeck
from ser_mm.models.foreach_ema import ForeachCosineEMA


@MODELS.register_module()
@checked
class DINO(BaseSelfSupervisor):
    """DINO, self-distillation with no labels (arXiv 2104.14294, Section 3.1).

    The student (``backbone`` and ``neck``) learns from all views to predict what the teacher, its
    moving average, says about the others of the first two. Those are the global views; further
    ones, if any, are local crops, which the student alone sees. Drop path is the student's alone.

    Args:
        backbone (dict): Config of the backbone.
        neck (dict): Config of the projector, :class:`~ser_mm.models.DINONeck`.
        head (dict): Config of the loss, :class:`~ser_mm.models.DINOHead`.
        base_momentum (float): Weight of the student in the moving average at the start, between 0
            and 1, falling to 0 over training by a cosine. Defaults to 0.004.
        pretrained (str, optional): Checkpoint to start from. Defaults to None.
        data_preprocessor (dict, optional): Config of the preprocessor. Defaults to None:
            ``dict(type='SelfSupDataPreprocessor')``.
        init_cfg (dict | list[dict], optional): Initialization config. Defaults to None.

    Raises:
        ValueError: If an argument is of another type, or neck and head differ in ``out_channels``.
    """

    def __init__(
        self,
        backbone: ModuleCfg,
        neck: ModuleCfg,
        head: ModuleCfg,
        base_momentum: Annotated[float, between(0, 1)] = 0.004,
        pretrained: Name | None = None,
        data_preprocessor: dict | nn.Module | None = None,
        init_cfg: InitCfg = None,
    ) -> None:
        super().__init__(
            backbone=backbone,
            neck=neck,
            head=head,
            pretrained=pretrained,
            data_preprocessor=data_preprocessor,
            init_cfg=init_cfg,
        )
        if isinstance(self.neck, DINONeck) and isinstance(self.head, DINOHead):
            given, taken = len(self.neck.last_layer.norm), len(self.head.center)
            if given != taken:
                raise ValueError(
                    f'DINO: neck.out_channels={given}, but head.out_channels={taken}; give both '
                    'the same.'
                )
        self.teacher = ForeachCosineEMA(
            nn.Sequential(self.backbone, self.neck), momentum=base_momentum
        )
        for module in self.teacher.modules():
            if hasattr(module, 'drop_prob'):  # DropPath, of which every library has its own
                module.drop_prob = 0.0

    def loss(
        self, inputs: list[Tensor], data_samples: list[DataSample] | None = None, **kwargs
    ) -> dict[str, Tensor]:
        """Update the teacher, and compute the loss of the student.

        Args:
            inputs (list[Tensor]): Two global views (N, 3, H, W), then any number of local crops.
                Those of one size go through the student together.
            data_samples (list[DataSample], optional): Unused.
            **kwargs: Unused.

        Returns:
            dict[str, Tensor]: ``loss``.
        """
        global_views, local_crops = inputs[:2], inputs[2:]
        with torch.no_grad():
            # The first update makes the teacher a copy of the student.
            self.teacher.update_parameters(nn.Sequential(self.backbone, self.neck))
            teacher = [self.teacher(view)[0] for view in global_views]

        student = [self.neck(self.backbone(view))[0] for view in global_views]
        by_size = defaultdict(list)
        for crop in local_crops:
            by_size[crop.shape[-2:]].append(crop)
        for crops in by_size.values():
            student += self.neck(self.backbone(torch.cat(crops)))[0].chunk(len(crops))
        return dict(loss=self.head.loss(student, teacher))
