"""Around a two-view SSL algorithm: its own loss, and one more of what its backbone sees."""

import warnings
from collections.abc import Callable

from mmengine import dist
from mmengine.model import BaseModel
from mmpretrain.models import ResNet, SelfSupDataPreprocessor
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from ser_mm.arguments import InitCfg
from ser_mm.models.contract import seen_views, try_views
from ser_mm.models.data_preprocessor import SERDataPreprocessor, pixels_of
from ser_mm.models.foreach_ema import use_foreach_update
from ser_mm.views import ViewBatch


class TwoViewWrapper(BaseModel):
    """What :class:`~ser_mm.models.SERAlgorithm` and ``EquivarianceAlgorithm`` have in common.

    Args:
        algorithm (dict): Config of the wrapped algorithm.
        loss_weight (float): Weight of the objective.
        data_preprocessor (dict, optional): Config of the preprocessor.
        init_cfg (dict, optional): Initialization config.
        needs (str): What the backbone has to give, 'token_map' or 'feature'.
    """

    loss_name: str
    """Name of the objective in the losses."""

    def __init__(
        self,
        algorithm: dict,
        loss_weight: float,
        data_preprocessor: dict | nn.Module | None,
        init_cfg: InitCfg,
        needs: str,
    ) -> None:
        owner = type(self).__name__
        wrapped = MODELS.build(algorithm)
        use_foreach_update(wrapped)
        _check_algorithm(owner, wrapped, needs)
        preprocessor = _preprocessor(
            owner, data_preprocessor, algorithm.get('data_preprocessor'), wrapped.backbone
        )
        super().__init__(preprocessor, init_cfg)
        self.algorithm = wrapped
        self.loss_weight = loss_weight
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
        """The base loss, of all images, and the equivariance loss.

        Args:
            inputs (list[ViewBatch]): The views; further ones may be plain tensors.
            data_samples (list[DataSample], optional): Handed to the wrapped algorithm.

        Returns:
            dict[str, Tensor]: ``loss_inv``, the sum of the losses that the wrapped algorithm
            reports, and ``loss_ser``, of SER, or ``loss_equi``, of another objective; what both
            report beside their losses; and where the wrapped algorithm has several losses, each of
            them, with ``inv`` for ``loss`` in its name.

        Raises:
            ValueError: At the first batch with more than two views, if the wrapped algorithm does
                not look at each.
        """
        reported = self._report(self._views_of_algorithm(inputs), data_samples)
        losses = dict(loss_inv=self.parse_losses(reported)[0])
        parts = [key for key in reported if 'loss' in key]
        losses.update((key, value) for key, value in reported.items() if key not in parts)
        if len(parts) > 1:  # for the log; under a name with 'loss' they would count twice
            losses.update((key.replace('loss', 'inv'), _detach(reported[key])) for key in parts)
        objective = self._objective(inputs)
        losses[self.loss_name] = self.loss_weight * objective.pop('loss')
        return {**losses, **objective}

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
                f'{type(self).__name__}: a batch of {len(inputs[0].base)} images in b1 and '
                f'{len(inputs[0].equi)} in b2 has no variance for BatchNorm; raise '
                'train_dataloader.batch_size, and where only the last batch of an epoch is so '
                'small, set train_dataloader.drop_last=True.'
            ) from error
        if unseen:
            raise ValueError(
                f'{type(self).__name__}: views={len(inputs)} reach algorithm='
                f'{type(self.algorithm).__name__}, which does not look at number '
                f'{min(unseen) + 1}; give EquivariantViewPipeline two views, or wrap an algorithm '
                'that takes more, such as DINO.'
            )
        return reported

    def _views_of_algorithm(self, inputs: list[ViewBatch]) -> list[ViewBatch]:
        """The views that the wrapped algorithm gets."""
        return inputs

    def _objective(self, inputs: list[ViewBatch]) -> dict[str, Tensor]:
        """``loss`` of the views, and figures to log."""
        raise NotImplementedError

    def get_layer_depth(self, param_name: str) -> tuple[int, int]:
        """Depth of a parameter of the wrapped algorithm, see its ``get_layer_depth``."""
        return self.algorithm.get_layer_depth(param_name.removeprefix('algorithm.'))


def _check_algorithm(owner: str, algorithm: nn.Module, needs: str) -> None:
    """Refuse an algorithm that does not meet the contract of the wrapper."""
    name = type(algorithm).__name__
    if isinstance(algorithm, TwoViewWrapper):
        raise ValueError(
            f'{owner}: algorithm={name} wraps one already; wrap what is in it, or leave out one of '
            'the two.'
        )
    backbone = getattr(algorithm, 'backbone', None)
    if backbone is None:
        raise ValueError(
            f'{owner}: algorithm={name} has no `backbone`; wrap an algorithm whose online '
            'network is its attribute `backbone`.'
        )
    if not dist.is_distributed():
        try_views(algorithm, owner)
    if needs == 'token_map' and getattr(backbone, 'token_map_channels', None) is None:
        remedy = "use type='SERVisionTransformer' with ser_layer=3, say"
        if hasattr(backbone, 'ser_layer'):
            remedy = f'backbone.ser_layer={backbone.ser_layer}, set it to 3, say'
        elif isinstance(backbone, ResNet):
            remedy = "use type='SERResNet' with ser_layer=3, say"
        else:
            remedy += '; one that you wrote has to tell token_map_channels and token_map_stride'
        raise ValueError(
            f'{owner}: the backbone of {name}, {type(backbone).__name__}, gives no token map; '
            f'{remedy}.'
        )
    if not hasattr(backbone, 'feature_channels') and needs == 'feature':
        kind = 'SERResNet' if isinstance(backbone, ResNet) else 'SERVisionTransformer'
        raise ValueError(
            f'{owner}: the backbone of {name}, {type(backbone).__name__}, does not leave its '
            f"features in views; use type='{kind}'."
        )


def _preprocessor(
    owner: str, given: dict | nn.Module | None, inner: dict | None, backbone: nn.Module
) -> nn.Module:
    """The preprocessor: ``given``, else what the wrapped algorithm and its backbone know."""
    stride = backbone.token_map_stride
    if not isinstance(given, nn.Module):
        pixels_of(owner, given or {})  # one of them alone would go with one of the algorithm's
        config = {**(inner or {}), **(given or {})}
        kind = config.get('type', 'SelfSupDataPreprocessor')
        kind = MODELS.get(kind) if isinstance(kind, str) else kind
        if kind is SelfSupDataPreprocessor:
            config['type'] = kind = SERDataPreprocessor
        if kind is not None and not issubclass(kind, SERDataPreprocessor):
            raise _not_splitting(owner, kind)
        if config.get('mean') is None:
            warnings.warn(
                f'{owner}: neither data_preprocessor nor the wrapped algorithm has a mean and '
                'std, so images keep their values from 0 to 255; set data_preprocessor=dict('
                'mean=[...], std=[...], to_rgb=True).',
                stacklevel=2,
            )
        config.setdefault('patch_size', stride)
        built = MODELS.build(config)
    elif isinstance(given, SERDataPreprocessor):
        built = given
    else:
        raise _not_splitting(owner, type(given))
    if built.views and built.equi_ratio is None:
        raise ValueError(
            f'{owner}: data_preprocessor.views without an equi_ratio makes views for an algorithm '
            'alone; set data_preprocessor.equi_ratio, the share of b2, such as 0.01.'
        )
    if built.patch_size != stride:
        raise ValueError(
            f'{owner}: data_preprocessor.patch_size={built.patch_size}, but a token of the '
            f'backbone covers {stride} pixels; leave it out, or set patch_size={stride}.'
        )
    return built


def _not_splitting(owner: str, kind: type) -> ValueError:
    return ValueError(
        f'{owner}: data_preprocessor.type={kind.__name__} does not split views into b1 and '
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
