"""The images of an evaluation."""

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from ser_mm.engine.configs import find_config
from ser_mm.evaluation.backbone import build_backbone, build_model
from ser_mm.evaluation.data import spaced_images
from tests.support.probed import config


def test_no_scope_has_to_be_set_first(imagenet_tree):
    """As in a script that has run no command before; the config's own scope counts."""
    cfg = config(imagenet_tree)
    expected = torch.cat(list(spaced_images(cfg, 'val', 3)))
    for scope in (None, 'mmpretrain'):
        cfg.default_scope = scope
        with DefaultScope.overwrite_default_scope('mmengine'):
            assert torch.equal(torch.cat(list(spaced_images(cfg, 'val', 3))), expected)


def test_a_network_is_built_in_its_own_scope():
    """Beside a detector, whose registry has no backbone of MMPretrain."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        build_backbone('demo/ser_mocov3')
        build_model(Config.fromfile(find_config('demo/ser_mocov3')))
