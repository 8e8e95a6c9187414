"""Fields of a config that the command line sets: which exist, and what their text means."""

import difflib
import inspect
import logging
import os
import re
from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mmengine.registry
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import RUNNERS, Registry
from mmengine.runner import (
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    LogProcessor,
    Runner,
    TestLoop,
    ValLoop,
)
from torch.utils.data import DataLoader

from ser_mm.arguments import constructors, takes_more

# What is read from a config beside the Runner's arguments, by MMEngine or by the commands.
_ALSO_READ = {
    'evaluation',
    'runner_type',
    'model_wrapper_cfg',
    'sync_bn',
    'find_unused_parameters',
    'compile',
    'activation_checkpointing',
    'efficient_conv_bn_eval',
    'tta_model',
    'tta_pipeline',
}
# Not drop_path, which is a number.
_PATH = re.compile(
    r'(?:^|(?<!drop)_)(?:root|prefix|file|dir|path|folder|checkpoint|pretrained|load_from)$'
)
# What MMEngine makes of a dict that need not name its type.
_DEFAULT_TYPES: dict[str, Callable] = {
    'train_dataloader': DataLoader,
    'val_dataloader': DataLoader,
    'test_dataloader': DataLoader,
    'val_cfg': ValLoop,
    'test_cfg': TestLoop,
    'optim_wrapper': OptimWrapper,
    'log_processor': LogProcessor,
    'compile': torch.compile,
}
# Of dicts that are no object's.
_FIELDS = {
    'default_hooks': {
        *('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint'),
        'visualization',  # OpenMMLab's configs have it
    },
    'evaluation': {'train', 'val', 'prefix'},
    'env_cfg': {'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'},
    'randomness': {'seed', 'deterministic', 'diff_rank_seed'},
    'auto_scale_lr': {'enable', 'base_batch_size'},
}
# What MMEngine takes out of a dict before its object is built.
TAKEN_OUT = {
    *('type', '_scope_', '_delete_', 'priority', 'constructor', 'paramwise_cfg'),
    *('num_batch_per_epoch', 'disable_subprocess_warning', 'convert_to_iter_based', 'by_epoch'),
    'target',  # of compile
}
# In place of a name that is close to one of a class that takes names beyond its own.
_CLOSE = 0.85
_MISSING = object()
_NAMED = {'true': True, 'false': False}
_BRACKETS = {'[': ']', '(': ')'}


def set_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Set fields of a config.

    Args:
        cfg (Config): Changed in place.
        options (Mapping[str, Any]): See :func:`resolve_options`.

    Raises:
        ValueError: See :func:`resolve_options`.
    """
    cfg.merge_from_dict(resolve_options(cfg, options))


def resolve_options(cfg: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the texts of a command line mean for a config, checked to change something.

    A text in quotes is a string as it is. So is one for a field that holds a string, or that names
    a path, with a leading ``~`` expanded: commas, spaces and digits are part of it. In place of
    other strings, numbers, ``True``, ``False``, ``None`` and lists in brackets are read; elsewhere
    also lists without brackets, ``a,b``.

    Args:
        cfg (Config): The config.
        options (Mapping[str, Any]): Texts by the place of the field, as in
            'model.backbone.depth'. Other values stay as they are.

    Returns:
        dict[str, Any]: Values by the place, for ``cfg.merge_from_dict``.

    Raises:
        ValueError: If nothing reads the field, the class it is set for does not take it, its place
            is not in the config, or the brackets of a list do not match.

    Example:
        >>> cfg = Config(dict(data_root='data', model=dict(depths=[1, 2])))
        >>> resolve_options(cfg, {'model.depths': '3,4', 'data_root': '2012, May'})
        {'model.depths': [3, 4], 'data_root': '2012, May'}
    """
    resolved = {}
    for key, value in options.items():
        existing = _find(cfg, key)
        _check_is_read(cfg, key)
        try:
            resolved[key] = _meaning(key, value, existing) if isinstance(value, str) else value
        except _Brackets as error:
            raise ValueError(
                f'--cfg-options {key}={value}: the brackets of the list do not match; if it is a '
                f"""string, put it in quotes: {key}='"{value}"'."""
            ) from error
    fields = dict(_fields('', resolved))
    for key in fields:
        _check_is_taken(cfg, key, fields)
    return resolved


def _fields(start: str, options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options, and what is in those that are dicts, by place."""
    for name, value in options.items():
        yield f'{start}{name}', value
        if isinstance(value, dict):
            yield from _fields(f'{start}{name}.', value)


class _Brackets(ValueError):
    """Brackets of a list do not match."""


def _find(cfg: Config, key: str) -> Any:
    """The value at a place, or ``_MISSING`` if there is none yet."""
    node, place = cfg._cfg_dict, ''
    parts = key.split('.')
    for i, part in enumerate(parts):
        if isinstance(node, dict):
            node = node.get(part, _MISSING)
            if node is _MISSING:
                return _MISSING
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
            if i == len(parts) - 1 and not isinstance(node, dict):
                raise ValueError(
                    f'--cfg-options {key}: set the list as a whole, {place}=[...]; of an element '
                    'that is no dict nothing can be set.'
                )
        elif isinstance(node, list):
            raise ValueError(
                f'--cfg-options {key}: {place} is a list of {len(node)}; continue with a number '
                f'from 0 to {len(node) - 1}.'
            )
        else:
            raise ValueError(
                f'--cfg-options {key}: {place} is {node!r}, which has no fields; set it as a '
                f'whole: {place}="{{{".".join(parts[i:])!r}: ...}}".'
            )
        place = f'{place}.{part}'.lstrip('.')
    return node


def read_fields(cfg: Config) -> set[str]:
    """Fields of the first level that MMEngine or a command may read.

    Args:
        cfg (Config): The config, by whose ``runner_type`` the Runner is chosen.

    Returns:
        set[str]: Their names. Others are variables, of which a config file holds copies elsewhere.
    """
    runner = Runner
    if isinstance(cfg.get('runner_type'), str):
        runner = RUNNERS.get(cfg.runner_type) or Runner
    return {*inspect.signature(runner).parameters, *_ALSO_READ} - {'cfg'}


def _check_is_read(cfg: Config, key: str) -> None:
    """Refuse a field that nothing reads: a slip, or a variable whose value was copied."""
    top, _, rest = key.partition('.')
    read = read_fields(cfg)
    # Models of most configs have a data_preprocessor of their own, a copy too, which counts.
    model = cfg.get('model') or {}
    own = model.get(top) or (model.get('algorithm') or {}).get(top)
    if top in read and not (top == 'data_preprocessor' and top in cfg and own):
        return
    if top not in cfg:
        near = difflib.get_close_matches(top, read, n=1) or _deeper(cfg, '', top)
        known = ', '.join(sorted(read.intersection(cfg)))
        remedy = f'did you mean {near[0]}?' if near else f'those that are read are {known}.'
        raise ValueError(f'--cfg-options {key}: the config has no field {top}; {remedy}')
    value, part, parts = cfg[top], top, rest.split('.') if rest else []
    while True:
        copies = [
            '.'.join([place, *parts])
            for field in cfg
            if field in read and field != top
            for place in _places(field, cfg[field], part, value)
        ]
        if copies:
            raise ValueError(
                f'--cfg-options {key} would change nothing: {top} is a variable of the config '
                f'file, and what is read is a copy; set {" and ".join(copies[:6])}.'
            )
        if not parts or not isinstance(value, dict | list):
            break
        # A list may have been put together from several; their elements are found then.
        part, *parts = parts
        value = value.get(part) if isinstance(value, dict) else value[int(part)]
    if top not in read:
        print_log(
            f'--cfg-options {key}: nothing of MMEngine reads {top}; it matters to code of yours '
            'only.',
            'current',
            logging.WARNING,
        )


def _check_is_taken(cfg: Config, key: str, options: Mapping[str, Any]) -> None:
    """Refuse a new field that what is built from its dict does not take."""
    node, place = cfg._cfg_dict, ''
    for part in key.split('.'):
        if isinstance(node, dict) and part not in node and (place or part == key):
            break
        if isinstance(node, dict):
            node = node.get(part, {})
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            return
        place = f'{place}.{part}'.lstrip('.')
    else:
        return
    named = (f'{place}.{part}', f'{place}.{part}.type')
    if place == 'default_hooks' and not options.keys().isdisjoint(named):  # a hook of that name
        return
    if not isinstance(node, dict) or not place:
        return
    kind = options.get(f'{place}.type', node.get('type'))
    found = takes(cfg, place, {**node, 'type': kind} if kind else node)
    if found is None:
        return
    names, more = found
    near = difflib.get_close_matches(part, names - {part}, n=1, cutoff=_CLOSE if more else 0.6)
    if part in names or part in TAKEN_OUT or (more and not near):
        return
    near = [f'{place}.{x}' for x in near] or _deeper(node, f'{place}.', part)
    takes_these = f'it takes {", ".join(sorted(names)) or "none"}.'
    remedy = f'did you mean {near[0]}?' if near else takes_these
    owner = place if kind is None else f'{place}, {getattr(kind, "__name__", kind)},'
    raise ValueError(f'--cfg-options {key}: {owner} has no field {part}; {remedy}')


def _deeper(node: Mapping, start: str, name: str) -> list[str]:
    """Places of a name further down in a dict, the first level's before the second's."""
    inner = {f'{start}{k}.': v for k, v in node.items() if isinstance(v, dict)}
    found = [f'{place}{name}' for place, child in inner.items() if name in child]
    return found + [x for place, child in inner.items() for x in _deeper(child, place, name)]


def takes(cfg: Config, place: str, node: Mapping) -> tuple[set[str], bool] | None:
    """Which fields a dict of a config may have, but for what MMEngine takes out of any.

    Args:
        cfg (Config): The config.
        place (str): Place of the dict, as in 'model.backbone'.
        node (Mapping): The dict.

    Returns:
        tuple[set[str], bool], optional: Their names, and whether there may be others. None if that
        is not known.
    """
    if place in _FIELDS:
        return _FIELDS[place], place == 'evaluation'  # other sets may have other names there
    if '.' in place and place.endswith('_cfg'):  # of a layer, from which its builder takes more
        return None
    kind = node.get('type', _DEFAULT_TYPES.get(place))
    if kind is None and place == 'train_cfg':
        kind = EpochBasedTrainLoop if node.get('by_epoch', True) else IterBasedTrainLoop
    kinds = _registered(kind, cfg.get('default_scope')) if isinstance(kind, str) else [kind]
    found = [_parameters(kind) for kind in kinds if callable(kind)]
    if not found:
        return None
    return set().union(*(names for names, _ in found)), any(more for _, more in found)


def _registered(name: str, scope: str | None) -> list[Callable]:
    """What a type may stand for, in any registry."""
    roots = [x for x in vars(mmengine.registry).values() if isinstance(x, Registry)]
    found = [root.children.get(scope, root).get(name) for root in roots]
    return [kind for kind in found if kind]


def _parameters(kind: Callable) -> tuple[set[str], bool]:
    """Names of the parameters, with those that a class hands on, and whether there are others."""
    functions = list(constructors(kind)) if isinstance(kind, type) else [kind]
    # Some hand them to something else than a base, as to a network of timm.
    keep = [x for x in functions if takes_more(x) and not _hands_on(x)]
    names = {
        x.name
        for function in functions
        for x in inspect.signature(function).parameters.values()
        if x.kind in (x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY) and x.name != 'self'
    }
    return names, bool(keep) or bool(functions) and takes_more(functions[-1])


def _hands_on(constructor: Callable) -> bool:
    """Whether a constructor gives its ``**kwargs`` to that of a base."""
    try:
        source = inspect.getsource(constructor)
    except (OSError, TypeError):  # of an extension
        return False
    return re.search(r'\.__init__\((?:[^()]|\([^()]*\))*\*\*\w+\s*,?\s*\)', source) is not None


def _places(place: str, node: Any, name: str, value: Any) -> Iterator[str]:
    """Where a value has been copied to: equal lists and dicts, equal scalars of the same name."""
    if node == value and type(node) is type(value):
        if (isinstance(value, dict | list | tuple) and value) or place.endswith(f'.{name}'):
            yield place
            return
    if isinstance(node, dict | list | tuple):
        for part, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _places(f'{place}.{part}', child, name, value)


def _meaning(key: str, text: str, existing: Any) -> Any:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in '\'"'
    unknown = existing is None or existing is _MISSING
    if quoted and (unknown or isinstance(existing, str)):
        return text[1:-1]
    text = text.strip('\'"') if quoted else text
    listed = _is_list(text) or text[:1] + text[-1:] == '{}'
    name = next((part for part in reversed(key.split('.')) if not part.isdigit()), '')
    if _PATH.search(name) and not listed and (unknown or isinstance(existing, str | dict)):
        return None if text == 'None' else os.path.expanduser(text)
    if isinstance(existing, str) and not listed:
        value = _scalar(text)
        return os.path.expanduser(text) if isinstance(value, str) else value
    value = _parse(text)
    return os.path.expanduser(value) if isinstance(value, str) else value


def _is_list(text: str) -> bool:
    return text[:1] in _BRACKETS and text[-1:] == _BRACKETS[text[0]]


def _parse(text: str) -> Any:
    """A number, a name of Python, a string, or a list of these."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in '\'"':
        return text[1:-1]
    if text.startswith('{') and text.endswith('}'):
        try:
            return literal_eval(text)
        except (SyntaxError, ValueError):
            return text
    elements = _split(text)
    if len(elements) > 1:
        return [_parse(element) for element in elements if element.strip()]
    if _is_list(text):
        inner = [_parse(element) for element in _split(text[1:-1]) if element.strip()]
        return tuple(inner) if text[0] == '(' else inner
    return _scalar(text)


def _scalar(text: str) -> Any:
    if text.lower() in _NAMED:
        return _NAMED[text.lower()]
    if text == 'None':
        return None
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def _split(text: str) -> list[str]:
    """Elements between the commas that are in no brackets and no quotes."""
    parts, start, closing, quote = [], 0, [], ''
    for i, char in enumerate(text):
        if quote:
            quote = '' if char == quote else quote
        elif char in '\'"' and text[start:i].rstrip()[-1:] in ('', *'[({,:'):
            quote = char
        elif char in '[({':
            closing.append({**_BRACKETS, '{': '}'}[char])
        elif char in '])}':
            if not closing or closing.pop() != char:
                raise _Brackets
        elif char == ',' and not closing:
            parts.append(text[start:i])
            start = i + 1
    if closing:
        raise _Brackets
    return [*parts, text[start:]]
