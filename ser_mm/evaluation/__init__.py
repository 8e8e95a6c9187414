from .backbone import build_backbone, token_maps_of
from .data import build_loader
from .equivariance import equivariance_by_layer, equivariance_score
from .equivariance_hook import EquivarianceHook
from .features import Embedder, extract_features, load_features
from .frozen_classifier import FrozenClassifier
from .knn import knn_probe, knn_votes
from .linear import fit_linear_heads, linear_probe, select_linear_head
from .metrics import accuracy
from .probe_hook import ProbeHook

__all__ = [
    'Embedder',
    'EquivarianceHook',
    'FrozenClassifier',
    'ProbeHook',
    'accuracy',
    'build_backbone',
    'build_loader',
    'equivariance_by_layer',
    'equivariance_score',
    'extract_features',
    'fit_linear_heads',
    'knn_probe',
    'knn_votes',
    'linear_probe',
    'load_features',
    'select_linear_head',
    'token_maps_of',
]
