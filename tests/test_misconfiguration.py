"""Every argument of every registered class, given what it cannot mean.

The cases come from the signatures. A value is refused in one sentence that names the argument and
the value. One that is accepted has to be of the annotated type, and the object works. Zero, what is
negative or infinite, and what is empty count as meant only if the documentation of the argument
says so, or if it is the default.
"""

import ast
import collections.abc
import copy
import inspect
import math
import re
import types
import typing

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict

from tests.support import short_run
from tests.support.registered import parameters, registered, rows

KINDS = registered()
WRONG = {
    'wrong type': object(),
    'None': None,
    'nan': math.nan,
    'inf': math.inf,
    '0': 0,
    '-1': -1,
    'empty string': '',
    'empty list': [],
    'string': 'no',
}
# Plausible, though what MMPretrain documents does not say so.
ALSO_MEANT = {
    ('frozen_stages', 0),  # the stem alone
    ('max_refetch', 0),  # stop at the first unreadable image
    ('pad_value', -1),  # any number
    ('score_thr', 0),  # all detections
}
# Accepted by type, and refused by a library below in words of its own: at most five in all.
OBSCURE = {
    'AtomicCheckpointHook.save_best, string',  # "Cannot infer the rule for key no"
    'CPUAmpOptimWrapper.optimizer, quoted',  # MMEngine hands it in, built; its text has many lines
    'ImageSource.data_root, string',  # "no does not exist; give a folder of images"
}


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    return rows(tmp_path_factory.mktemp('data'))


def test_every_registered_class_is_in_the_table(table):
    assert KINDS.keys() <= table.keys()
    assert {'SERAlgorithm', 'SERVisionTransformer', 'EquivariantViewPipeline'} <= KINDS.keys()
    assert len(OBSCURE) <= 5


def documentation(kind, name):
    """What the docstrings of a class and its bases say of an argument, the nearest."""
    for base in kind.__mro__:
        lines = inspect.cleandoc(base.__doc__ or '').splitlines()
        for i, line in enumerate(lines):
            if re.match(rf'    {name} ?\(', line):
                rest = lines[i + 1 :]
                end = next((j for j, x in enumerate(rest) if x[:5].strip()), len(rest))
                return ' '.join([line, *rest[:end]])
    return ''


def allowed_types(kind, parameter):
    """By annotation, without what narrows it; else by the documentation and the default."""
    for base in kind.__mro__:
        initialize = inspect.unwrap(vars(base).get('__init__', object.__init__))
        if parameter.name in inspect.signature(initialize).parameters:
            hint = typing.get_type_hints(initialize).get(parameter.name)
            if hint is not None:
                return set(_classes(hint))
            break
    text = documentation(kind, parameter.name).partition(')')[0].lower()
    named = {x for name, x in NAMES.items() if re.search(rf'\b{name}\b', text)}
    return named | {type(parameter.default)} - {type(inspect.Parameter.empty)}


NAMES = dict(
    int=int, float=float, bool=bool, str=str, dict=dict, list=list, tuple=tuple, sequence=list
)


def _classes(hint):
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from _classes(part)
    else:
        yield hint if origin is typing.Literal else origin or hint


def is_meant(kind, parameter, value):
    """Whether a value may be meant, whatever is accepted."""
    name, default = parameter.name, parameter.default
    if value is default or (type(value) is int and (name, value) in ALSO_MEANT):
        return True
    allowed = allowed_types(kind, parameter)
    text = documentation(kind, name)
    if value is None:
        return type(None) in allowed
    if isinstance(value, str):
        choices = [typing.get_args(x) for x in allowed if typing.get_origin(x) is typing.Literal]
        if any(value in choice for choice in choices) or value == default:
            return True
        return str in allowed and (value != '' or "''" in text)
    if isinstance(value, int | float):
        if not allowed & {int, float} or (isinstance(value, float) and float not in allowed):
            return False
        if value == default and type(default) is not bool:
            return True
        if value > 0:
            return value < math.inf or 'inf' in text
        return bool(re.search(rf'(?<![\w.-]){value}(?!\w|\.\d)', text))
    if isinstance(value, list):
        empty = '[]' in text or (isinstance(default, list | tuple) and not default)
        listed = allowed & {list, tuple, collections.abc.Sequence}
        return bool(listed) and (len(value) > 0 or empty)
    return False


def values(parameter, base):
    """Wrong values of an argument, by what they are."""
    found = dict(WRONG)
    right = base.get(parameter.name, parameter.default)
    if right is None or right is parameter.empty or isinstance(right, torch.nn.Module):
        return found
    if not isinstance(right, str):
        found['quoted'] = str(right)
    if isinstance(right, list | tuple) and right:
        found['one more'] = [*right, right[0]]
        found['one less'] = [*right][1:]
    elif isinstance(right, int | float):
        found['two for one'] = [right, right]
    return found


def outcome(kind, row, parameter, value):
    arguments = {**copy.deepcopy(row.arguments), parameter.name: value}
    try:
        row.use(kind(**arguments))
    except Exception as error:
        message = str(error)
        shown = {repr(value), str(value), *([f'{len(value)} '] if isinstance(value, list) else [])}
        valued = value in (None, '', []) or any(x[:60] in message for x in shown)
        named = re.search(rf'\b{parameter.name}\b', message, re.IGNORECASE)
        if named and valued and '\n' not in message:
            return 'clear'
        return f'obscure: {type(error).__name__}: {message}'
    return 'works' if is_meant(kind, parameter, value) else 'silent'


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.filterwarnings('ignore:SERAlgorithm. neither')
def test_what_cannot_be_meant_is_refused_in_one_sentence(name, table):
    kind, row = KINDS[name], table[name]
    row.use(kind(**copy.deepcopy(row.arguments)))
    found = {
        f'{name}.{parameter.name}, {what}': outcome(kind, row, parameter, value)
        for parameter in parameters(kind).values()
        for what, value in values(parameter, row.arguments).items()
    }
    assert [case for case, result in found.items() if result == 'silent'] == []
    obscure = {case: result for case, result in found.items() if result.startswith('obscure')}
    assert obscure.keys() <= OBSCURE, obscure


def other_forms(right):
    """A right value as other packages and config files write it."""
    if isinstance(right, bool):
        yield np.bool_(right)
    elif isinstance(right, int):
        yield np.int64(right)
    elif isinstance(right, float):
        yield np.float64(right)
        yield np.float32(right)
    elif isinstance(right, list | tuple):
        yield list(right)
        yield tuple(right)
        yield ConfigDict(x=list(right)).x
    elif isinstance(right, dict):
        yield ConfigDict(right)


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.filterwarnings('ignore:SERAlgorithm. neither')
def test_what_is_meant_is_accepted_in_other_forms(name, table):
    kind, row = KINDS[name], table[name]
    for parameter in parameters(kind).values():
        right = row.arguments.get(parameter.name, parameter.default)
        if right is parameter.empty:
            continue
        for value in other_forms(right):
            arguments = {**copy.deepcopy(row.arguments), parameter.name: value}
            row.use(kind(**arguments))


CROP, FLIP = short_run.CROP, short_run.FLIP
# Class, argument, what one may well write, and what is said of it.
SLIPS = [
    ('SERAlgorithm', 'detach_keys', 'no', 'True or False; leave it out for False'),
    ('SERAlgorithm', 'detach_keys', 'False', 'True or False; write False'),
    ('SERAlgorithm', 'detach_keys', 1, 'True or False'),
    ('SERAlgorithm', 'loss_weight', -1, 'of at least 0'),
    ('SERAlgorithm', 'loss_weight', math.inf, 'finite'),
    ('SERAlgorithm', 'loss_weight', '1e-1', 'write 0.1'),
    ('SERAlgorithm', 'loss_weight', True, 'a finite number'),
    ('SERAlgorithm', 'loss_weight', [1.0], 'a finite number'),
    ('SERAlgorithm', 'algorithm', 'mocov3', 'a dict with `type`'),
    ('SERAlgorithm', 'algorithm', dict(base_momentum=0.01), 'a dict with `type`'),
    ('SERAlgorithm', 'neck', 'SERNeck', 'a dict or None'),
    ('SERAlgorithm', 'head', 0.5, 'a dict or None'),
    ('SERAlgorithm', 'head', dict(temperature=math.inf), 'temperature=inf must be'),
    ('SERAlgorithm', 'head', dict(temperature=-0.5), 'temperature=-0.5 must be'),
    ('SERAlgorithm', 'neck', dict(hid_channels=0), 'hid_channels=0 must be'),
    ('SERAlgorithm', 'init_cfg', 'weights.pth', 'a dict with `type`'),
    ('SERVisionTransformer', 'ser_layer', 2.5, 'an integer or None'),
    ('SERVisionTransformer', 'ser_layer', 2.0, 'write 2'),
    ('SERVisionTransformer', 'ser_layer', '3', 'write 3'),
    ('SERVisionTransformer', 'ser_layer', [3], 'an integer or None'),
    ('SERVisionTransformer', 'ser_layer', True, 'an integer or None'),
    ('SERVisionTransformer', 'stop_grad_conv1', 'False', 'write False'),
    ('SERVisionTransformer', 'with_cp', 'true', 'write True'),
    ('SERVisionTransformer', 'img_size', '224', 'write 224'),
    ('SERVisionTransformer', 'img_size', (224, 224, 3), '2 values'),
    ('SERVisionTransformer', 'drop_path_rate', 10, r'within \[0, 1\]'),
    ('SERVisionTransformer', 'out_type', 'cls', "'cls_token' or "),
    ('SERResNet', 'depth', '18', 'write 18'),
    ('SERResNet', 'ser_layer', '2', 'write 2'),
    ('SERResNet', 'strides', (1, 2, 2), '3 values for num_stages=4'),
    ('SERHead', 'temperature', '0.5', 'write 0.5'),
    ('SERHead', 'block_size', 1e3, 'write 1000'),
    ('SERNeck', 'hid_channels', '512', 'write 512'),
    ('SERDataPreprocessor', 'scale', 0.7, '2 values'),
    ('SERDataPreprocessor', 'scale', (1.3, 0.7), 'the smaller one first'),
    ('SERDataPreprocessor', 'scale', (0.7, 1.0, 1.3), '2 values'),
    ('SERDataPreprocessor', 'scale', ('0.7', '1.3'), 'a finite number above 0'),
    ('SERDataPreprocessor', 'scale', '(0.7, 1.3)', r'write \(0.7, 1.3\)'),
    ('SERDataPreprocessor', 'patch_size', (8, 8), 'an integer of at least 1'),
    ('SERDataPreprocessor', 'mean', 123.675, 'for one or three channels'),
    ('SERDataPreprocessor', 'mean', [0.5, 0.5], 'for one or three channels'),
    ('SERDataPreprocessor', 'std', [0, 0, 0], 'above 0'),
    ('SERDataPreprocessor', 'to_rgb', 'yes', 'True or False'),
    ('SERDataPreprocessor', 'photometry', dict(type='Solarize', thr=128), 'a list'),
    ('EquivariantViewPipeline', 'views', [CROP, FLIP], 'a list'),
    ('EquivariantViewPipeline', 'views', [[CROP, FLIP]], '1 views'),
    ('EquivariantViewPipeline', 'views', 2, 'a list'),
    ('EquivariantViewPipeline', 'views', [['RandomFlip'], []], 'with `type`'),
    ('EquivariantViewPipeline', 'equi_crop', 'RandomResizedCrop', 'a list'),
    ('EquivariantViewPipeline', 'equi_crop', [[CROP]], 'a list'),
    ('EquivariantViewPipeline', 'equi_views', [], '0 equi_views'),
    ('EquivariantViewPipeline', 'equi_views', [[], [], []], '3 equi_views'),
    ('EquivariantViewPipeline', 'equi_views', short_run.JITTER, 'a list'),
    ('EquivariantViewPipeline', 'equi_ratio', 10, r'within \[0, 1\]'),
    ('EquivariantViewPipeline', 'equi_ratio', '0.1', 'write 0.1'),
    ('EquivariantViewPipeline', 'num_views', '[1, 1]', r'write \[1, 1\]'),
    ('EquivariantViewPipeline', 'num_views', [1, 1, 1], '3 numbers for 2 pipelines'),
    ('DINO', 'head', dict(type='DINOHead', out_channels=50), 'neck.out_channels=40, but head'),
    ('DINO', 'base_momentum', 0, 'between 0 and 1'),
    ('DINO', 'base_momentum', 1.004, 'between 0 and 1'),
    ('DINOHead', 'warmup_epochs', 2.5, 'an integer'),
    ('DINONeck', 'fixed_norm', 'False', 'write False'),
    ('SimpleFPN', 'scale_factors', 4, 'a list'),
    ('SimpleFPN', 'scale_factors', (0.5, 1, 2, 4), 'from the largest down'),
    ('FreezeLayerHook', 'epochs', '1', 'write 1'),
    ('FreezeLayerHook', 'layer', 3, 'a string'),
    ('NonFiniteLossHook', 'interval', 0, 'of at least 1'),
    ('AtomicCheckpointHook', 'interval', 0, 'of at least 1, or -1'),
    ('AtomicCheckpointHook', 'max_keep_ckpts', '2', 'write 2'),
    ('AtomicCheckpointHook', 'by_epoch', 'False', 'write False'),
    ('EquivarianceHook', 'transformations', 'mixture', 'a list'),
    ('BundledPhotos', 'split', 'test', "'train' or 'val'"),
    ('BundledPhotos', 'data_prefix', 'train', "must be ''"),
]


@pytest.mark.parametrize('name, argument, value, said', SLIPS)
def test_plausible_slips(name, argument, value, said, table):
    with pytest.raises(ValueError, match=said) as error:
        KINDS[name](**{**copy.deepcopy(table[name].arguments), argument: value})
    message = str(error.value)
    assert re.search(rf'\b{argument}\b|{said}', message) and '\n' not in message
    assert message.endswith('.')


def test_a_remedy_works_when_followed(table):
    """What is said to write is accepted, where something is."""
    followed = 0
    for name, argument, value, _ in SLIPS:
        kind, arguments = KINDS[name], copy.deepcopy(table[name].arguments)
        with pytest.raises(ValueError) as error:
            kind(**{**arguments, argument: value})
        if found := re.search(r'; write (.+)\.$', str(error.value)):
            kind(**{**arguments, argument: ast.literal_eval(found[1])})
            followed += 1
        elif re.search('; leave it out', str(error.value)):
            arguments.pop(argument, None)
            kind(**arguments)
            followed += 1
    assert followed > len(SLIPS) // 2


def test_arguments_by_position_are_looked_at():
    for build in (
        lambda: KINDS['SERNeck'](4, '512'),
        lambda: KINDS['ForeachCosineEMA'](torch.nn.Linear(2, 2), 0.004, math.nan),
        lambda: KINDS['SERVisionTransformer']('deit-tiny', '224'),
    ):
        with pytest.raises(ValueError, match="(hid_channels|end_momentum|img_size)=('|nan)"):
            build()


def test_who_does_not_build_a_class_is_told_what_is_missing():
    with pytest.raises(TypeError, match='in_channels'):
        KINDS['SERNeck']()
    with pytest.raises(TypeError, match='hidden_channels'):
        KINDS['SERNeck'](4, hidden_channels=3)
