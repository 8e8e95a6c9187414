import inspect
import warnings
from collections.abc import Callable

import torch
from mmengine import dist
from mmengine.model import BaseModel
from mmpretrain.models import ResNet, SelfSupDataPreprocessor
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from ser_mm import geometry
from ser_mm.arguments import InitCfg, ModuleCfg, NaturalFloat, checked
from ser_mm.models.contract import seen_views, try_projector, try_views
from ser_mm.models.data_preprocessor import SERDataPreprocessor
from ser_mm.models.foreach_ema import use_foreach_update
from ser_mm.views import ViewBatch

_PIXELS = {'mean', 'std', 'to_rgb'}


@MODELS.register_module()
@checked
class SERAlgorithm(BaseModel):
    """Soft Equivariance Regularization around a two-view SSL algorithm (arXiv 2603.06693).

    The wrapped algorithm computes its own loss, unchanged, from two containers that hold b1 and b2
    in place of its two views. SER adds, for b2, a loss on an intermediate token map: the map of
    one view, moved by the group element that relates the views, is to match the map of the other.

    What the wrapped algorithm has to provide:

    - ``backbone``, its online branch, which accepts a :class:`~ser_mm.views.ViewBatch`, returns a
      tuple whose last entry holds the embeddings of b1, then of b2, leaves the token map of b2 in
      ``ViewBatch.token_maps`` and tells ``token_map_channels`` and ``token_map_stride``, as
      :class:`~ser_mm.models.SERVisionTransformer` and :class:`~ser_mm.models.SERResNet` do. b2
      may be empty: on several ranks, a rank may have none of its images;
    - ``loss(inputs, data_samples)``, which hands each of the first two of ``inputs``, whole and
      by itself, to ``backbone`` once, and does nothing else with them. A second backbone that it
      hands them to, most often a moving average of the first, is the momentum branch. Further
      ``inputs`` are tensors, to do with as it likes, but it has to use them. It returns a dict of
      tensors, or of lists of them: what has 'loss' in its name is summed, the rest is logged.

    A trial step at build, on a copy and on images of a few tokens, shows whether it does. Where
    there is a process group it is left out, as it would need all ranks; a view that is used as a
    tensor then stops the first step of training with the same reason.

    A ``CosineEMA`` that it keeps is replaced by :class:`~ser_mm.models.ForeachCosineEMA`, which
    does the same in fewer operations.

    Checkpoints have the keys of the wrapped algorithm (``backbone.``, ``neck.``, ...) beside
    ``ser_neck.``, so that they load into either.

    Args:
        algorithm (dict): Config of the wrapped algorithm, e.g. MMPretrain's ``MoCoV3``.
        neck (dict, optional): Config of the projector of the token map. Its ``type`` defaults to
            :class:`~ser_mm.models.SERNeck`, its ``in_channels`` to those of the token map.
            Defaults to None.
        head (dict, optional): Config of the equivariance loss, its ``type`` by default
            :class:`~ser_mm.models.SERHead`. Defaults to None.
        loss_weight (float): Weight of the equivariance loss, 0 or more. Defaults to 1.0.
        detach_keys (bool): Stop the gradient to keys of the online branch, which provides them
            where there is no momentum branch. Keys of a momentum branch never carry gradient.
            Defaults to False.
        data_preprocessor (dict, optional): Config of the preprocessor; the Runner hands in its
            top-level ``data_preprocessor`` where the model has none. A ``SelfSupDataPreprocessor``,
            MMPretrain's, becomes a :class:`~ser_mm.models.SERDataPreprocessor`. What it leaves out
            is that of the wrapped algorithm (mean, std, channel order) and of its backbone
            (``patch_size``, the stride of the token map). Defaults to None.
        init_cfg (dict, optional): Initialization config. Defaults to None.

    Raises:
        ValueError: At build, if an argument is of another type, the wrapped algorithm does not
            meet the contract, or the neck, the head or the preprocessor do not fit.

    Example:
        >>> backbone = dict(type='SERVisionTransformer', arch='deit-small', ser_layer=3)
        >>> model = dict(type='SERAlgorithm', algorithm=dict(algorithm, backbone=backbone))
    """

    def __init__(
        self,
        algorithm: ModuleCfg,
        neck: dict | None = None,
        head: dict | None = None,
        loss_weight: NaturalFloat = 1.0,
        detach_keys: bool = False,
        data_preprocessor: dict | nn.Module | None = None,
        init_cfg: InitCfg = None,
    ) -> None:
        wrapped = MODELS.build(algorithm)
        use_foreach_update(wrapped)
        _check_algorithm(wrapped)
        preprocessor = _preprocessor(
            data_preprocessor, algorithm.get('data_preprocessor'), wrapped.backbone
        )
        super().__init__(preprocessor, init_cfg)
        self.algorithm = wrapped
        # The wrapped algorithm is initialized from the random state that it would have alone.
        with torch.random.fork_rng(devices=[]):
            self.ser_neck = _build_neck(neck, wrapped.backbone)
            self.ser_head = MODELS.build(dict(dict(type='SERHead'), **(head or {})))
        if not dist.is_distributed():
            try_projector(self.ser_neck, self.ser_head, wrapped.backbone.token_map_channels)
        self.loss_weight = loss_weight
        self.detach_keys = detach_keys
        self._further_views = 0
        self.register_state_dict_post_hook(_to_keys_of_algorithm)
        self.register_load_state_dict_pre_hook(_from_keys_of_algorithm)

    @property
    def backbone(self) -> nn.Module:
        """The online backbone of the wrapped algorithm."""
        return self.algorithm.backbone

    def forward(
        self,
        inputs: Tensor | list[ViewBatch],
        data_samples: list[DataSample] | None = None,
        mode: str = 'tensor',
    ) -> Tensor | tuple | dict[str, Tensor]:
        """Compute losses (``mode='loss'``), or leave any other mode to the wrapped algorithm."""
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        return self.algorithm(inputs, data_samples, mode=mode)

    def extract_feat(self, inputs: Tensor, **kwargs) -> tuple | Tensor:
        """Features of images by the wrapped algorithm, as MMPretrain's FeatureExtractor asks for.

        Args:
            inputs (Tensor): Normalized images, (N, 3, H, W).
            **kwargs: Those of the wrapped algorithm's ``extract_feat``.

        Returns:
            tuple | Tensor: What it gives; most give the outputs of ``backbone``.
        """
        return self.algorithm.extract_feat(inputs, **kwargs)

    def loss(
        self, inputs: list[ViewBatch], data_samples: list[DataSample] | None = None
    ) -> dict[str, Tensor]:
        """The base loss of b1 and b2, and the equivariance loss of b2.

        Args:
            inputs (list[ViewBatch]): The views; further ones may be plain tensors.
            data_samples (list[DataSample], optional): Handed to the wrapped algorithm.

        Returns:
            dict[str, Tensor]: ``loss_inv``, the sum of the losses that the wrapped algorithm
            reports, and ``loss_ser``; what it reports beside its losses; and where these are
            several, each of them, with ``inv`` for ``loss`` in its name.

        Raises:
            ValueError: At the first batch with more than two views, if the wrapped algorithm does
                not look at each.
        """
        reported = self._report(inputs, data_samples)
        losses = dict(loss_inv=self.parse_losses(reported)[0])
        parts = [key for key in reported if 'loss' in key]
        losses.update((key, value) for key, value in reported.items() if key not in parts)
        if len(parts) > 1:  # for the log; under a name with 'loss' they would count twice
            losses.update((key.replace('loss', 'inv'), _detach(reported[key])) for key in parts)
        losses['loss_ser'] = self.loss_weight * self._equivariance_loss(inputs[:2])
        return losses

    def _report(
        self, inputs: list[ViewBatch], data_samples: list[DataSample] | None
    ) -> dict[str, Tensor]:
        """The losses of the wrapped algorithm; at first, whether it looks at all views."""
        watched, unseen = inputs, set()
        if len(inputs) > 2 + self._further_views:
            watched, unseen = seen_views(inputs)
            self._further_views = len(inputs) - 2
        try:
            reported = self.algorithm.loss(watched, data_samples)
        except ValueError as error:
            if 'more than 1 value per channel' not in str(error):
                raise
            raise ValueError(
                f'SERAlgorithm: a batch of {len(inputs[0].base)} images in b1 and '
                f'{len(inputs[0].equi)} in b2 has no variance for BatchNorm; raise '
                'train_dataloader.batch_size, and where only the last batch of an epoch is so '
                'small, set train_dataloader.drop_last=True.'
            ) from error
        if unseen:
            raise ValueError(
                f'SERAlgorithm: views={len(inputs)} reach algorithm='
                f'{type(self.algorithm).__name__}, which does not look at number '
                f'{min(unseen) + 1}; give EquivariantViewPipeline two views, or wrap an algorithm '
                'that takes more, such as DINO.'
            )
        return reported

    def _equivariance_loss(self, views: list[ViewBatch]) -> Tensor:
        queries, keys = self._project(views)
        d_1, d_2 = (geometry.matrices(view.elements) for view in views)
        to_2 = geometry.compose(d_2, geometry.invert(d_1))
        size_1, size_2 = (q.shape[-2:] for q in queries)
        moved = [
            geometry.act(keys[1], geometry.invert(to_2), size_1),
            geometry.act(keys[0], to_2, size_2),
        ]
        return self.ser_head.loss(queries, moved)

    def _project(self, views: list[ViewBatch]) -> tuple[list[Tensor], list[Tensor]]:
        """Query and key maps of b2 per view, (N2, C', h, w) each."""
        online, *momentum = (
            [view.token_maps[branch] for view in views] for branch in self._branches(views[0])
        )
        queries = self.ser_neck(online)
        if not momentum:
            return queries, [q.detach() for q in queries] if self.detach_keys else queries
        with torch.no_grad():
            return queries, self.ser_neck(*momentum)

    def _branches(self, view: ViewBatch) -> list[nn.Module]:
        """The online backbone, and the momentum one if a view was handed to it."""
        return [self.backbone, *(x for x in view.token_maps if x is not self.backbone)]

    def get_layer_depth(self, param_name: str) -> tuple[int, int]:
        """Depth of a parameter of the wrapped algorithm, see its ``get_layer_depth``."""
        return self.algorithm.get_layer_depth(param_name.removeprefix('algorithm.'))


def _check_algorithm(algorithm: nn.Module) -> None:
    """Refuse an algorithm that does not meet the contract of SERAlgorithm."""
    name = type(algorithm).__name__
    if isinstance(algorithm, SERAlgorithm):
        raise ValueError(
            'SERAlgorithm: algorithm=SERAlgorithm is in SER already; wrap what is in it, or leave '
            'out the outer one.'
        )
    backbone = getattr(algorithm, 'backbone', None)
    if backbone is None:
        raise ValueError(
            f'SERAlgorithm: algorithm={name} has no `backbone`; wrap an algorithm whose online '
            'network is its attribute `backbone`.'
        )
    if not dist.is_distributed():
        try_views(algorithm)
    if getattr(backbone, 'token_map_channels', None) is None:
        remedy = "use type='SERVisionTransformer' with ser_layer=3, say"
        if hasattr(backbone, 'ser_layer'):
            remedy = f'backbone.ser_layer={backbone.ser_layer}, set it to 3, say'
        elif isinstance(backbone, ResNet):
            remedy = "use type='SERResNet' with ser_layer=3, say"
        raise ValueError(
            f'SERAlgorithm: the backbone of {name}, {type(backbone).__name__}, gives no token '
            f'map; {remedy}.'
        )


def _build_neck(config: dict | None, backbone: nn.Module) -> nn.Module:
    """The projector, as wide at its input as the token map."""
    channels = backbone.token_map_channels
    config = dict(dict(type='SERNeck'), **(config or {}))
    kind = MODELS.get(config['type']) if isinstance(config['type'], str) else config['type']
    if kind is not None and 'in_channels' in inspect.signature(kind).parameters:
        config.setdefault('in_channels', channels)
    neck = MODELS.build(config)
    if getattr(neck, 'in_channels', channels) != channels:
        raise ValueError(
            f'SERAlgorithm: neck.in_channels={neck.in_channels}, but the token map has {channels} '
            f'channels; leave it out, or set neck.in_channels={channels}.'
        )
    return neck


def _preprocessor(
    given: dict | nn.Module | None, inner: dict | None, backbone: nn.Module
) -> nn.Module:
    """The preprocessor: ``given``, else what the wrapped algorithm and its backbone know."""
    stride = backbone.token_map_stride
    if not isinstance(given, nn.Module):
        config = {**(inner or {}), **(given or {})}
        if given and not _PIXELS.isdisjoint(given):  # mean, std and order belong together
            config = {k: v for k, v in config.items() if k not in _PIXELS or k in given}
        kind = config.get('type', 'SelfSupDataPreprocessor')
        kind = MODELS.get(kind) if isinstance(kind, str) else kind
        if kind is SelfSupDataPreprocessor:
            config['type'] = kind = SERDataPreprocessor
        if kind is not None and not issubclass(kind, SERDataPreprocessor):
            raise _not_splitting(kind)
        if config.get('mean') is None:
            warnings.warn(
                'SERAlgorithm: neither data_preprocessor nor the wrapped algorithm has a mean and '
                'std, so images keep their values from 0 to 255; set data_preprocessor=dict('
                'mean=[...], std=[...], to_rgb=True).',
                stacklevel=2,
            )
        config.setdefault('patch_size', stride)
        built = MODELS.build(config)
    elif isinstance(given, SERDataPreprocessor):
        built = given
    else:
        raise _not_splitting(type(given))
    if built.patch_size != stride:
        raise ValueError(
            f'SERAlgorithm: data_preprocessor.patch_size={built.patch_size}, but a token of the '
            f'backbone covers {stride} pixels; leave it out, or set patch_size={stride}.'
        )
    return built


def _not_splitting(kind: type) -> ValueError:
    return ValueError(
        f'SERAlgorithm: data_preprocessor.type={kind.__name__} does not split views into b1 and '
        "b2; use type='SERDataPreprocessor', or leave it out."
    )


def _detach(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return value.detach() if isinstance(value, Tensor) else [x.detach() for x in value]


def _to_keys_of_algorithm(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Drop ``algorithm.`` from the keys of a state dict."""
    _rename(state_dict, prefix, lambda key: key.removeprefix('algorithm.'))


def _from_keys_of_algorithm(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Put ``algorithm.`` back before loading."""
    children = tuple(f'{name}.' for name, _ in module.named_children())
    _rename(state_dict, prefix, lambda key: key if key.startswith(children) else f'algorithm.{key}')


def _rename(state_dict: dict, prefix: str, rename: Callable[[str], str]) -> None:
    """Rename the keys below ``prefix``, in place and in order."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[prefix + rename(key[len(prefix) :])] = state_dict.pop(key)
