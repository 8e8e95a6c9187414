import os
import random
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import init_default_scope
from PIL import Image

from ser_mm.models import SERVisionTransformer


@pytest.fixture(autouse=True, scope='session')
def quiet():
    """No log line per initialized parameter, and one thread, the fastest for tiny tensors.

    ``OMP_NUM_THREADS`` asks for more.
    """
    MMLogger.get_current_instance().setLevel('WARNING')
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    os.environ.pop('SER_MM_TRACEBACK', None)  # asks commands for more than their sentence


@pytest.fixture(autouse=True, scope='session')
def heeded_interrupts():
    """A shell lets what it starts in the background ignore SIGINT, and processes of tests with it.

    Commands leave a signal alone that was ignored when they started.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def as_if_no_test_had_been():
    """Take back what an earlier test has left: random states, a Runner's scope and its epoch."""
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    init_default_scope('mmpretrain')
    for name in ('epoch', 'epoch_length'):
        MessageHub.get_current_instance().runtime_info.pop(name, None)


@pytest.fixture
def packed(monkeypatch):
    """b1 and b2 run through a ViT as one sequence, as on a GPU."""
    monkeypatch.setattr(SERVisionTransformer, 'one_pass', True)


@pytest.fixture(scope='session')
def imagenet_tree(tmp_path_factory) -> Path:
    """A small JPEG tree in ImageNet layout: 16 crops of photographs in 4 classes."""
    root = tmp_path_factory.mktemp('imagenet')
    rng = np.random.default_rng(0)
    for label, name in enumerate(('astronaut', 'chelsea', 'coffee', 'rocket')):
        photo = getattr(skimage.data, name)()
        folder = root / 'train' / f'n{label:08d}'
        folder.mkdir(parents=True)
        for i in range(4):
            top, left = (rng.integers(side - 96) for side in photo.shape[:2])
            path = folder / f'{name}_{i}.JPEG'
            Image.fromarray(photo[top : top + 96, left : left + 96]).save(path, quality=90)
    return root
