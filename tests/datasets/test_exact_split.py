"""Every batch has the same number of images in b2: on any number of ranks and workers."""

import copy

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import DATASETS, MODELS

from ser_mm.datasets import ExactSplit, split_batches
from tests.support import reference, short_run
from tests.support.algorithms import ALGORITHMS

IMAGES = 48


@pytest.fixture(scope='module')
def folder(imagenet_tree, tmp_path_factory):
    """Links to the images of the tree, 48 in all."""
    root = tmp_path_factory.mktemp('flat')
    files = sorted(imagenet_tree.rglob('*.JPEG'))
    for i in range(IMAGES):
        (root / f'{i:02d}.JPEG').symlink_to(files[i % len(files)])
    return root


def dataset(folder, equi_ratio, **options):
    views = short_run.equivariant_views(equi_ratio)
    pipeline = [dict(type='LoadReadableImage'), views, dict(type='PackInputs')]
    return dict(
        type='CustomDataset', data_root=str(folder), with_label=False, pipeline=pipeline, **options
    )


def loader(data, batch_size=16, num_workers=0, persistent_workers=False, shuffle=True):
    init_default_scope('mmpretrain')
    return Runner.build_dataloader(
        dict(
            batch_size=batch_size,
            num_workers=num_workers,
            persistent_workers=persistent_workers,
            drop_last=False,
            sampler=dict(type='DefaultSampler', shuffle=shuffle),
            collate_fn=dict(type='default_collate'),
            dataset=data,
        ),
        seed=3,
    )


def records(batches, epochs=1):
    """Of each batch of each epoch, which images are in b2, by index."""
    found = []
    for epoch in range(epochs):
        batches.sampler.set_epoch(epoch)
        for batch in batches:
            in_b2 = batch['inputs'][-1][:, 0] >= 0
            index = torch.tensor([sample.sample_idx for sample in batch['data_samples']])
            found.append((len(index), sorted(index[in_b2].tolist())))
    return found


@pytest.mark.parametrize('equi_ratio, counts', [(1 / 8, [2, 2, 2]), (0.2, [3, 3, 3])])
def test_every_batch_has_the_same_number(folder, equi_ratio, counts):
    """By a coin for each image it varied, and was 1, which has no negatives, or 0 at times."""
    batches = loader(dataset(folder, equi_ratio))
    split_batches(batches, seed=3)
    epochs = [records(batches), records(batches, 2)[3:]]
    assert [len(in_b2) for _, in_b2 in epochs[0]] == counts
    assert [len(in_b2) for _, in_b2 in epochs[1]] == counts
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize('workers, persistent', [(1, False), (2, False), (3, True)])
def test_workers_do_not_matter(folder, workers, persistent):
    alone, helped = (
        loader(dataset(folder, 1 / 8), num_workers=n, persistent_workers=p and n > 0)
        for n, p in ((0, False), (workers, persistent))
    )
    for batches in (alone, helped):
        split_batches(batches, seed=3)
    assert records(alone, 2) == records(helped, 2)


def test_workers_that_stay_learn_of_the_epoch(folder):
    """With a sampler that does not shuffle, the images of b2 were those of the first epoch."""
    drawn = []
    for workers in (0, 2):
        batches = loader(
            dataset(folder, 1 / 8),
            num_workers=workers,
            persistent_workers=workers > 0,
            shuffle=False,
        )
        split = split_batches(batches, seed=3)
        drawn.append([])
        for epoch in range(2):
            split.epoch = epoch
            drawn[-1].append(records(batches))
    alone, helped = drawn
    assert alone == helped and alone[0] != alone[1]


@pytest.mark.parametrize('world_size', [1, 2, 3, 8])
@pytest.mark.parametrize('equi_ratio', [0.01, 1 / 16, 0.3, 1])
def test_the_global_count_is_dealt_over_the_ranks_to_within_one(world_size, equi_ratio):
    batch_size = 128
    transform = type('Pipeline', (), dict(equi_ratio=equi_ratio))
    splits = [ExactSplit(None, [transform], 0, rank, world_size) for rank in range(world_size)]
    wanted = max(round(equi_ratio * batch_size * world_size), 2)
    for first in range(0, 1000, 100):
        own = [len(split.places(range(first, first + batch_size))) for split in splits]
        assert sum(own) == wanted == splits[0].count(batch_size)
        assert max(own) - min(own) <= 1


def test_one_image_per_rank(folder):
    in_b2 = []
    for rank in range(4):
        batches = loader(dataset(folder, 0.5), batch_size=1)
        split_batches(batches, rank=rank, world_size=4)
        preprocessor = MODELS.build(ALGORITHMS['mocov3']['data_preprocessor'])
        (views, *_) = (preprocessor(batch, training=True)['inputs'] for batch in batches)
        assert [len(view) for view in views] == [1, 1]
        in_b2.append(len(views[0].equi))
    assert in_b2 == [1, 1, 0, 0]


def test_a_last_smaller_batch_has_two_at_least():
    transform = type('Pipeline', (), dict(equi_ratio=0.01))
    split = ExactSplit(None, [transform])
    assert [len(split.places(range(n))) for n in (1, 2, 10, 149, 151, 256)] == [1, 2, 2, 2, 2, 3]


def test_each_image_of_a_batch_is_as_likely():
    transform = type('Pipeline', (), dict(equi_ratio=1 / 8))
    split = ExactSplit(None, [transform], seed=1)
    n = 4000
    rng = np.random.default_rng(0)
    counts = np.zeros(16, int)
    for _ in range(n):
        for place in split.places(rng.permutation(1000)[:16]):
            counts[place] += 1
    low, high = reference.binomial_range(n, 1 / 8)
    assert low <= counts.min() and counts.max() <= high


def test_wrapped_data_sets_and_unreadable_images(folder, tmp_path):
    """The data set draws another image for one that cannot be read; the count stays."""
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    for i in range(0, IMAGES, 3):
        (tmp_path / f'{i:02d}.JPEG').unlink()
        (tmp_path / f'{i:02d}.JPEG').write_bytes(b'no image')
    part = dataset(tmp_path, 0.25)
    wrapped = dict(
        type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[part])
    )
    batches = loader(wrapped)
    split_batches(batches)
    assert [len(in_b2) for _, in_b2 in records(batches)] == [4] * 6


def test_without_b2_nothing_is_changed(folder):
    batches = loader(dataset(folder, 0))
    assert split_batches(batches) is None
    assert not hasattr(batches.dataset, '__getitems__')
    assert records(batches) == [(16, [])] * 3


@pytest.mark.parametrize(
    'equi_ratio, batch_size, world_size, message',
    [
        (
            0.01,
            64,
            1,
            'equi_ratio=0.01 of a global batch of 64 images is 1 in b2, .* 0.031 or more',
        ),
        (0.001, 64, 4, 'global batch of 256 images is 0 in b2, .* or the batch to 1501 images'),
        (0.5, 1, 1, 'global batch of 1 images is 0 in b2, .* raise the batch to 4 images'),
    ],
)
def test_fewer_than_two_are_refused(folder, equi_ratio, batch_size, world_size, message):
    batches = loader(dataset(folder, equi_ratio), batch_size)
    with pytest.raises(ValueError, match=message):
        split_batches(batches, world_size=world_size)
    # The advice works.
    split_batches(loader(dataset(folder, 0.031), 64))
    split_batches(loader(dataset(folder, 0.01), 151))
    split_batches(loader(dataset(folder, 0.5), 4))


def test_different_ratios_are_refused(folder):
    both = dict(type='ConcatDataset', datasets=[dataset(folder, 0.1), dataset(folder, 0.2)])
    with pytest.raises(ValueError, match=r'equi_ratio=\[0.1, 0.2\]; give all the same'):
        split_batches(loader(both))
    # Images drawn for b2 from a data set that has none would be in b1.
    some = dict(type='ConcatDataset', datasets=[dataset(folder, 0.25), dataset(folder, 0.0)])
    with pytest.raises(ValueError, match=r'equi_ratio=\[0.0, 0.25\]; give all the same'):
        split_batches(loader(some))


def test_a_batch_that_nobody_assigned_is_refused(folder):
    """Whoever started the run: in MMEngine's own loop, too, before the first step."""
    preprocessor = MODELS.build(ALGORITHMS['mocov3']['data_preprocessor'])
    batch = next(iter(loader(dataset(folder, 0.5))))
    with pytest.raises(ValueError, match='nobody assigned .*EquivariantSplitHook'):
        preprocessor(batch, training=True)


class Count(Hook):
    """Images of b2 in each step."""

    def __init__(self):
        self.counts = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.counts.append(int((data_batch['inputs'][-1][:, 0] >= 0).sum()))


def test_in_a_run_and_in_the_log(imagenet_tree, tmp_path):
    count = Count()
    runner, _ = short_run.run(
        ALGORITHMS['simsiam'],
        short_run.equivariant_views(0.5),
        imagenet_tree,
        tmp_path,
        hooks=[count],
        log_level='INFO',
    )
    assert count.counts == [2] * 8
    (log,) = tmp_path.glob('*/*.log')
    assert 'b2 has 2 of the 4 images of a batch (equi_ratio=0.5)' in log.read_text()


def test_samples_are_those_of_the_data_set(folder):
    """Beside the split nothing changes: an image of b1 is what the data set gives."""
    init_default_scope('mmpretrain')
    data = DATASETS.build(copy.deepcopy(dataset(folder, 0.5)))
    split = split_batches(torch.utils.data.DataLoader(data, 4))
    np.random.seed(0)
    samples = split([5, 6, 7, 8])
    assert [sample['data_samples'].sample_idx for sample in samples] == [5, 6, 7, 8]
    assert sum(int(sample['inputs'][-1][0] >= 0) for sample in samples) == 2
