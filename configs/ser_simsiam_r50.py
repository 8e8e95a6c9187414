# SimSiam + SER, ResNet-50, with the schedule of MoCo v3: a start, not a tuned recipe.
_base_ = ['ser_mocov3_r50.py']

algorithm = _base_.algorithm
model = dict(
    algorithm=dict(
        _delete_=True,
        type='SimSiam',
        backbone=algorithm.backbone,
        neck=dict(algorithm.neck, hid_channels=2048, out_channels=2048, num_layers=3),
        head=dict(
            type='LatentPredictHead',
            predictor=dict(
                type='NonLinearNeck',
                in_channels=2048,
                hid_channels=512,
                out_channels=2048,
                with_avg_pool=False,
                with_last_bn=False,
                with_last_bias=True,
                norm_cfg=_base_.norm_cfg,
            ),
            loss=dict(type='CosineSimilarityLoss'),
        ),
    )
)
