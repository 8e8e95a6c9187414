# What all configs of detectors need. It is the first that they read, so that missing operators of
# mmcv are named before anything of MMDetection is looked for.
import importlib

importlib.import_module('ser_mm.engine.operators').require_operators('Detection')

custom_imports = dict(imports=['ser_mm', 'ser_mm.engine.detection_hook'])

# COCO annotates images as they are stored; OpenCV would turn those with an EXIF orientation.
read_image = [
    dict(type='LoadImageFromFile', color_type='color_ignore_orientation'),
    dict(type='mmpretrain.CheckImageSize'),
]

hooks = dict(
    checkpoint=dict(type='mmpretrain.AtomicCheckpointHook', max_keep_ckpts=2),
    visualization=dict(type='mmpretrain.DrawDetectionsHook'),
)
