# BYOL + SER, ViT-S/16, with the projector, predictor and schedule of MoCo v3: a start, not a
# tuned recipe.
_base_ = ['ser_mocov3_vits16.py']

model = dict(
    algorithm=dict(
        type='BYOL',
        head=dict(
            _delete_=True,
            type='LatentPredictHead',
            predictor=_base_.algorithm.head.predictor,
            loss=dict(type='CosineSimilarityLoss'),
        ),
    )
)
