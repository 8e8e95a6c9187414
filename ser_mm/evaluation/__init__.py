from .equivariance import equivariance_score
from .features import extract_features
from .networks import build_backbone, build_loader
from .probe import knn_probe, linear_probe

__all__ = [
    'build_backbone',
    'build_loader',
    'equivariance_score',
    'extract_features',
    'knn_probe',
    'linear_probe',
]
