# What all configs of detectors need. It is the first that they read, so that missing operators of
# mmcv are named before anything of MMDetection is looked for.
import importlib

importlib.import_module('ser_mm.engine.operators').require_operators('Detection')

custom_imports = dict(imports=['ser_mm'])
