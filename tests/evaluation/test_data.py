"""The images of an evaluation."""

import torch
from mmengine.registry import DefaultScope

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
