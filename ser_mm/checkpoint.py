"""Loading pretrained weights strictly, and without trusting the file."""

import functools
import io
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import mmengine.fileio
import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import PretrainedInit
from mmengine.runner import CheckpointLoader
from mmengine.utils import digit_version
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A file that is damaged, not a checkpoint, or does not fit what is to be loaded."""


def _history_method(owner: type, name: str) -> Callable:
    """What ``getattr`` may do in a checkpoint: name the statistics of a history."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'A checkpoint may not ask for {name} of {owner}.')
    return getattr(owner, name)


class _Options(SimpleNamespace):
    """Stands for ``argparse.Namespace``: the options that a foreign run was started with."""


def _known_as(name: str, function: Callable) -> Callable:
    """What a checkpoint gets when it asks for ``name``.

    torch finds it by the names of its module and of itself; 2.5 takes no pair of both.
    """

    def stand_in(*args: Any) -> Any:
        return function(*args)

    _rename(stand_in, name)
    return stand_in


def _rename(target: Any, name: str) -> None:
    target.__module__, _, target.__qualname__ = name.rpartition('.')
    target.__name__ = target.__qualname__


_rename(_Options, 'argparse.Namespace')
_NUMPY_FUNCTIONS: list[Any] = [np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0]]

# What checkpoints hold beside weights: MMEngine's the history of the values that it logged, others
# the options of their run, with paths among them. numpy 2 renamed its core.
_DATA_GLOBALS = [
    HistoryBuffer,
    _known_as('builtins.getattr', _history_method),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in '?bBhHiIlLqQefd'},
    *(
        _known_as(f'numpy.{core}.multiarray.{function.__name__}', function)
        for core in ('core', '_core')
        for function in _NUMPY_FUNCTIONS
    ),
    _Options,
    *(
        _known_as(f'{module}.{name}', kind)
        for module in ('pathlib', 'pathlib._local')  # as Python 3.13 says
        for name, kind in (('PosixPath', PurePosixPath), ('WindowsPath', PureWindowsPath))
    ),
]

# torch's own switch: it reads data only, whatever a caller asks for.
_DATA_ONLY = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
_trusted = False

# torch 2.5 runs TorchScript archives even where data alone is asked for (CVE-2025-32434).
_RUNS_PROGRAMS = digit_version(torch.__version__) < digit_version('2.6')
_is_program = getattr(torch.serialization, '_is_torchscript_zip', None)

# What a ViT's parts are called by timm, and by DeiT, DINO, MAE and MoCo v3 with it, and by
# MMPretrain.
_TIMM_NAMES = [
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
    (r'^blocks\.', 'layers.'),
    (r'\.norm([12])\.', r'.ln\1.'),
    (r'\.ls1\.gamma$', '.attn.gamma1.weight'),
    (r'\.ls2\.gamma$', '.ffn.gamma2.weight'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    (r'^norm_pre\.', 'pre_norm.'),
    (r'^norm\.', 'ln1.'),
    (r'^fc_norm\.', 'ln2.'),
]
# The way back.
_MMPRETRAIN_NAMES = [
    (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
    (r'^layers\.(\d+)\.ln([12])\.', r'blocks.\1.norm\2.'),
    (r'^layers\.', 'blocks.'),
    (r'\.attn\.gamma1\.weight$', '.ls1.gamma'),
    (r'\.ffn\.gamma2\.weight$', '.ls2.gamma'),
    (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
    (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
    (r'^pre_norm\.', 'norm_pre.'),
    (r'^ln1\.', 'norm.'),
    (r'^ln2\.', 'fc_norm.'),
]
_TIMM_PATCHES = 'patch_embed.proj.weight'

# What pretraining and classification add to a backbone under the same prefix: classifiers and
# projectors, SwAV's prototypes, the decoder of MAE, the token for masked patches.
_ADDED = (
    *('head.', 'head_dist.', 'fc.', 'projection_head.', 'prototypes.'),
    *('decoder_', 'mask_token'),
)

# The parts that hold the weights in checkpoints of MMEngine and Lightning, DeiT and MAE, DINO.
_HOLDERS = ('state_dict', 'model', 'teacher')

# What torch and MMEngine tell of weights that do not fit.
_NAMES = re.compile(
    r'(missing|unexpected) key(?:s|\(s\))? in (?:source )?state_dict: (.*?)[.\s]*$', re.I | re.M
)
_SHAPES = re.compile(r'size mismatch for (\S+): .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)')

# A prefix of the moving average of another network in the file.
_AVERAGE = re.compile(r'(?:^|[._])(?:momentum|target|teacher|ema|key|k)(?=[._])')


def _refuse_program(archive: Any) -> bool:
    if _is_program and _is_program(archive):
        raise RuntimeError('TorchScript archives are programs.')
    return False


@contextmanager
def _data_only() -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` read data, all that is harmless and nothing else."""
    with torch.serialization.safe_globals(_DATA_GLOBALS):
        if not _RUNS_PROGRAMS:
            yield
            return
        before = torch.serialization._is_torchscript_zip
        torch.serialization._is_torchscript_zip = _refuse_program
        try:
            yield
        finally:
            torch.serialization._is_torchscript_zip = before


def read_checkpoint(checkpoint: str, map_location: Any = 'cpu') -> Any:
    """Read what ``torch.save`` wrote, without running code from the file.

    Args:
        checkpoint (str): Path or URL.
        map_location (Any): As for ``torch.load``. Defaults to 'cpu'.

    Returns:
        Any: The content: tensors, plain data and, from MMEngine, the history of logged values. The
        ``argparse.Namespace`` of other code is a plain object with the same attributes.

    Raises:
        OSError: If there is no such file.
        pickle.UnpicklingError: If the file holds anything else.
        ValueError: If it is not a checkpoint, or a damaged one.
    """
    data = read_bytes(checkpoint)
    source = io.BytesIO(data)
    try:
        if _trusted:
            return torch.load(source, map_location=map_location, weights_only=False)
        with _data_only():
            return torch.load(source, map_location=map_location, weights_only=True)
    except (ImportError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        if not data.startswith((b'PK\x03\x04', b'\x80')):  # neither of torch's two formats
            raise _damaged(checkpoint, data, error) from error
        raise _unsafe(checkpoint, error) from error
    except Exception as error:  # of many types, by where the file breaks off
        if 'TorchScript' in str(error):
            raise pickle.UnpicklingError(
                f'{checkpoint} holds more than data: it is a TorchScript program. If you trust it, '
                'save torch.jit.load(...).state_dict() alone, by torch.save.'
            ) from error
        raise _damaged(checkpoint, data, error) from error


def read_bytes(checkpoint: str) -> bytes:
    """The content of a checkpoint file.

    Args:
        checkpoint (str): Path or URL.

    Returns:
        bytes: As it is.

    Raises:
        OSError: If there is no such file, with what to name instead.
    """
    path = os.path.expanduser(checkpoint)
    if os.path.isdir(path):
        inside = sorted(x for x in os.listdir(path) if x.endswith(('.pth', '.pt', '.safetensors')))
        example = f', such as {inside[-1]}' if inside else ''
        raise IsADirectoryError(f'{checkpoint} is a folder; name a checkpoint in it{example}.')
    if '://' not in path and not os.path.exists(path):
        raise FileNotFoundError(
            f'{checkpoint} does not exist; name a checkpoint, such as epoch_100.pth in the work '
            'dir of a run.'
        )
    try:
        return mmengine.fileio.get(path)
    except KeyError as error:
        raise FileNotFoundError(
            f'{checkpoint}: no storage is known by {path.partition("://")[0]}://; give a path, or '
            'an address that begins with http:// or https://.'
        ) from error


def _unsafe(checkpoint: str, error: Exception) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(
        f'{checkpoint} holds more than data, and reading it could run code ({_told(error)}); '
        'if you made it yourself, or trust who did, add --trust-checkpoint to `ser-mm train` '
        'or `ser-mm test`, or save its state_dict alone.'
    )


def _told(error: Exception) -> str:
    """What a file asked for, out of torch's paragraph."""
    found = re.search(r'GLOBAL ([\w.]+)|WeightsUnpickler error:\s*(.+)', str(error))
    return (found[1] or found[2]) if found else str(error).strip().splitlines()[-1]


def _damaged(checkpoint: str, data: bytes, error: Exception) -> CheckpointError:
    told = _told(error) if isinstance(error, pickle.UnpicklingError) else str(error).split('. ')[0]
    reason = ': '.join(filter(None, [type(error).__name__, told.strip().rstrip('.')]))
    return CheckpointError(
        f'{checkpoint} ({len(data)} bytes) cannot be read as a checkpoint ({reason}); copy or '
        'write it again.'
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
        for prefix, load in before[1].items():
            CheckpointLoader.register_scheme(prefix, loader=_naming(load), force=True)
        CheckpointLoader.register_scheme('', loader=load_from_local, force=True)
    try:
        with nullcontext() if trust else _data_only():
            yield
    finally:
        value, CheckpointLoader._schemes, _trusted = before
        os.environ.pop(_DATA_ONLY, None)
        if value is not None:
            os.environ[_DATA_ONLY] = value


def _naming(load: Callable) -> Callable:
    """A loader of MMEngine's for another place, whose refusal of a file names it."""

    @functools.wraps(load)
    def loading(filename: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(filename, *args, **kwargs)
        except pickle.UnpicklingError as error:
            raise error if filename in str(error) else _unsafe(filename, error) from error

    return loading


def load_from_local(filename: str, map_location: Any) -> Any:
    """What MMEngine reads files by in :func:`guarded_checkpoints`; it shows the name in its log."""
    return read_checkpoint(filename, map_location)


def read_weights(checkpoint: str) -> dict[str, Tensor]:
    """Read a state dict without running code from the file.

    Args:
        checkpoint (str): Path or URL of a ``.safetensors`` file, or of one written by
            ``torch.save``: a state dict, or a dict that holds one as ``state_dict`` (MMEngine,
            Lightning, MoCo), ``model`` (DeiT, MAE) or ``teacher`` (DINO). Of a dict of several
            others, the names start with those that they have in it.

    Returns:
        dict[str, Tensor]: The weights, on the CPU.

    Raises:
        ImportError: If the file is of safetensors, which is not installed.
        OSError: If there is no such file.
        pickle.UnpicklingError: If the file holds anything but tensors and plain data.
        ValueError: If it is not a checkpoint, or a damaged one, or has no weights.
    """
    if str(checkpoint).endswith('.safetensors'):
        try:
            import safetensors.torch
        except ImportError as error:
            raise ImportError(
                f'{checkpoint} is read by safetensors, which is not installed: run `pip install '
                'safetensors`.'
            ) from error
        data = read_bytes(checkpoint)
        try:
            return safetensors.torch.load(data)
        except Exception as error:  # of several types, by where the file breaks off
            raise _damaged(checkpoint, data, error) from error
    content = read_checkpoint(checkpoint)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f'{checkpoint} holds a {type(content).__name__}, not weights by name; name a state '
            'dict, or a checkpoint with one.'
        )
    weights = content
    while held := [weights[k] for k in _HOLDERS if isinstance(weights.get(k), Mapping)]:
        weights = held[0]
    if not _has_tensors(weights):
        parts = {name: part for name, part in weights.items() if _has_tensors(part)}
        weights = {f'{name}.{key}': x for name, part in parts.items() for key, x in part.items()}
    if not weights:
        told = ', '.join(f'{k} ({type(v).__name__})' for k, v in content.items()) or 'nothing'
        raise CheckpointError(
            f'{checkpoint} has no weights by name; it holds {told}. Save the state_dict alone: '
            'torch.save(network.state_dict(), FILE).'
        )
    return {str(name): value for name, value in weights.items()}


def _has_tensors(part: Any) -> bool:
    return isinstance(part, Mapping) and any(isinstance(x, Tensor) for x in part.values())


def load_backbone(backbone: nn.Module, checkpoint: str, prefix: str | None = None) -> None:
    """Fill a backbone from a checkpoint, completely or not at all, and log what was loaded.

    MMEngine's ``Pretrained`` leaves what it cannot fill at its random start with a log line. A ViT
    may have timm's names. What is no part of a backbone is left out, under its prefix: classifiers
    and projectors (``head.``, ``fc.``, ``projection_head.``), the prototypes of SwAV, the decoder
    of MAE, the token for masked patches.

    Args:
        backbone (nn.Module): The network to fill.
        checkpoint (str): Path or URL, see :func:`read_weights`.
        prefix (str, optional): Start of the names of the backbone's weights in the file, e.g.
            'backbone.', or '' if it holds the backbone alone. Defaults to None: the one that leads
            to all parameters, such as 'backbone.' of MMEngine, 'module.' of DDP, 'model.' of
            Lightning or 'module.base_encoder.' of MoCo v3. A moving average ('momentum_encoder.',
            'teacher.', ...) is taken if there is nothing else.

    Raises:
        ValueError: If no name starts with ``prefix``, or a weight of the backbone is missing in
            the file, one of the file's unused, or one of another shape; or if ``prefix`` is None
            and several would do.
    """
    content = read_weights(checkpoint)
    if prefix is None:
        prefix = _find_prefix(backbone, content, checkpoint)
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    weights, left_out = _select(backbone, content, prefix)
    if not weights:
        names = sorted({key.split('.')[0] + '.' for key in content})
        raise CheckpointError(
            f"No weight in {checkpoint} starts with prefix='{prefix}'; its names start with "
            f'{", ".join(names)}.'
        )
    try:
        backbone.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint} (prefix='{prefix}') does not fit {type(backbone).__name__}; use the "
            f'backbone config that it was trained with. {differences(str(error))}'
        ) from error
    told = f'; left out: {", ".join(left_out)}' if left_out else ''
    print_log(
        f'{type(backbone).__name__}: loaded {len(weights)} tensors of {checkpoint} '
        f"(prefix='{prefix}'){told}.",
        logger='current',
    )


def differences(told: str) -> str:
    """The first of what does not fit, in a sentence; of another network it is hundreds of lines.

    Args:
        told (str): The error of torch, or of MMEngine.

    Returns:
        str: Three names of each kind, and the number of others.
    """
    lists = {x[1].lower(): x[2].replace('"', '').split(', ') for x in _NAMES.finditer(told)}
    shapes = [
        f'{x[1]} ({x[2] or "one number"} in the file, {x[3] or "one number"} in the network)'
        for x in _SHAPES.finditer(told)
    ]
    found = {
        'Missing in the file': lists.get('missing', []),
        'not in the network': lists.get('unexpected', []),
        'of other shapes': shapes,
    }
    parts = [
        f'{kind}: {", ".join(names[:3])}' + (f' and {len(names) - 3} more' if names[3:] else '')
        for kind, names in found.items()
        if names
    ]
    sentence = '; '.join(parts) or (told.strip().splitlines() or ['No reason is told'])[0]
    return f'{sentence[0].upper()}{sentence[1:].rstrip(".")}.'


def _find_prefix(backbone: nn.Module, content: Mapping, checkpoint: str) -> str:
    """The start of the names of a network in a file that has all parameters of the backbone.

    If there is none, the one that has most, for the error that follows.
    """
    needed = {name for name, _ in backbone.named_parameters()}
    firsts = [name for name, _ in backbone.named_parameters()][:1] + [_TIMM_PATCHES]
    starts = {
        key.removesuffix(first)
        for key in content
        for first in firsts
        if f'.{key}'.endswith(f'.{first}')
    }
    starts = {start for start in starts if not _AVERAGE.search(start)} or starts
    missing = {x: len(needed - _select(backbone, content, x)[0].keys()) for x in sorted(starts)}
    whole = [start for start in missing if not missing[start]]
    if len(whole) > 1:
        raise CheckpointError(
            f'{checkpoint} holds {len(whole)} networks that fit {type(backbone).__name__}; name '
            f'one: {" or ".join(f"prefix={start!r}" for start in whole)} (of a '
            'command, by --cfg-options evaluation.prefix=...).'
        )
    return min(missing, key=lambda start: missing[start], default='')


def _select(backbone: nn.Module, content: Mapping, prefix: str) -> tuple[dict, list[str]]:
    """Weights under a prefix by the backbone's names, and the names of those left out."""
    weights = {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}
    known = backbone.state_dict().keys()
    if _TIMM_PATCHES in weights and _TIMM_PATCHES not in known:
        weights = {_from_timm(key): value for key, value in weights.items()}
    if 'register_tokens' in weights and 'reg_token' in known:
        weights = _from_dinov2(weights)
    left_out = [key for key in weights if key.startswith(_ADDED) and key not in known]
    return {k: v for k, v in weights.items() if k not in left_out}, left_out


def _from_dinov2(weights: dict) -> dict:
    """DINOv2 with registers as timm has it, where [CLS] holds its position."""
    positions = weights['pos_embed']
    return {
        **{name: value for name, value in weights.items() if name != 'register_tokens'},
        'reg_token': weights['register_tokens'],
        'cls_token': weights['cls_token'] + positions[:, :1],
        'pos_embed': positions[:, 1:],
    }


def _from_timm(name: str) -> str:
    return _renamed(name, _TIMM_NAMES)


def to_timm_name(name: str) -> str:
    """What timm calls a parameter of MMPretrain's ViT."""
    return _renamed(name, _MMPRETRAIN_NAMES)


def _renamed(name: str, changes: list[tuple[str, str]]) -> str:
    for pattern, replacement in changes:
        name = re.sub(pattern, replacement, name)
    return name


class StrictPretrained:
    """Mixin by which ``init_cfg=dict(type='Pretrained', ...)`` of a backbone is strict."""

    init_cfg: dict | list | None

    def init_weights(self) -> None:
        """Initialize by ``init_cfg``, from a checkpoint by :func:`load_backbone`.

        Raises:
            ValueError: If ``init_cfg`` names no checkpoint, or one that does not fit.
        """
        cfgs = self.init_cfg if isinstance(self.init_cfg, list | tuple) else [self.init_cfg]
        found = [cfg for cfg in cfgs if cfg and cfg.get('type') in ('Pretrained', PretrainedInit)]
        if not found:
            super().init_weights()  # type: ignore[misc]
            return
        checkpoint = found[-1].get('checkpoint')
        if not isinstance(checkpoint, str | os.PathLike):
            raise CheckpointError(
                f'{type(self).__name__}: init_cfg has checkpoint={checkpoint!r}; name a file or '
                'URL.'
            )
        load_backbone(self, str(checkpoint), found[-1].get('prefix'))  # type: ignore[arg-type]
        self._is_init = True
        # MMEngine's record of how each parameter began, which goes to the log.
        record: Any = getattr(self, '_params_init_info', None)
        for parameter in self.parameters() if record else ():  # type: ignore[attr-defined]
            mean = parameter.detach().mean().cpu()
            record[parameter].update(init_info=f'Loaded from {checkpoint}', tmp_mean_value=mean)
