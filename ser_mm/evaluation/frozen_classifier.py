"""Linear evaluation as a training run: a linear classifier on a frozen backbone."""

import logging
from typing import Any

from mmengine.logging import print_log
from mmpretrain.models import ImageClassifier
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ser_mm.arguments import ModuleCfg, Positive, checked
from ser_mm.checkpoint import StrictPretrained, load_backbone
from ser_mm.evaluation.features import take_last_blocks, vectors_of


@MODELS.register_module()
@checked
class FrozenClassifier(ImageClassifier):
    """A classifier whose head alone is trained, on the features that the probe takes.

    The backbone is in eval mode whatever the Runner sets, so dropout, drop path and the running
    statistics of BatchNorm are off; its parameters have no gradients, and nothing of it is kept for
    the backward pass. That holds for any backbone of MMPretrain.

    Args:
        backbone (dict): Config of the backbone, with the checkpoint in ``init_cfg``.
        head (dict): Config of the head, ``LinearClsHead`` for a linear evaluation. Its
            ``in_channels`` are the backbone's times ``blocks``.
        blocks (int): Last blocks of a ViT whose [CLS] tokens are joined, see
            :class:`~ser_mm.evaluation.Embedder`. Defaults to 1.
        data_preprocessor (dict | nn.Module, optional): See ``ImageClassifier``. Defaults to None.

    Raises:
        ValueError: If an argument is of another type, or ``blocks`` are not in the network.
    """

    def __init__(
        self,
        backbone: ModuleCfg,
        head: ModuleCfg,
        blocks: Positive = 1,
        data_preprocessor: dict | nn.Module | None = None,
    ) -> None:
        super().__init__(backbone=backbone, head=head, data_preprocessor=data_preprocessor)
        if blocks > 1:
            take_last_blocks(self.backbone, blocks)
        self.blocks = blocks
        self.backbone.requires_grad_(False)

    def init_weights(self) -> None:
        """Initialize; the backbone strictly, with a warning if it starts from no checkpoint.

        Raises:
            ValueError: See :func:`~ser_mm.checkpoint.load_backbone`.
        """
        super().init_weights()
        given = self.backbone.init_cfg or ()
        given = given if isinstance(given, list | tuple) else [given]
        found = [cfg for cfg in given if cfg.get('checkpoint')]
        if not found:
            print_log(
                'FrozenClassifier: backbone.init_cfg names no checkpoint, so an untrained network '
                'is frozen; set model.backbone.init_cfg.checkpoint.',
                'current',
                logging.WARNING,
            )
        elif not isinstance(self.backbone, StrictPretrained):
            # MMPretrain's own backbones keep at random what a checkpoint does not fill.
            load_backbone(self.backbone, found[-1]['checkpoint'], found[-1].get('prefix'))

    def train(self, mode: bool = True) -> 'FrozenClassifier':
        """Set the mode of all but the backbone."""
        super().train(mode)
        self.backbone.train(False)  # returns None in some of MMPretrain's backbones
        return self

    def extract_feat(self, inputs: Tensor, stage: str = 'neck') -> Any:
        """Features of images.

        Args:
            inputs (Tensor): Shape (N, 3, H, W).
            stage (str): 'backbone' for its outputs, 'neck' for a tuple of the vectors (N, C),
                'pre_logits' for what the last layer of the head sees. Defaults to 'neck'.
        """
        outputs = self.backbone(inputs)
        if stage == 'backbone':
            return outputs
        features = (vectors_of(self.backbone, outputs, self.blocks),)
        return self.head.pre_logits(features) if stage == 'pre_logits' else features
