from .equivariance import equivariance_score
from .features import extract_features
from .probe import knn_probe, linear_probe

__all__ = ['equivariance_score', 'extract_features', 'knn_probe', 'linear_probe']
