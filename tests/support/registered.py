"""Our registered classes, the smallest arguments that build them, and what one does with them."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import mmengine.registry
import numpy as np
import torch
from mmengine.logging import MessageHub
from mmengine.registry import Registry
from mmengine.visualization import Visualizer
from torch import nn

import ser_mm
from ser_mm.draws import NUM_DRAWS
from tests.support import algorithms, short_run
from tests.support.small_images import write_stl10
from tests.support.tiny_imagenet import write_tiny_imagenet


def registered() -> dict[str, type]:
    """Every class of ours that a config can name, as the registries know it."""
    for module in pkgutil.walk_packages(ser_mm.__path__, 'ser_mm.'):
        try:
            importlib.import_module(module.name)
        except ImportError:  # of what an extra installs, such as MMDetection
            continue
    found = {}
    rest = [x for x in vars(mmengine.registry).values() if isinstance(x, Registry)]
    while rest:
        registry = rest.pop()
        rest += registry.children.values()
        for kind in registry.module_dict.values():
            if isinstance(kind, type) and kind.__module__.startswith('ser_mm.'):
                found[kind.__name__] = kind
    return dict(sorted(found.items()))


class Row(NamedTuple):
    """Arguments that build a class, and a use of what they build."""

    arguments: dict[str, Any]
    use: Callable[[Any], Any] = lambda built: None


def typeless(config: dict) -> dict:
    return {key: value for key, value in config.items() if key != 'type'}


def preprocess(preprocessor):
    size = 2 * preprocessor.patch_size
    views = [torch.zeros(3, 3, size, size, dtype=torch.uint8) for _ in range(2)]
    record = torch.tensor([[-1, -1], [2, 5], [0, 1]])
    return preprocessor(dict(inputs=[*views, record]), training=True)


def views_of(pipeline):
    pipeline.in_b2 = True
    image = np.zeros((40, 40, 3), np.uint8)
    return pipeline(dict(img=image, img_shape=(40, 40)))


def ser_loss(head):
    maps = [torch.randn(2, 4, 3, 2), torch.randn(2, 4, 2, 2)]
    return head.loss(maps, maps)


def dino_loss(head):
    return head.loss(*torch.randn(2, 2, 3, len(head.center)))


def objective(head):
    features = list(torch.randn(2, 4, head.in_channels))
    extra = [torch.randn(8, head.in_channels)]
    if type(head).__name__ == 'EquiModHead':
        extra = [features[0]]
    return head.loss(features, list(torch.rand(2, 4, NUM_DRAWS)), extra, features)


def average(ema):
    MessageHub.get_current_instance().update_info('max_iters', 10)
    for _ in range(3):
        ema.update_parameters(nn.Linear(2, 2))


def local_crops(algorithm):
    MessageHub.get_current_instance().update_info('max_iters', 10)
    views = torch.randn(2, 4, 3, algorithms.IMAGE, algorithms.IMAGE)
    return algorithm.loss([*views, torch.randn(4, 3, 16, 16)])


def two_losses(model):
    return model.loss(algorithms.two_views(), [None] * 9)


def rows(folder: Path) -> dict[str, Row]:
    """One for each class; ``folder`` is for what some of them read."""
    Visualizer.get_instance('rows')  # of which DrawDetectionsHook asks for one
    image = np.zeros((32, 32, 3), np.uint8)
    path = folder / 'class' / 'image.png'
    path.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(path), image)
    video = cv2.VideoWriter(
        str(path.with_suffix('.mp4')), cv2.VideoWriter_fourcc(*'mp4v'), 1, (32, 32)
    )
    for _ in range(2):
        video.write(image)
    video.release()

    simsiam = algorithms.simsiam(algorithms.BACKBONE, algorithms.mlp(algorithms.EMBED_DIMS))
    dino = algorithms.dino(algorithms.BACKBONE, algorithms.mlp(algorithms.EMBED_DIMS))
    images = torch.zeros(2, 3, algorithms.IMAGE, algorithms.IMAGE)
    mocov3 = algorithms.mocov3(algorithms.BACKBONE, algorithms.mlp(algorithms.EMBED_DIMS))
    rotation = dict(type='RotationHead')
    return dict(
        AtomicCheckpointHook=Row({}),
        AugSelfHead=Row(dict(in_channels=4, hid_channels=5), objective),
        BundledPhotos=Row(dict(lazy_init=True)),
        CachedImages=Row(
            dict(
                dataset=dict(
                    type='ImageSource',
                    data_root=str(folder),
                    extensions=('.png',),
                    pipeline=[dict(type='LoadReadableImage')],
                ),
                lazy_init=True,  # nothing is written
            ),
        ),
        CheckImageSize=Row({}),
        CompileHook=Row({}),
        Corrupt=Row(
            dict(corruption='contrast', severity=1),
            lambda built: built(dict(img=image, img_path='x')),
        ),
        CPUAmpOptimWrapper=Row(dict(optimizer=torch.optim.SGD([nn.Parameter(images)], lr=0.1))),
        CrossCorrelationHead=Row(
            dict(in_channels=5, loss=dict(type='CrossCorrelationLoss')),
            lambda built: built.loss(*torch.randn(2, 4, built.bn.num_features)),
        ),
        DINO=Row(typeless(dino), lambda built: built.loss(list(torch.randn(2, *images.shape)))),
        DINOHead=Row(dict(out_channels=8), dino_loss),
        DINONeck=Row(
            dict(in_channels=6, hid_channels=8, bottleneck_channels=4, out_channels=7),
            lambda built: built((torch.zeros(2, built.mlp[0].in_features),)),
        ),
        DrawDetectionsHook=Row({}),
        EpochSeedHook=Row({}),
        EquiModHead=Row(dict(in_channels=4, hid_channels=5, out_channels=3), objective),
        EquivarianceAlgorithm=Row(
            dict(algorithm=simsiam, head=rotation),
            lambda built: built.loss([*algorithms.two_views(4, 0), images], [None] * 4),
        ),
        EquivarianceHook=Row({}),
        ProbeHook=Row({}),
        EquivariantSplitHook=Row({}),
        EquivariantViewPipeline=Row(typeless(short_run.equivariant_views(0.5)), views_of),
        ForeachCosineEMA=Row(dict(model=nn.Linear(2, 2)), average),
        FastColorJitter=Row({}, lambda built: built(dict(img=image))),
        FastGaussianBlur=Row(dict(radius=1.0), lambda built: built(dict(img=image))),
        FastMultiView=Row(
            dict(transforms=[[dict(type='FastRandomResizedCrop', scale=8)]], num_views=[2]),
            lambda built: built(dict(img=image)),
        ),
        FastPackInputs=Row({}, lambda built: built(dict(img=image))),
        FastRandomFlip=Row(dict(prob=0.5), lambda built: built(dict(img=image))),
        FastRandomGrayscale=Row({}, lambda built: built(dict(img=image))),
        FastRandomResizedCrop=Row(dict(scale=8), lambda built: built(dict(img=image))),
        FastResizeEdge=Row(dict(scale=8), lambda built: built(dict(img=image))),
        FastSolarize=Row(dict(thr=128), lambda built: built(dict(img=image))),
        FreezeLayerHook=Row(dict(layer='neck')),
        FrozenClassifier=Row(
            dict(
                backbone=algorithms.BACKBONE,
                head=dict(type='LinearClsHead', num_classes=2, in_channels=algorithms.EMBED_DIMS),
            ),
            lambda built: built.extract_feat(images),
        ),
        ImageSource=Row(dict(data_root=str(folder), serialize_data=False)),
        LoadChannels=Row(
            dict(channels=3, dtype='uint8', mean=[0.5] * 3, std=[0.25] * 3),
            lambda built: built(dict(img_path=str(path))),
        ),
        LoadReadableImage=Row({}, lambda built: built(dict(img_path=str(path)))),
        MomentumUpdateHook=Row({}),
        MoveByD4=Row({}, lambda built: built(dict(img=image, sample_idx=0))),
        MultiCropMoCoV3=Row(typeless(mocov3), local_crops),
        NonFiniteLossHook=Row({}),
        ResumeHook=Row({}),
        RotationHead=Row(dict(in_channels=4, hid_channels=5), objective),
        SERAlgorithm=Row(dict(algorithm=simsiam), two_losses),
        SERDataPreprocessor=Row(dict(patch_size=8, **algorithms.PIXELS), preprocess),
        SERHead=Row({}, ser_loss),
        SERNeck=Row(
            dict(in_channels=4, hid_channels=6, out_channels=5),
            lambda built: built([torch.zeros(1, built.in_channels, 2, 3)]),
        ),
        SERResNet=Row(typeless(algorithms.RESNET), lambda built: built(images)),
        SERTimmStages=Row(
            dict(model='resnet10t', model_args=dict(channels=(8, 8, 8, 8))),
            lambda built: built(images),
        ),
        SERTimmViT=Row(
            dict(
                model='vit_tiny_patch16_224',
                model_args=dict(img_size=algorithms.IMAGE, embed_dim=6, depth=2),
            ),
            lambda built: built(images),
        ),
        SERVisionTransformer=Row(typeless(algorithms.BACKBONE), lambda built: built(images)),
        STLHead=Row(
            dict(in_channels=4, code_channels=2, hid_channels=5, out_channels=3), objective
        ),
        STL10=Row(dict(data_root=str(write_stl10(folder / 'stl10')))),
        SequenceFolder=Row(
            dict(data_root=str(folder), data_prefix='', serialize_data=False),
            lambda built: built.get_data_info(0),
        ),
        SimpleFPN=Row(
            dict(in_channels=8, out_channels=6),
            lambda built: built((torch.zeros(1, 8, 4, 4),)),
        ),
        TinyImageNet=Row(dict(data_root=str(write_tiny_imagenet(folder / 'tiny', 1, 2)))),
    )


def parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Of the constructor; those that go on to a base class by ``**kwargs`` included."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if '__init__' not in vars(base) or base is object:
            continue
        own = list(inspect.signature(vars(base)['__init__']).parameters.values())[1:]
        named = [p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for parameter in named:
            found.setdefault(parameter.name, parameter)
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return found
