default_scope = 'mmpretrain'
custom_imports = dict(imports=['ser_mm'])

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=3),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
custom_hooks = [
    dict(type='EpochSeedHook'),
    dict(type='NonFiniteLossHook', interval=50),
    dict(type='EquivariantSplitHook'),
    dict(type='MomentumUpdateHook'),
    dict(type='ResumeHook'),
]

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
# BatchNorm statistics are those of all GPUs; a run on one process or on CPUs keeps its own.
sync_bn = 'torch'
randomness = dict(seed=0)

vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='UniversalVisualizer', vis_backends=vis_backends)
log_processor = dict(window_size=50)
log_level = 'INFO'
load_from = None
resume = False
