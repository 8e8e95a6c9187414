"""The host never waits for the device in a step of one rank.

A step runs on the meta device: every operator but no value, so that whatever has to see one, to
branch on it or to know a shape, is an error. The batch and the host's own tensors are on the CPU.
"""

import contextlib
import copy

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import short_run
from tests.support.algorithms import ALGORITHMS, build

RECORD = torch.tensor([[-1, -1], [1, 2], [-1, -1], [0, 7], [3, 3], [-1, -1], [-1, -1], [-1, -1]])


class CopiesWaitedFor(TorchDispatchMode):
    """Shapes of the tensors that went to the device while the host stood by."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name == 'aten::_to_copy':
            target = torch.device(kwargs.get('device') or args[0].device).type
            if target != args[0].device.type and not kwargs.get('non_blocking'):
                self.shapes.append(tuple(args[0].shape))
        return func(*args, **kwargs)


def step_on_meta(config, monkeypatch):
    """A training step; the copies to the device that were waited for."""
    # Autocast knows no meta device; SERHead turns it off, which changes no operator here.
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: contextlib.nullcontext())
    model = build(copy.deepcopy(config)).to('meta').train()
    optimizer = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
    optim_wrapper = build_optim_wrapper(model, optimizer)
    views = [torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8) for _ in range(2)]
    inputs = [*views, RECORD] if config['type'] == 'SERAlgorithm' else views
    if getattr(model.data_preprocessor, 'views', None):
        inputs = views[0]
    with CopiesWaitedFor() as copies:
        for _ in range(2):  # the second one moves the momentum branch
            copies.shapes.clear()
            model.train_step(dict(inputs=inputs, data_samples=None), optim_wrapper)
    return copies.shapes


@pytest.mark.parametrize('name', ALGORITHMS)
def test_a_step_never_waits_for_the_device(name, monkeypatch):
    # MMPretrain's MoCoV3Head makes its labels, one per image, on the host, for each view.
    labels = [(8,)] * 2 if name.startswith('mocov3') else []
    assert step_on_meta(ALGORITHMS[name], monkeypatch) == labels


def test_the_meta_device_does_notice(monkeypatch):
    """MMPretrain's own momentum update reads its step from the device."""
    with pytest.raises(RuntimeError, match='item'):
        step_on_meta(short_run.without_ser(ALGORITHMS['byol']), monkeypatch)
    x = torch.zeros(3, device='meta')
    for read in (torch.nonzero, lambda x: x[x > 0], torch.Tensor.tolist, torch.Tensor.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(x)


JITTER = dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
PHOTOMETRY = [
    dict(type='RandomApply', transforms=[JITTER], prob=0.8),
    dict(type='RandomGrayscale', prob=0.5, keep_channels=True),
    dict(type='GaussianBlur', magnitude_range=(0.1, 2.0), magnitude_std='inf', prob=0.5),
    dict(type='Solarize', thr=128, prob=0.5),
]


def test_photometry_on_the_device_does_not_wait_either(monkeypatch):
    config = copy.deepcopy(ALGORITHMS['byol'])
    config['data_preprocessor'].update(photometry=[PHOTOMETRY, PHOTOMETRY])
    assert step_on_meta(config, monkeypatch) == []


def test_whole_views_on_the_device_do_not_wait_either(monkeypatch):
    config = copy.deepcopy(ALGORITHMS['byol'])
    crop = dict(type='RandomResizedCrop', scale=32, backend='pillow', interpolation='bicubic')
    views = [[dict(crop), *PHOTOMETRY, dict(type='RandomFlip', prob=0.5)]] * 2
    config['data_preprocessor'].update(views=views, equi_ratio=0.5)
    assert step_on_meta(config, monkeypatch) == []
