"""Commands on two ranks write what they write on one."""

import json

import pytest
import torch.distributed as dist

from ser_mm.datasets import BundledPhotos
from tests.support.command import run_command
from tests.support.probed import config, write_checkpoint
from tests.support.two_ranks import on_two_ranks


def _on_rank(rank, commands, folder):
    for i, command in enumerate(commands):
        assert run_command(*command, '--launcher', 'pytorch') is None  # and the group is closed
        dist.init_process_group('gloo', f'file://{folder}/store{i}', rank=rank, world_size=2)


def _list_on_one_rank(rank, folder):
    if rank == 0:
        BundledPhotos(data_root=folder, train_per_picture=1, val_per_picture=1, pipeline=[])
    found = [None, None]
    dist.all_gather_object(found, rank)
    return found


def test_the_demo_s_images_may_be_listed_by_one_rank(tmp_path):
    """A barrier met what the other rank waited at, and both waited for ever."""
    assert on_two_ranks(_list_on_one_rank, str(tmp_path / 'photos')) == [[0, 1], [0, 1]]


@pytest.mark.slow
def test_ranks_do_not_matter(imagenet_tree, tmp_path):
    """Of a probe of other images too, and of the measures of token maps."""
    config(imagenet_tree).dump(tmp_path / 'config.py')
    run = str(tmp_path / 'config.py'), write_checkpoint(tmp_path / 'x.pth')
    some = tmp_path / 'some'
    for i in (1, 3):
        (some / f'n{i:08d}').mkdir(parents=True)
        for path in (imagenet_tree / 'train' / f'n{i:08d}').glob('*_[01].JPEG'):
            (some / f'n{i:08d}' / path.name).write_bytes(path.read_bytes())
    probe = ['--also', f'some={some}', '--shots', '2', '--k', '1', '--epochs', '2']
    dense = ['--images', '3', '--train-images', '4', '--step', '180', '--measures']
    dense += ['correspondence', 'position']

    def commands(folder):
        places = ['--out', f'{folder}/probe', '--cache-dir', f'{folder}/cache']
        yield ['probe', *run, *probe, *places]
        yield ['dense', *run, *dense, '--out', f'{folder}/dense.json']

    one, two = tmp_path / 'one', tmp_path / 'two'
    two.mkdir()
    for command in commands(one):
        assert run_command(*command) is None
    on_two_ranks(_on_rank, list(commands(two)), str(two))

    found = [json.loads((x / 'probe' / 'probe.json').read_text()) for x in (one, two)]
    assert found[0]['also']['some']['images'] == 4
    assert found[0]['also'] == found[1]['also'] and found[0]['few_shot'] == found[1]['few_shot']
    kept = sorted(x.name for x in two.glob('*.kept'))
    assert kept == [f'dense.{x}.kept' for x in ('correspondence', 'position')]
    for name in (*kept, 'dense.json', 'dense.md'):
        assert (two / name).read_text() == (one / name).read_text()
