"""Images 2i and 2i + 1 of every batch share their draws, wherever they come from."""

import copy
import pickle

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from ser_mm.datasets import pair_batches
from ser_mm.draws import COLUMNS
from tests.support.paths import ROOT

CFG = Config.fromfile(ROOT / 'configs/mocov3_vits16.py')
VIEWS = [[dict(view[0], scale=32), *view[1:]] for view in (CFG.view_pipeline1, CFG.view_pipeline2)]
SHARED = [i for i, n in enumerate(COLUMNS) if n not in ('flip', 'blur', 'sigma', 'solarize')]
PIXEL = 1 / 20
"""At least, as a share of an image of the tree: to what a shared crop is rounded, at either end."""


def dataset(root, views=VIEWS, **options):
    pipeline = dict(
        type='EquivariantViewPipeline',
        views=views,
        equi_ratio=0,
        record_draws=True,
        pair_draws=True,
    )
    return dict(
        type='CustomDataset',
        data_root=str(root),
        with_label=False,
        pipeline=[dict(type='LoadReadableImage'), pipeline, dict(type='PackInputs')],
        **options,
    )


def loader(data, batch_size=4, sampler='DefaultSampler', **options):
    init_default_scope('mmpretrain')
    return Runner.build_dataloader(
        dict(
            dict(batch_size=batch_size, num_workers=0, drop_last=True),
            sampler=dict(type=sampler, shuffle=True),
            collate_fn=dict(type='default_collate'),
            dataset=copy.deepcopy(data),
            **options,
        ),
        seed=3,
    )


def check(batches, epochs=2):
    """Pairs are pairs, neighbours of two pairs are not, and there are some of each."""
    pair_batches(batches)
    seen = 0
    for _ in range(epochs):
        for batch in batches:
            draws, record = batch['inputs'][-2:]
            draws = draws[..., SHARED]
            assert (record == -1).all()
            assert (draws[::2] - draws[1::2]).abs().max() <= PIXEL
            assert (draws[1:-1:2] - draws[2::2]).abs().amax((1, 2)).min() > 0
            seen += len(draws) // 2
    assert seen
    return seen


def of(root, kind):
    single = dataset(root, data_prefix='train')
    return dict(
        single=single,
        repeated=dict(type='RepeatDataset', times=2, dataset=single),
        concatenated=dict(type='ConcatDataset', datasets=[single, dataset(root)]),
    )[kind]


@pytest.mark.parametrize('kind', ['single', 'repeated', 'concatenated'])
def test_pairs_share_their_draws(kind, imagenet_tree):
    check(loader(of(imagenet_tree, kind)))


def test_pairs_share_their_draws_in_other_processes(imagenet_tree):
    """Those that start by a copy of the process, and by its data set alone."""
    batches = loader(of(imagenet_tree, 'concatenated'), num_workers=2, persistent_workers=True)
    check(batches)
    sent = pickle.loads(pickle.dumps(batches.dataset))
    samples = sent.__getitems__([3, 20, 0, 1])
    draws = torch.stack([sample['inputs'][-2][:, SHARED] for sample in samples])
    assert (draws[::2] - draws[1::2]).abs().max() <= PIXEL


@pytest.mark.parametrize('unreadable', [0, 1, 2])
def test_an_image_in_place_of_an_unreadable_one_joins_its_pair(unreadable, imagenet_tree, tmp_path):
    files = sorted((imagenet_tree / 'train').rglob('*.JPEG'))[:4]
    for i, file in enumerate(files):
        (tmp_path / f'{i}.JPEG').write_bytes(b'' if i == unreadable else file.read_bytes())
    check(loader(dataset(tmp_path)))


def test_data_sets_with_other_views_are_refused(imagenet_tree):
    parts = [dataset(imagenet_tree), dataset(imagenet_tree, VIEWS[::-1])]
    batches = loader(dict(type='ConcatDataset', datasets=parts))
    with pytest.raises(ValueError, match='data sets of a run differ in views'):
        pair_batches(batches)


def test_odd_batches_are_refused(imagenet_tree, tmp_path):
    data = dataset(imagenet_tree, data_prefix='train')
    with pytest.raises(ValueError, match='batch of 3 images .* choose an even batch_size'):
        pair_batches(loader(data, batch_size=3))
    for file in sorted(imagenet_tree.rglob('*.JPEG'))[:5]:
        (tmp_path / f'{file.parent.name}_{file.name}').write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match='batch of 1 images .* drop_last=True'):
        pair_batches(loader(dataset(tmp_path), drop_last=False))
    # its batches are always whole
    endless = loader(dataset(tmp_path), sampler='InfiniteSampler', drop_last=False)
    assert pair_batches(endless) is not None
    batch = next(iter(endless))
    assert torch.is_tensor(batch['inputs'][0]) and len(batch['inputs'][0]) == 4
