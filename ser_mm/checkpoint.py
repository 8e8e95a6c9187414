"""Loading pretrained weights strictly, and without trusting the file."""

import io
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mmengine.fileio
import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn


def _history_method(owner: type, name: str) -> Callable:
    """What ``getattr`` may do in a checkpoint: name the statistics of a history."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'A checkpoint may not ask for {name} of {owner}.')
    return getattr(owner, name)


# What MMEngine's checkpoints hold beside weights: the history of the values that it logged.
_MMENGINE_GLOBALS = [
    HistoryBuffer,
    (_history_method, 'builtins.getattr'),
    np.ndarray,
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
    np.array(0).__reduce__()[0],
    np.float64(0).__reduce__()[0],
]

# torch's own switch: it reads data only, whatever a caller asks for.
_DATA_ONLY = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
_trusted = False

# What a ViT's parts are called by timm, and by DeiT, DINO and MoCo v3 with it, and by MMPretrain.
_TIMM_NAMES = [
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
    (r'^blocks\.', 'layers.'),
    (r'\.norm([12])\.', r'.ln\1.'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    (r'^norm\.', 'ln1.'),
]
_CLASSIFIERS = ('head.', 'fc.')


def read_checkpoint(checkpoint: str, map_location: Any = 'cpu') -> Any:
    """Read what ``torch.save`` wrote, without running code from the file.

    Args:
        checkpoint (str): Path or URL.
        map_location (Any): As for ``torch.load``. Defaults to 'cpu'.

    Returns:
        Any: The content: tensors, plain data and, from MMEngine, the history of logged values.

    Raises:
        pickle.UnpicklingError: If the file holds anything else.
        ValueError: If it is not a checkpoint, or a damaged one.
    """
    data = mmengine.fileio.get(checkpoint)
    try:
        with torch.serialization.safe_globals(_MMENGINE_GLOBALS):
            return torch.load(
                io.BytesIO(data), map_location=map_location, weights_only=not _trusted
            )
    except (ImportError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        if not data.startswith((b'PK\x03\x04', b'\x80')):  # neither of torch's two formats
            raise _damaged(checkpoint, data, error) from error
        raise pickle.UnpicklingError(
            f'{checkpoint} holds more than data, and reading it could run code ({_told(error)}); '
            'if you made it yourself, or trust who did, add --trust-checkpoint to `ser-mm train` '
            'or `ser-mm test`, or save its state_dict alone.'
        ) from error
    except Exception as error:  # of many types, by where the file breaks off
        raise _damaged(checkpoint, data, error) from error


def _told(error: Exception) -> str:
    """What a file asked for, out of torch's paragraph."""
    found = re.search(r'GLOBAL ([\w.]+)', str(error))
    return found[1] if found else str(error).strip().splitlines()[-1]


def _damaged(checkpoint: str, data: bytes, error: Exception) -> ValueError:
    return ValueError(
        f'{checkpoint} ({len(data)} bytes) cannot be read as a checkpoint, '
        f'{type(error).__name__}: {error}; copy or write it again.'
    )


@contextmanager
def guarded_checkpoints(trust: bool = False) -> Iterator[None]:
    """Let no checkpoint run code in this process, nor in those that it starts meanwhile.

    MMEngine reads a file that holds more than data a second time, with ``weights_only=False``.
    Within this context whatever it, MMPretrain or MMDetection load, to resume, for ``load_from``,
    ``init_cfg`` or ``pretrained``, is read by :func:`read_checkpoint`, and any other
    ``torch.load`` reads data only.

    Args:
        trust (bool): Leave everything as it is, and let :func:`read_checkpoint` run what a file
            holds. Defaults to False.

    Yields:
        None: Once.
    """
    global _trusted
    before = os.environ.get(_DATA_ONLY), dict(CheckpointLoader._schemes), _trusted
    _trusted = trust
    if not trust:
        os.environ[_DATA_ONLY] = '1'
        CheckpointLoader.register_scheme('', loader=load_from_local, force=True)
    try:
        with torch.serialization.safe_globals(_MMENGINE_GLOBALS):
            yield
    finally:
        value, CheckpointLoader._schemes, _trusted = before
        os.environ.pop(_DATA_ONLY, None)
        if value is not None:
            os.environ[_DATA_ONLY] = value


def load_from_local(filename: str, map_location: Any) -> Any:
    """What MMEngine reads files by in :func:`guarded_checkpoints`; it shows the name in its log."""
    return read_checkpoint(os.path.expanduser(filename), map_location)


def read_weights(checkpoint: str) -> dict[str, Tensor]:
    """Read a state dict without running code from the file.

    Args:
        checkpoint (str): Path or URL of a ``.safetensors`` file, or of one written by
            ``torch.save``: a state dict, or a dict that holds one as ``state_dict`` (MMEngine),
            ``model`` or ``teacher``.

    Returns:
        dict[str, Tensor]: The weights, on the CPU.

    Raises:
        pickle.UnpicklingError: If the file holds anything but tensors and plain data.
        ValueError: If it is not a checkpoint, or a damaged one.
    """
    if str(checkpoint).endswith('.safetensors'):
        import safetensors.torch

        data = mmengine.fileio.get(checkpoint)
        try:
            return safetensors.torch.load(data)
        except Exception as error:  # of several types, by where the file breaks off
            raise _damaged(checkpoint, data, error) from error
    content = read_checkpoint(checkpoint)
    if not isinstance(content, dict):
        raise ValueError(
            f'{checkpoint} holds a {type(content).__name__}, not weights by name; name a state '
            'dict, or a checkpoint with one.'
        )
    for key in ('state_dict', 'model', 'teacher'):
        content = content.get(key, content)
    return content


def load_backbone(backbone: nn.Module, checkpoint: str, prefix: str | None = None) -> None:
    """Fill a backbone from a checkpoint, completely or not at all.

    MMEngine's ``Pretrained`` leaves what it cannot fill at its random start with a log line. A ViT
    may have timm's names, and a classifier on top (``head.`` or ``fc.``) is left out.

    Args:
        backbone (nn.Module): The network to fill.
        checkpoint (str): Path or URL, see :func:`read_weights`.
        prefix (str, optional): Start of the names of the backbone's weights in the file, e.g.
            'backbone.'. Defaults to None: the file holds the backbone alone.

    Raises:
        ValueError: If no name starts with ``prefix``, or a weight of the backbone is missing in
            the file, one of the file's unused, or one of another shape.
    """
    content = read_weights(checkpoint)
    prefix = prefix or ''
    weights = {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}
    if not weights:
        names = sorted({key.split('.')[0] + '.' for key in content})
        raise ValueError(
            f"No weight in {checkpoint} starts with prefix='{prefix}'; its names start with "
            f'{", ".join(names)}.'
        )
    weights = {k: v for k, v in weights.items() if not k.startswith(_CLASSIFIERS)}
    if 'patch_embed.proj.weight' in weights:
        weights = {_from_timm(key): value for key, value in weights.items()}
    try:
        backbone.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{checkpoint} (prefix='{prefix}') does not fit {type(backbone).__name__}; use the "
            f'backbone config that it was trained with. {error}'
        ) from error


def _from_timm(name: str) -> str:
    for pattern, replacement in _TIMM_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


class StrictPretrained:
    """Mixin by which ``init_cfg=dict(type='Pretrained', ...)`` of a backbone is strict."""

    init_cfg: dict | list | None

    def init_weights(self) -> None:
        """Initialize by ``init_cfg``, from a checkpoint by :func:`load_backbone`."""
        if isinstance(self.init_cfg, dict) and self.init_cfg['type'] == 'Pretrained':
            load_backbone(self, self.init_cfg['checkpoint'], self.init_cfg.get('prefix'))
            self._is_init = True
        else:
            super().init_weights()  # type: ignore[misc]
