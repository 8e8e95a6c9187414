import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from sklearn.decomposition import PCA

from ser_mm.evaluation import load_features
from tests.support.algorithms import ALGORITHMS
from tests.support.probed import PIPELINE, write_checkpoint


@pytest.fixture(scope='session')
def checkpoint(tmp_path_factory):
    """Random weights that fit ``tests.support.probed.config``."""
    return write_checkpoint(tmp_path_factory.mktemp('checkpoint') / 'epoch_1.pth')


@pytest.fixture(scope='session')
def features(checkpoint, tmp_path_factory):
    """Features of photographs, by an untrained network: too few for a perfect fit.

    Training and validation features (N, 4), then training and validation labels.
    """
    init_default_scope('mmpretrain')
    folder = tmp_path_factory.mktemp('features')
    photos = dict(
        type='BundledPhotos',
        data_root=str(folder / 'photos'),
        crop_size=32,
        train_per_picture=40,
        val_per_picture=20,
        pipeline=PIPELINE,
    )
    splits = {split: dict(photos, split=split) for split in ('train', 'val')}
    cfg = Config(dict(model=ALGORITHMS['mocov3'], evaluation=splits))
    (x, y), (v, w) = (load_features(cfg, checkpoint, split, folder) for split in splits)
    reduce = PCA(4, whiten=True, random_state=0).fit(x.numpy())
    return *(torch.from_numpy(reduce.transform(part.numpy())).float() for part in (x, v)), y, w
