"""A few steps of a tiny model by MMEngine's Runner, on a small JPEG tree."""

import copy

from mmengine.config import Config
from mmengine.dist import is_distributed
from mmengine.hooks import Hook
from mmengine.runner import Runner

from tests.support.algorithms import ALGORITHMS, IMAGE, PIXELS

CROP = dict(type='RandomResizedCrop', scale=IMAGE, crop_ratio_range=(0.3, 1.0))
JITTER = dict(type='ColorJitter', brightness=0.4, contrast=0.4)
FLIP = dict(type='RandomFlip', prob=0.5)
VIEWS = [[CROP, JITTER, FLIP], [CROP, FLIP]]
DDP = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
MULTI_VIEW = dict(type='MultiView', num_views=[1, 1], transforms=VIEWS)


def equivariant_views(equi_ratio):
    return dict(
        type='EquivariantViewPipeline',
        equi_ratio=equi_ratio,
        views=VIEWS,
        equi_crop=[CROP],
        equi_views=[[JITTER], []],
    )


# The same crop by the filter that the device has, and views that the model makes.
DEVICE_CROP = dict(CROP, backend='pillow')
DEVICE_VIEWS = [[DEVICE_CROP, JITTER, FLIP], [DEVICE_CROP, FLIP]]


def on_device(config, equi_ratio, views=DEVICE_VIEWS):
    """An algorithm whose preprocessor makes the views."""
    config = copy.deepcopy(config)
    config['data_preprocessor'].update(views=views, equi_ratio=equi_ratio)
    return config


def without_ser(config):
    """The wrapped algorithm alone, on the same backbone: [CLS] stays where it was."""
    algorithm = copy.deepcopy(config['algorithm'])
    ser_layer = algorithm['backbone'].pop('ser_layer')
    if algorithm['backbone']['type'] == 'SERVisionTransformer':
        algorithm['backbone'].setdefault('cls_layer', ser_layer)
    return dict(algorithm, data_preprocessor=dict(type='SelfSupDataPreprocessor', **PIXELS))


class Record(Hook):
    """All parameters and buffers after initialization and after every step."""

    def before_train(self, runner):
        self.states = [copy.deepcopy(runner.model.state_dict())]

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.states.append(copy.deepcopy(runner.model.state_dict()))


def run(
    model,
    views,
    root,
    work_dir,
    epochs=2,
    resume_from=None,
    hooks=(),
    cfg=None,
    checkpoint=None,
    optim=None,
    loop=None,
    log_level='WARNING',
    schedules=None,
    batch_size=4,
    load_from=None,
):
    """Train on ``root``; returns the runner and the states that it went through.

    With ``views=None`` the model makes them of the images, which are of one size.
    """
    record = Record()
    made = [] if views is None else [views]
    pipeline = [dict(type='LoadImageFromFile'), *made, dict(type='PackInputs')]
    runner = Runner(
        copy.deepcopy(model),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=batch_size,
            num_workers=0,
            sampler=dict(type='InfiniteSampler' if loop else 'DefaultSampler', shuffle=True),
            collate_fn=dict(type='default_collate'),
            dataset=dict(
                type='CustomDataset', data_root=str(root), data_prefix='train', pipeline=pipeline
            ),
        ),
        train_cfg=loop or dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.1), **(optim or {})
        ),
        param_scheduler=schedules or dict(type='LinearLR', start_factor=0.1, end=4, by_epoch=False),
        default_scope='mmpretrain',
        default_hooks=dict(checkpoint=checkpoint or dict(type='CheckpointHook', interval=1)),
        load_from=str(resume_from or load_from or '') or None,
        resume=resume_from is not None,
        custom_hooks=[
            dict(type='EpochSeedHook'),
            dict(type='EquivariantSplitHook'),
            dict(type='ResumeHook'),
            record,
            *hooks,
        ],
        randomness=dict(seed=3),
        log_level=log_level,
        launcher='pytorch' if is_distributed() else 'none',
        cfg={**(cfg or {}), **(dict(model_wrapper_cfg=DDP) if is_distributed() else {})} or None,
        experiment_name=str(work_dir).replace('/', '_'),
    )
    runner.train()
    return runner, record.states


def write_config(file, root, max_epochs=100000):
    """A config of a tiny model on ``root``, for ``ser-mm train``; 16 images are 4 steps."""
    pipeline = [dict(type='LoadImageFromFile'), equivariant_views(0.5), dict(type='PackInputs')]
    dataset = dict(type='CustomDataset', data_root=str(root), data_prefix='train')
    checkpoint = dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=2)
    content = dict(
        default_scope='mmpretrain',
        custom_imports=dict(imports=['ser_mm']),
        model=ALGORITHMS['simsiam'],
        train_dataloader=dict(
            batch_size=4,
            num_workers=2,
            sampler=dict(type='DefaultSampler', shuffle=True),
            dataset=dict(dataset, pipeline=pipeline),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=max_epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1), checkpoint=checkpoint),
        custom_hooks=[dict(type='EpochSeedHook')],
        randomness=dict(seed=0),
    )
    Config(content).dump(file)
    return file
