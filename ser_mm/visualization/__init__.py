from .curves import draw_curves
from .detections import draw_detections
from .losses import draw_losses
from .neighbours import draw_neighbours
from .token_maps import draw_token_maps
from .tsne import draw_tsne
from .views import draw_views, restore_images

__all__ = [
    'draw_curves',
    'draw_detections',
    'draw_losses',
    'draw_neighbours',
    'draw_token_maps',
    'draw_tsne',
    'draw_views',
    'restore_images',
]
