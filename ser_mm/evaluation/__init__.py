from .equivariance import equivariance_score
from .features import Embedder, extract_features, load_features
from .networks import build_backbone, build_loader
from .probe import (
    accuracy,
    fit_linear_heads,
    knn_probe,
    knn_votes,
    linear_probe,
    select_linear_head,
)

__all__ = [
    'Embedder',
    'accuracy',
    'build_backbone',
    'build_loader',
    'equivariance_score',
    'extract_features',
    'fit_linear_heads',
    'knn_probe',
    'knn_votes',
    'linear_probe',
    'load_features',
    'select_linear_head',
]
