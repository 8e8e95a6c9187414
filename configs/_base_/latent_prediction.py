# Heads of the algorithms that predict one view's projection from the other's.
cosine = dict(type='CosineSimilarityLoss')
# BYOL takes the predictor of the algorithm whose config it starts from.
byol_head = dict(_delete_=True, type='LatentPredictHead', loss=cosine)
simsiam_neck = dict(hid_channels=2048, out_channels=2048, num_layers=3)
simsiam_head = dict(
    type='LatentPredictHead',
    predictor=dict(
        type='NonLinearNeck',
        in_channels=2048,
        hid_channels=512,
        out_channels=2048,
        with_avg_pool=False,
        with_last_bn=False,
        with_last_bias=True,
        norm_cfg=dict(type='BN1d'),
    ),
    loss=cosine,
)
