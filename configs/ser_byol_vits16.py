# BYOL + SER, ViT-S/16, with the projector, predictor and schedule of MoCo v3: a start, not a
# tuned recipe.
_base_ = ['ser_mocov3_vits16.py', '_base_/latent_prediction.py']

predictor = _base_.algorithm.head.predictor
model = dict(algorithm=dict(type='BYOL', head=dict(**_base_.byol_head, predictor=predictor)))
