"""No entry point runs code from a checkpoint: each way to hand one in, with a file that would."""

import argparse
import functools
import os
import pathlib
import pickle
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer

from ser_mm import checkpoint
from ser_mm.cli import main as command_line
from tests.support.images import write_images
from tests.support.own_boxes import write_own_boxes
from tests.support.paths import ROOT
from tests.support.tiny_imagenet import write_tiny_imagenet

DEMO = 'demo/ser_mocov3'
TINY = [
    'train_cfg.max_epochs=1',
    'train_dataloader.batch_size=16',
    'train_dataloader.dataset.train_per_picture=2',
    'train_dataloader.dataset.val_per_picture=2',
    'evaluation.train.train_per_picture=2',
    'evaluation.train.val_per_picture=2',
    'evaluation.val.train_per_picture=2',
    'evaluation.val.val_per_picture=2',
]


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A folder to work in, with a checkpoint that makes another folder when code in it runs."""
    monkeypatch.chdir(tmp_path)
    weights = dict(state_dict={'backbone.cls_token': torch.zeros(1)}, meta=dict(epoch=1, iter=1))
    torch.save(dict(weights, extra=Harm(tmp_path / 'harm')), tmp_path / 'bad.pth')
    return tmp_path / 'bad.pth'


def train(*arguments, options=()):
    return ['train', DEMO, '--work-dir', 'run', *arguments, '--cfg-options', *TINY, *options]


def plant_run(path, folder='run'):
    """A folder of a run whose newest checkpoint is the planted one."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    path.rename(Path(folder, 'epoch_1.pth'))
    Path(folder, 'last_checkpoint').write_text(str(Path(folder, 'epoch_1.pth').resolve()))


def plant_demo(path):
    """Runs of the demo that are finished, as it seems."""
    for arm in ('baseline', 'views_only', 'SER'):
        folder = Path(f'pretrained/mocov3/seed0/{arm}')
        name = 'mocov3' if arm == 'baseline' else 'ser_mocov3'
        cfg = Config.fromfile(ROOT / f'configs/demo/{name}.py')
        cfg.train_cfg.max_epochs = 1
        folder.mkdir(parents=True)
        folder.with_suffix('.py').write_text(cfg.pretty_text)
        (folder / 'epoch_1.pth').write_bytes(path.read_bytes())
        (folder / 'last_checkpoint').write_text(str((folder / 'epoch_1.pth').resolve()))


def plant_comparison(path):
    """A run of a comparison that is finished, as it seems."""
    write_tiny_imagenet(Path('tiny'))
    plant_run(path, 'runs/mocov3_tiny_imagenet_short/seed0/SER')


def plant_images(path):
    write_images(path.parent, 'images/a.png')


def plant_boxes(path):
    write_own_boxes(path.parent / 'own')


def backbone_option(place):
    return [f'{place}.init_cfg.type=Pretrained', f'{place}.init_cfg.checkpoint=bad.pth']


# Entry points by name: what is laid out, and the command line.
ENTRIES = {
    'train --resume FILE': (None, train('--resume', 'bad.pth')),
    'train --resume': (plant_run, train('--resume')),
    'load_from': (None, train(options=['load_from=bad.pth'])),
    'init_cfg of the backbone': (
        None,
        train(options=backbone_option('model.algorithm.backbone')),
    ),
    'init_cfg of the algorithm': (None, train(options=backbone_option('model.algorithm'))),
    'pretrained of the algorithm': (None, train(options=['model.algorithm.pretrained=bad.pth'])),
    'init_cfg of SERNeck': (None, train(options=backbone_option('model.neck'))),
    'init_cfg of SERAlgorithm': (None, train(options=backbone_option('model'))),
    'test': (
        None,
        ['test', 'mmpretrain', 'bad.pth'],  # its config is written below
    ),
    'probe': (None, ['probe', DEMO, 'bad.pth', '--cfg-options', *TINY]),
    'robustness': (None, ['robustness', DEMO, 'bad.pth', '--cfg-options', *TINY]),
    'equivariance': (
        None,
        ['equivariance', DEMO, 'bad.pth', '--images', '4', '--transformations', 'rot90'],
    ),
    'dense': (None, ['dense', DEMO, 'bad.pth', '--images', '4', '--cfg-options', *TINY]),
    'tsne': (None, ['tsne', DEMO, 'bad.pth', '--perplexity', '2', '--cfg-options', *TINY]),
    'embed': (plant_images, ['embed', DEMO, 'bad.pth', '--data', 'images', '--out', 'x.npy']),
    'export': (None, ['export', DEMO, 'bad.pth', 'out']),
    'export to ONNX': (None, ['export', DEMO, 'bad.pth', 'out.onnx', '--to', 'onnx']),
    'pretrain': (
        plant_images,
        ['pretrain', '--data', 'images', '--out', 'out', '--weights', 'bad.pth'],
    ),
    'compare': (
        plant_comparison,
        ['compare', '--arms', 'ser', '--seeds', '0', '--measures', 'accuracy']
        + ['--work-dir', 'runs', '--cfg-options', 'train_cfg.max_epochs=1']
        + [f'evaluation.{split}.data_root=tiny' for split in ('train', 'val')],
    ),
    'detect': (
        plant_boxes,
        ['detect', 'faster-rcnn_tiny', '--backbones', 'bad=bad.pth', '--images', 'own/photos']
        + ['--train', 'own/train.json', '--val', 'own/val.json'],
    ),
    'demo-detection': (plant_demo, ['demo-detection', '--pretrained', 'pretrained']),
}
SLOW = {'demo-detection'}


@pytest.mark.parametrize(
    'name', [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in ENTRIES]
)
def test_code_in_a_checkpoint_does_not_run(name, planted, capsys):
    layout, argv = ENTRIES[name]
    if layout:
        layout(planted)
    if name == 'test':
        Path('classifier.py').write_text(
            "_base_ = ['mmpretrain::resnet/resnet18_8xb16_cifar10.py']\n"
            "test_dataloader = dict(dataset=dict(_delete_=True, type='BundledPhotos', "
            "train_per_picture=2, val_per_picture=2, pipeline=[dict(type='LoadImageFromFile'), "
            "dict(type='PackInputs')]))\n"
        )
        argv = ['test', 'classifier.py', 'bad.pth']
    with pytest.raises(SystemExit) as end:
        command_line.main(argv)
    assert not Path('harm').exists()
    assert end.value.code not in (0, None)
    message = str(end.value) + capsys.readouterr().out
    assert 'holds more than data' in message and '.pth' in message and 'mkdir' in message


def test_code_from_a_url_does_not_run(planted, monkeypatch):
    """MMEngine reads these files by loaders of its own."""
    monkeypatch.setenv('TORCH_HOME', 'downloads')
    monkeypatch.setenv('no_proxy', '*')
    handler = functools.partial(SimpleHTTPRequestHandler, directory=planted.parent)
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/bad.pth'
        with pytest.raises(SystemExit, match=f'^error: {url} holds more than data.*mkdir'):
            command_line.main(train(options=[f'load_from={url}']))
        server.shutdown()
    assert not Path('harm').exists()


BAD_FILES = {
    'cut off': (None, 'cannot be read as a checkpoint'),
    'text': (b'hello\n', 'cannot be read as a checkpoint'),
    'pickle': (pickle.dumps(dict(state_dict={}), 4), r'\(Unsupported operand'),
}


@pytest.mark.parametrize('content', BAD_FILES)
def test_what_is_no_checkpoint_is_one_sentence(content, planted):
    data, message = BAD_FILES[content]
    planted.write_bytes(planted.read_bytes()[:300] if data is None else data)
    with pytest.raises(SystemExit, match=rf'^error: bad\.pth .*{message}'):
        command_line.main(train(options=['load_from=bad.pth']))


@pytest.mark.parametrize('argument', ['init_cfg', '--resume'])
def test_weights_of_another_kind_are_one_sentence(argument, planted):
    torch.save(dict(state_dict={'a.weight': torch.zeros(1)}), planted)
    options = backbone_option('model.algorithm.backbone') if argument == 'init_cfg' else ()
    message = 'does not fit' if options else 'has no message_hub, meta, which a run needs'
    with pytest.raises(SystemExit, match=rf'^error: bad\.pth .*{message}'):
        command_line.main(train(*() if options else ('--resume', 'bad.pth'), options=options))


class Asks:
    """Unpickled as the call of a function, which may be one that checkpoints ask for."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def harm():
    return Harm(Path('harm'))


WEIGHTS = dict(weight=torch.zeros(1))

# Where code may hide in the checkpoints of others, whose options and paths are read as data.
DISGUISES = {
    'the options of DINO and MAE': lambda: dict(args=argparse.Namespace(lr=1, out=harm())),
    'an option that is a class': lambda: dict(args=argparse.Namespace(type=argparse.FileType('w'))),
    'options that are called': lambda: dict(args=Asks(argparse.Namespace, harm())),
    'the name of a method of a path': lambda: dict(args=Asks(getattr, pathlib.Path, 'mkdir')),
    'a path that is made': lambda: dict(args=Asks(pathlib.Path.mkdir, Path('harm'))),
    'a path out of a method': lambda: dict(args=Asks(Path.cwd)),
    'hyperparameters of Lightning': lambda: dict(hyper_parameters=dict(model=harm())),
    'callbacks of Lightning': lambda: dict(callbacks={'ModelCheckpoint': harm()}),
    'the state dict of DDP': lambda: {'module.weight': harm()},
    'the optimizer': lambda: dict(optimizer=dict(state={0: harm()})),
    'a whole network': lambda: dict(model=torch.nn.Linear(1, 1)),
    'a method of a history': lambda: dict(args=Asks(getattr, HistoryBuffer, 'register_statistics')),
    'a method of a history that is called': lambda: dict(args=Asks(HistoryBuffer.mean, harm())),
    'eval': lambda: dict(args=Asks(eval, "__import__('os').mkdir('harm')")),
}


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('name', DISGUISES)
def test_code_in_a_foreign_checkpoint_does_not_run(name, legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = dict(DISGUISES[name](), state_dict=WEIGHTS)
    torch.save(content, 'bad.pth', _use_new_zipfile_serialization=not legacy)
    with pytest.raises(pickle.UnpicklingError, match=r'bad\.pth holds more than data'):
        checkpoint.read_weights('bad.pth')
    assert not Path('harm').exists()


@pytest.mark.parametrize('guarded', [False, True])
def test_a_program_is_refused_and_not_run(guarded, tmp_path, monkeypatch):
    """torch 2.5 runs TorchScript whatever it is asked for; the later ones refuse it themselves."""
    monkeypatch.setattr(checkpoint, '_RUNS_PROGRAMS', True)
    monkeypatch.setattr(torch.jit, 'load', lambda *_, **__: pytest.fail('it was run'))
    file = str(tmp_path / 'bad.pth')
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), file)
    if guarded:
        with checkpoint.guarded_checkpoints(), pytest.raises(RuntimeError, match='TorchScript'):
            torch.load(file, weights_only=True)
    else:
        with pytest.raises(pickle.UnpicklingError, match=r'bad\.pth holds more .* a TorchScript'):
            checkpoint.read_weights(file)


def test_it_would_have_run(planted):
    torch.load(planted, weights_only=False)
    assert Path('harm').is_dir()


def test_trust_is_a_way_round(planted):
    """The folder appears; that the file is not a checkpoint of this run stops the command later."""
    with pytest.raises((SystemExit, Exception)):
        command_line.main(train('--resume', 'bad.pth', '--trust-checkpoint'))
    assert Path('harm').is_dir()


def test_every_command_is_in_the_table():
    """A command that is added has to say how it takes checkpoints."""
    named = {argv[0] for _, argv in ENTRIES.values()}
    without_checkpoint = {'boxes', 'cost'}
    through_train = {'ablate', 'demo'}  # their runs are `train --resume`
    assert named | without_checkpoint | through_train == set(command_line.COMMANDS)


def test_afterwards_everything_is_as_before(planted):
    before = dict(os.environ)
    with pytest.raises(SystemExit):
        command_line.main(ENTRIES['train --resume FILE'][1])
    left = dict(LOCAL_RANK='0', ONEDNN_PRIMITIVE_CACHE_CAPACITY='64', LRU_CACHE_CAPACITY='64')
    assert dict(os.environ) == left | before
    torch.load(planted, weights_only=False)
    assert Path('harm').is_dir()
