"""Images and options as people write them, through the commands."""

import json
import os

import pytest

from tests.support.command import run_command
from tests.support.images import write_images
from tests.support.paths import ROOT
from tests.support.probed import write_untrained
from tests.support.unprivileged import unprivileged

SHORT = (
    'train_dataloader.batch_size=4',
    'train_dataloader.dataset.pipeline.1.equi_ratio=0.5',
    'train_cfg.max_epochs=1',
)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return write_untrained('demo/ser_mocov3', tmp_path_factory.mktemp('network') / 'epoch 1.pth')


@pytest.fixture
def labelled(tmp_path, monkeypatch):
    """A list of ten images of two classes, and the folder of them."""
    monkeypatch.chdir(tmp_path)
    files = [f'{name}/{i}.JPG' for name in 'ab' for i in range(5)]
    write_images(tmp_path / 'images', *files)
    text = ''.join(f'{file} {int(file > "b")}\n' for file in files)
    (tmp_path / 'images' / 'list.txt').write_text(text)
    return tmp_path / 'images'


def test_pretraining_and_probe_on_a_folder_of_any_name(tmp_path, labelled):
    flat, work = tmp_path / '2012, May', tmp_path / 'a work,dir'
    write_images(flat, *(f'{i} x.PNG' for i in range(8)))
    config = 'demo/ser_mocov3'
    assert run_command('train', config, '--data', flat, '--work-dir', work, '--cfg-options', *SHORT,
                       'custom_hooks.0.type=EpochSeedHook') is None  # fmt: skip
    checkpoint = work / 'epoch_1.pth'
    sources = {'images': ['--data', labelled], 'list': ['--data', labelled / 'list.txt']}
    sources['both'] = ['--data', labelled, '--val-data', labelled / 'list.txt']
    counts = {}
    for name, source in sources.items():
        assert run_command('probe', config, checkpoint, *source, '--epochs', 1, '--k', 1,
                           '--out', name, '--cache-dir', 'cache') is None  # fmt: skip
        results = json.loads((tmp_path / name / 'probe.json').read_text())['results']
        counts[name] = results['linear probe']['images']
    assert counts == dict(images=2, list=2, both=10)


def test_evaluations_that_need_no_split(labelled, checkpoint):
    (labelled / 'bare.txt').write_text('a/1.JPG\nb/2.JPG\n')
    for source in (labelled / 'bare.txt', labelled / 'a'):
        assert run_command('equivariance', 'demo/ser_mocov3', checkpoint, '--data', source,
                           '--transformations', 'rot90') is None  # fmt: skip
    places = ['--data', labelled / 'list.txt', '--cache-dir', 'cache', '--perplexity', '3']
    assert 'needs more than 10 images' in run_command(
        'tsne', 'demo/ser_mocov3', checkpoint, *places
    )


REFUSALS = {
    'no labels': (['--data', 'images/a'], 'images, but no sub-folders of images'),
    'nothing there': (['--data', 'none'], '--data none does not exist'),
    'one class': (['--data', 'nested'], 'has one class, x, and two or more are to be told apart'),
    'counted from 1': (['--data', 'from1.txt'], 'has labels from 1 to 2 and none that is 0'),
    'validation alone': (['--val-data', 'images'], '--val-data needs --data'),
    'out in a file': (['--data', 'images', '--out', 'from1.txt/x'], 'from1.txt is a file'),
    'out is a file': (['--data', 'images', '--out', 'from1.txt'], 'is a file; name a folder'),
}


@pytest.mark.parametrize('name', REFUSALS)
def test_refusals_of_the_probe(name, labelled, tmp_path, checkpoint):
    write_images(tmp_path, 'nested/x/1.png', 'nested/x/y/2.png')
    (tmp_path / 'from1.txt').write_text('images/a/1.JPG 1\nimages/b/1.JPG 2\n')
    args, message = REFUSALS[name]
    found = run_command('probe', 'demo/ser_mocov3', checkpoint, *args)
    assert found.startswith('error: ') and message in found and '\n' not in found


TRAINING = {
    'flat data_root': (
        ['ser_mocov3_vits16', '--cfg-options', 'train_dataloader.dataset.data_root=images'],
        'images/train is not a folder; take the images that are there by --data images',
    ),
    'one image': (
        ['demo/ser_mocov3', '--data', 'one', '--cfg-options', *SHORT],
        'train_dataloader.batch_size = 4, but the 1 images of the data set',
    ),
    'a variable': (
        ['demo/ser_mocov3', '--cfg-options', 'train_pipeline.1.equi_ratio=0.5'],
        'set train_dataloader.dataset.pipeline.1.equi_ratio',
    ),
    'a slip': (['demo/ser_mocov3', '--cfg-options', 'optim_wraper=1'], 'did you mean optim_wrap'),
    'a type that is unknown': (
        ['demo/ser_mocov3', '--cfg-options', 'model.algorithm.backbone.type=SERVisonTransformer'],
        'SERVisonTransformer is not in the mmpretrain::model registry; correct the type',
    ),
    'no epoch': (
        ['demo/ser_mocov3', '--cfg-options', 'train_cfg.max_epochs=0'],
        'train_cfg.max_epochs = 0 must be a whole number of at least 1',
    ),
    'no end of an epoch': (
        ['demo/ser_mocov3', '--cfg-options', 'train_dataloader.sampler.type=InfiniteSampler'],
        "'InfiniteSampler' never ends an epoch, but train_cfg.max_epochs = 8; take a Default",
    ),
    'work dir is a file': (
        ['demo/ser_mocov3', '--data', 'one', '--work-dir', 'one/1.png'],
        '--work-dir one/1.png is a file; name a folder',
    ),
    'annotated': (['coco/mask-rcnn_vits16', '--data', 'one'], '--data is for images without annot'),
}


@pytest.mark.parametrize('name', TRAINING)
def test_refusals_of_training(name, labelled, tmp_path):
    write_images(tmp_path, 'one/1.png')
    args, message = TRAINING[name]
    if name == 'annotated':
        pytest.importorskip('mmcv._ext')
    found = run_command('train', *args)
    assert found.startswith('error: ') and message in found and '\n' not in found


def test_a_folder_in_place_of_a_file(checkpoint, labelled, tmp_path):
    (tmp_path / 'there.json').mkdir()
    args = ['demo/ser_mocov3', checkpoint, '--data', 'images', '--out', 'there.json']
    found = run_command('dense', *args, '--measures', 'angle')
    assert found == 'error: --out there.json is a folder; name a file.'


def test_places_without_permission(checkpoint, labelled, monkeypatch):
    args = ['demo/ser_mocov3', checkpoint, '--data']
    with unprivileged() as folder:
        monkeypatch.chdir(folder)
        write_images(folder, 'open/a/1.png', 'open/b/1.png', 'open/a/2.png', 'closed/1.png')
        (folder / 'network.pth').write_bytes(b'')
        for name in ('closed', 'network.pth'):
            os.chmod(folder / name, 0)
        (folder / 'full').mkdir(mode=0o500)

        def refusal(command, *args):
            found = run_command(command, *args)
            assert found.startswith('error: ') and '\n' not in found
            return found

        data = f'train_dataloader.dataset.data_root={folder}'
        prefix = 'train_dataloader.dataset.data_prefix=closed'
        assert 'closed cannot be read: permission denied' in refusal(
            'train', 'ser_mocov3_vits16', '--cfg-options', data, prefix
        )
        assert 'closed cannot be read: permission denied' in refusal('probe', *args, 'closed')
        assert '--out full/x: ' in refusal('probe', *args, 'open', '--out', 'full/x')
        assert '--cache-dir full: ' in refusal('probe', *args, 'open', '--cache-dir', 'full')
        work = ['demo/ser_mocov3', '--data', 'open', '--work-dir', 'full/work']
        assert '--work-dir full/work: ' in refusal('train', *work)
        unread = refusal('probe', args[0], 'network.pth', '--data', 'open')
        assert 'network.pth: permission denied; change its permissions' in unread


@pytest.mark.slow
@pytest.mark.parametrize('port', ['in use', 'http'])
def test_port_of_a_launcher(port):
    import socket
    import subprocess

    with socket.socket() as other:
        other.bind(('', 0))
        other.listen()
        number = str(other.getsockname()[1])
        run = subprocess.run(
            ['bash', 'tools/dist_train.sh', 'demo/ser_mocov3', '2'],
            cwd=ROOT,
            env=dict(os.environ, PORT=number if port == 'in use' else port),
            text=True,
            capture_output=True,
        )
    assert run.returncode != 0 and len(run.stderr.splitlines()) == 1
    assert ('is in use' if port == 'in use' else 'is not a port') in run.stderr
    assert 'PORT=' in run.stderr
