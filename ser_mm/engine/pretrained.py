"""Checks of the weights that a run starts from."""

from collections.abc import Iterator, Mapping
from os.path import expanduser, isfile
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ser_mm.checkpoint import read_weights

from .configs import shipped_configs


def check_pretrained(cfg: Config) -> None:
    """Fail early, and in one sentence, when a checkpoint that a run starts from is missing.

    Otherwise the same mistake ends in a traceback when the weights are initialized, after the
    data was read. Only local paths are checked.

    Args:
        cfg (Config): Config of the run.

    Raises:
        FileNotFoundError: Naming the field, its value and the remedy.
    """
    found = list(_pretrained(cfg.get('model') or {}, 'model'))
    if not cfg.get('resume'):
        found.append(('load_from', cfg.get('load_from')))
    for field, path in found:
        if not isinstance(path, str) or '://' in path or isfile(expanduser(path)):
            continue
        name = Path(path).parent.name
        made = f', or make it with ser-mm train {name}' if name in shipped_configs() else ''
        raise FileNotFoundError(
            f'{field} = {path!r} is not a file; name the checkpoint of a pretraining with '
            f'--cfg-options {field}=FILE{made}.'
        )


def start_from(backbone: dict, checkpoint: str | Path, prefix: str | None = None) -> None:
    """Let a backbone start from a checkpoint, with [CLS] inserted where it was in pretraining.

    Args:
        backbone (dict): Config of the backbone, changed in place.
        checkpoint (str | Path): File; weights of others, which do not say where [CLS] is inserted,
            have it from the input.
        prefix (str, optional): See :func:`~ser_mm.checkpoint.load_backbone`. Defaults to None.

    Raises:
        pickle.UnpicklingError, ValueError: If the file cannot be read as weights.
    """
    backbone['init_cfg'] = dict(type='Pretrained', checkpoint=str(checkpoint))
    if prefix is not None:
        backbone['init_cfg']['prefix'] = prefix
    if str(backbone['type']).rpartition('.')[2] in ('SERVisionTransformer', 'SERTimmViT'):
        weights = read_weights(str(checkpoint))
        late = [x for key, x in weights.items() if key.endswith('cls_after')]
        backbone['cls_layer'] = int(late[0]) if late and late[0].numel() == 1 else 0


def _pretrained(cfg: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Checkpoints that parts of a model are initialized from, with their fields."""
    if isinstance(cfg, list | tuple):
        cfg = dict(enumerate(cfg))
    if not isinstance(cfg, Mapping):
        return
    if str(cfg.get('type')).rpartition('.')[2] in ('Pretrained', 'PretrainedInit'):
        yield f'{place}.checkpoint', cfg.get('checkpoint')
    for key, value in cfg.items():
        yield from _pretrained(value, f'{place}.{key}')
