"""What texts of the command line mean for a config."""

import inspect
import math
import os
import re

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from ser_mm.engine.configs import find_config
from ser_mm.engine.options import TAKEN_OUT, resolve_options, set_options, takes

CFG = dict(
    depths=[1, 2],
    model=dict(type='A', width=3, scale='dynamic', drop=None, steps=(1, 2), names=['x']),
    train_dataloader=dict(dataset=dict(data_root='data', data_prefix=dict(img='train'))),
    load_from=None,
)

MEANINGS = {
    'model.width=4': 4,
    'model.width=1e-3': 1e-3,
    'model.width=inf': math.inf,
    'model.width=True': True,
    'model.width=None': None,
    'model.width=a': 'a',
    'model.steps=3,4': [3, 4],
    'model.steps=(3,4)': (3, 4),
    'model.steps="[3,4]"': [3, 4],
    'model.steps=(3)': (3,),
    'model.steps=3,': [3],
    'model.steps=[]': [],
    'model.steps=[(1,2),[a, b c],None]': [(1, 2), ['a', 'b c'], None],
    'model.names=traffic light,car': ['traffic light', 'car'],
    "model.names=['a,b','2']": ['a,b', '2'],
    "model.drop={'type': 'D', 'p': [1, 2]}": {'type': 'D', 'p': [1, 2]},
    'model.drop=0.5': 0.5,
    'model.drop_path=0.5': 0.5,
    'model.type=B, c': 'B, c',
    'model.scale=512.': 512.0,
    'model.scale=[1,2]': [1, 2],
    'model.scale="512"': '512',
    'model.new="1,2"': '1,2',
    'train_dataloader.dataset.data_root=/my photos, 2012 (new)': '/my photos, 2012 (new)',
    'train_dataloader.dataset.data_root=2012': '2012',
    'train_dataloader.dataset.data_root=~/a': os.path.expanduser('~/a'),
    'train_dataloader.dataset.data_root=': '',
    'train_dataloader.dataset.data_prefix=007': '007',
    'train_dataloader.dataset.ann_file=1e3': '1e3',
    'train_dataloader.dataset.ann_file=[a.json,b.json]': ['a.json', 'b.json'],
    'load_from=~/a,b=c.pth': os.path.expanduser('~/a,b=c.pth'),
    'load_from=None': None,
    'work_dir=12': '12',
}


@pytest.mark.parametrize('text', MEANINGS)
def test_meaning(text):
    key, value = text.split('=', maxsplit=1)
    found = resolve_options(Config(CFG), {key: value})[key]
    assert found == MEANINGS[text] and type(found) is type(MEANINGS[text])


def test_values_that_are_no_texts_stay():
    assert resolve_options(Config(CFG), {'model.width': 2.5}) == {'model.width': 2.5}


def test_what_the_runner_reads_of_its_config_can_be_set():
    source = inspect.getsource(Runner)
    read = set(re.findall(r"\bcfg\.get\(\s*'(\w+)'", source))
    assert {'sync_bn', 'compile'} <= read
    for name in read:
        assert resolve_options(Config(CFG), {name: '3'})


REFUSED = {
    'modle.width=1': 'the config has no field modle; did you mean model?',
    'foo=1': 'the config has no field foo; those that are read are load_from, model, train_',
    '=1': 'the config has no field ;',
    'model.width.x=1': 'model.width is 3, which has no fields; set it as a whole: model.wid',
    'model.steps.0=1': 'model.steps is (1, 2), which has no fields',
    'model.names.0=y': 'set the list as a whole, model.names=[...]',
    'model.names.1=y': 'model.names is a list of 1; continue with a number from 0 to 0',
    'model.names.x.y=y': 'model.names is a list of 1',
    'model.width=[1': 'put it in quotes: model.width=\'"[1"\'',
    'model.width=(1]': 'the brackets of the list do not match',
}


@pytest.mark.parametrize('text', REFUSED)
def test_refused(text):
    key, value = text.split('=', maxsplit=1)
    with pytest.raises(ValueError) as error:
        resolve_options(Config(CFG), {key: value})
    assert REFUSED[text] in str(error.value) and '\n' not in str(error.value)


VARIABLES = {
    'train_pipeline.1.equi_ratio': ['train_dataloader.dataset.pipeline.1.equi_ratio'],
    'max_epochs': ['train_cfg.max_epochs'],
    'temperature': ['model.algorithm.head.temperature'],
    'algorithm.backbone.ser_layer': ['model.algorithm.backbone.ser_layer'],
    'vis_backends.0.type': ['visualizer.vis_backends.0.type'],
    'data_preprocessor.to_rgb': ['model.algorithm.data_preprocessor.to_rgb'],
    'photometry2.1.prob': ['train_dataloader.dataset.pipeline.1.transforms.1.2.prob'],
    'eval_pipeline.1.scale': [
        'evaluation.train.pipeline.1.scale',
        'evaluation.val.pipeline.1.scale',
    ],
}


@pytest.mark.parametrize('key', VARIABLES)
def test_a_variable_of_the_config_file_names_what_is_read(key):
    cfg = Config.fromfile(find_config('ser_mocov3_vits16'))
    with pytest.raises(ValueError, match='would change nothing') as error:
        resolve_options(cfg, {key: '1'})
    for place in VARIABLES[key]:
        assert place in str(error.value)
        set_options(cfg, {place: '7'})  # the advice works
        assert str(resolve_options(cfg, {place: '7'})[place]) == '7'


UNTAKEN = {
    'default_hooks.checkpoint.intervall': 'did you mean default_hooks.checkpoint.interval?',
    'default_hooks.checkpont.interval': 'did you mean default_hooks.checkpoint?',
    'custom_hooks.0.x': 'EpochSeedHook, has no field x; it takes none.',
    'model.loss_wieght': 'SERAlgorithm, has no field loss_wieght; did you mean model.loss_weight?',
    'model.backbone.depth': 'has no field backbone; did you mean model.algorithm.backbone?',
    'evaluation.vall': 'did you mean evaluation.val?',
    'evaluation.val.pipelin': 'did you mean evaluation.val.pipeline?',
    'train_cfg.max_epoch': 'did you mean train_cfg.max_epochs?',
    'train_dataloader.num_worker': 'did you mean train_dataloader.num_workers?',
    'optim_wrapper.optimizer.momentum': 'AdamW, has no field momentum; it takes amsgrad, betas,',
    'param_scheduler.0.foo': 'LinearLR, has no field foo; it takes begin, by_epoch, end,',
    'randomness.sed': 'did you mean randomness.seed?',
    'env_cfg.cudnn': 'it takes cudnn_benchmark, dist_cfg, mp_cfg, resource_limit.',
    'log_processor.window': 'did you mean log_processor.window_size?',
}


@pytest.mark.parametrize('key', UNTAKEN)
def test_fields_that_nothing_takes_are_refused(key):
    """Some were ignored; the interval failed when the first checkpoint was written."""
    cfg = Config.fromfile(find_config('ser_mocov3_vits16'))
    with pytest.raises(ValueError) as error:
        resolve_options(cfg, {key: '1'})
    assert UNTAKEN[key] in str(error.value) and '\n' not in str(error.value)


def test_new_fields_that_something_takes():
    cfg = Config.fromfile(find_config('ser_mocov3_vits16'))
    set_options(
        cfg,
        {
            'default_hooks.checkpoint.save_optimizer': 'False',
            'default_hooks.mine.type': 'CheckpointHook',
            'default_hooks.mine.interval': '2',
            'optim_wrapper.optimizer.type': 'SGD',
            'optim_wrapper.optimizer.momentum': '0.9',
            'optim_wrapper.clip_grad.max_norm': '1',
            'model.algorithm.backbone.init_cfg.checkpoint': 'a.pth',
            'evaluation.val.indices': '5',
            'custom_hooks.0.priority': 'LOW',
        },
    )
    assert cfg.default_hooks.mine == dict(type='CheckpointHook', interval=2)
    # What a dict in braces says counts for the other options, and is looked at itself.
    whole = '{"_delete_": True, "type": "SGD", "lr": 0.1}'
    set_options(cfg, {'optim_wrapper.optimizer': whole, 'optim_wrapper.optimizer.momentum': '0.9'})
    assert cfg.optim_wrapper.optimizer == dict(type='SGD', lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match='checkpoint.intervall: .* did you mean'):
        resolve_options(cfg, {'default_hooks.checkpoint': "{'intervall': 1}"})


@pytest.mark.parametrize(
    'options',
    [
        {'model.backbone.type': 'TIMMBackbone', 'model.backbone.drop_rate': '0.1'},
        {'model.type': 'TimmClassifier', 'model.model_name': 'resnet18'},
        {'train_dataloader.disable_subprocess_warning': 'True'},
        {'evaluation.test.type': 'CustomDataset'},
        {'compile.target': 'forward'},
    ],
)
def test_names_that_a_class_or_mmengine_hands_elsewhere(options):
    resolve_options(Config.fromfile(find_config('finetune_mocov3_vits16')), options)


CONFIGS = find_config('ser_mocov3_vits16').parent
SHIPPED = sorted(file for file in CONFIGS.rglob('*.py') if '_base_' not in str(file))


@pytest.mark.parametrize('file', SHIPPED, ids=lambda file: file.stem)
def test_fields_of_shipped_configs_are_taken(file):
    """What the check knows of a class is what the class takes."""
    cfg = Config.fromfile(file)
    found = 0
    for place, node in _dicts('', cfg._cfg_dict):
        known = takes(cfg, place, node)
        if known and not known[1]:
            found += 1
            assert node.keys() <= known[0] | TAKEN_OUT, place
    assert found > 10


def _dicts(place, node):
    if isinstance(node, dict) and place:
        yield place, node
    if isinstance(node, dict | list | tuple):
        for name, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _dicts(f'{place}.{name}'.lstrip('.'), child)


def test_variables_that_code_of_the_user_may_read():
    cfg = Config(dict(CFG, my_setting=dict(a=1)))
    set_options(cfg, {'my_setting.a': '2', 'runner_type': 'FlexibleRunner', 'evaluation': 'None'})
    assert cfg.my_setting.a == 2 and cfg.evaluation is None
    cfg = Config(dict(data_preprocessor=dict(mean=[1.0]), model=dict(type='A')))
    set_options(cfg, {'data_preprocessor.mean': '2,3'})  # no copy: models take this one
    assert cfg.data_preprocessor.mean == [2, 3]
