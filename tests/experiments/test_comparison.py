"""Arms of a comparison on generated images in Tiny ImageNet's layout."""

import json
import re
from pathlib import Path

import pytest
from mmengine.config import Config

from ser_mm.engine.configs import find_config
from ser_mm.evaluation.metrics import paired_difference
from ser_mm.evaluation.results import format_mean
from ser_mm.evaluation.robustness import CORRUPTIONS
from ser_mm.experiments import measures
from ser_mm.experiments.comparison import ARMS, _precision, _recipe, arm_config
from ser_mm.experiments.differences import COLUMNS, report_comparison
from ser_mm.experiments.measures import MEASURES, measure
from ser_mm.experiments.sweeps import load_base
from tests.support.command import run_command
from tests.support.tiny_imagenet import write_tiny_imagenet

CONFIG = 'tiny_imagenet/ser_mocov3_tiny_imagenet_short'
ROOT = Path(__file__).resolve().parents[2]


def results(**values):
    """A run of each arm and seed, by the values of its probe."""
    runs = [
        dict(arm=arm, seed=seed, probe=value)
        for arm, found in values.items()
        for seed, value in enumerate(found)
    ]
    return dict(runs=runs)


def test_differences_are_paired_by_seed():
    """Arms that differ less than seeds do."""
    text = report_comparison(results(baseline=[0.1, 0.2, 0.3], SER=[0.11, 0.22, 0.33]))
    assert '| linear probe | 0.200 ± 0.100 | 0.220 ± 0.110 |' in text
    # 0.02 ± 4.3027 x 0.01 / sqrt(3), by a table of Student's t
    assert '| SER - baseline |    mean |      95 % interval |     p | positive |' in text
    assert '| linear probe   | +0.0200 | -0.0048 to +0.0448 | 0.074 |   3 of 3 |' in text


def test_arm_of_other_seeds_is_shown_and_not_compared():
    found = results(baseline=[0.1, 0.2], SER=[0.3])
    found['runs'][-1]['seed'] = 7
    text = report_comparison(found)
    assert '| runs         |             2 |     1 |' in text and 'SER - baseline' not in text


def test_mean_of_fewer_runs_says_so():
    found = results(baseline=[0.1, 0.2], SER=[0.3, 0.5])
    found['runs'][0]['knn'] = 0.25
    assert '| k-NN         | 0.250 (1 of 2) |             - |' in report_comparison(found)


def test_differences_are_of_the_seeds_that_have_both():
    found = results(baseline=[0.1, 0.2, 0.3], SER=[0.1, 0.2, 0.4])
    for run in found['runs'][:2] + found['runs'][3:]:
        run['knn'] = run['probe']
    assert '| k-NN           | +0.0000 |' in report_comparison(found)


def arms(config=CONFIG, names=ARMS, **options):
    cfg = load_base(find_config(config), options)
    return {name: arm_config(cfg, name, 0, Path('work'), options) for name in names}


def test_options_reach_every_arm_that_has_them():
    found = arms(
        **{
            'model.algorithm.backbone.drop_path_rate': 0.1,
            'model.algorithm.backbone.ser_layer': 3,
            'model.algorithm.base_momentum': 0.02,
            'model.head.temperature': 0.3,
            'train_dataloader.batch_size': 64,
        }
    )
    assert len({cfg.work_dir for cfg in found.values()}) == len(ARMS)
    backbones, momenta = {}, {}
    for name, cfg in found.items():
        assert cfg.train_dataloader.batch_size == 64
        algorithm = cfg.model.get('algorithm') or cfg.model
        momenta[name] = algorithm.get('base_momentum')
        backbones[name] = algorithm.backbone
    assert momenta.pop('supervised') is None and set(momenta.values()) == {0.02}
    assert {x.drop_path_rate for x in backbones.values()} == {0.1}
    # SER's layer moves [CLS] where SER has it, and nowhere else.
    layers = {name: (x.get('ser_layer'), x.get('cls_layer')) for name, x in backbones.items()}
    assert layers == dict(
        untrained=(None, None),
        baseline=(None, None),
        late_cls=(None, 3),
        views_only=(3, None),
        ser=(3, None),
        ser_early_cls=(3, 0),
        supervised=(None, None),
    )


def test_late_cls_is_where_ser_has_it():
    for layer in (0, 1):
        options = {'model.algorithm.backbone.cls_layer': layer}
        found = arms(names=['late_cls', 'baseline'], **options)
        assert found['late_cls'].model.backbone.cls_layer == layer
        assert 'cls_layer' not in found['baseline'].model.backbone


def test_arms_that_a_config_has_not_are_refused():
    with pytest.raises(ValueError, match=r'^arms: .* no supervised_tiny_imagenet\.py .* leave'):
        arms('tiny_imagenet/ser_mocov3_tiny_imagenet')
    for arm in ('late_cls', 'ser_early_cls'):
        with pytest.raises(ValueError, match=f'^arms: {arm} is of a ViT, .* SERResNet'):
            arms('ser_barlowtwins_r50', [arm])


def test_boxes_that_cannot_be_measured_are_refused_before_training(tmp_path):
    root = write_tiny_imagenet(tmp_path / 'tiny')
    places = ['--work-dir', tmp_path / 'runs', '--out', tmp_path / 'out']
    data = [f'evaluation.{split}.data_root={root}' for split in ('train', 'val')]
    options = ['--cfg-options', 'model.algorithm.backbone.patch_size=4', *data]
    said = run_command('compare', '--config', CONFIG, *places, *options)
    assert said.startswith("error: measures: 'boxes' needs a ViT of patches of 8")
    assert not (tmp_path / 'runs').exists()


def test_detector_of_other_weights_is_not_taken_for_these(tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(measures, 'box_map', lambda *x: folders.append(x[2]) or dict(bbox_mAP=0))
    cfg = load_base(find_config(CONFIG), {})
    for seed in (0, 0, 1):
        own = arm_config(cfg, 'untrained', seed, tmp_path, {})
        own.work_dir = str(tmp_path / 'run')
        assert measure(own, None, 2, ['boxes'], 'images') == dict(box_map=0)
    assert len(folders) == len(set(folders)) == 2


@pytest.mark.parametrize(
    ('wrapper', 'expected'),
    [
        (dict(type='OptimWrapper'), 'float32'),
        (dict(optimizer=dict(type='AdamW')), 'float32'),
        (dict(type='AmpOptimWrapper', dtype=None), 'float16'),
        (dict(type='AmpOptimWrapper', dtype='bfloat16'), 'bfloat16'),
        (dict(type='AmpOptimWrapper', loss_scale='dynamic'), 'float16'),
        (dict(type='mmengine.CPUAmpOptimWrapper'), 'bfloat16'),
        (None, None),
    ],
)
def test_the_precision_of_a_run_is_what_it_was_trained_in(wrapper, expected, tmp_path):
    """Not what its config asks for, in the place of which a CPU may have taken another."""
    if wrapper:
        file = tmp_path / '20260101_000000' / 'vis_data' / 'config.py'
        file.parent.mkdir(parents=True)
        Config(dict(optim_wrapper=wrapper)).dump(file)
    cfg = Config(dict(work_dir=str(tmp_path), optim_wrapper=dict(type='AmpOptimWrapper')))
    assert _precision(cfg) == expected


def test_mixed_precision_of_runs_is_told():
    found = results(baseline=[0.1, 0.2], SER=[0.2, 0.3])
    for run in found['runs']:
        run['precision'] = 'float32'
    assert 'float32' not in report_comparison(found)
    found['runs'][0]['precision'] = 'bfloat16'
    assert 'Runs trained in bfloat16 1, in float32 3; what' in report_comparison(found)


def test_a_figure_that_is_no_number_does_not_hide_its_arm():
    """The R2 of a map that collapsed in one seed."""
    text = report_comparison(results(baseline=[0.1, 0.2, 0.3], SER=[0.2, float('nan'), 0.5]))
    assert '| 0.350 ± 0.212 (2 of 3) |' in text
    assert '| linear probe ' in text.split('SER - baseline')[1] and 'nan' not in text


def test_figures_of_a_measure_that_has_changed_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measures, 'box_map', lambda *x: dict(bbox_mAP=0.25))
    own = arm_config(load_base(find_config(CONFIG), {}), 'untrained', 0, tmp_path, {})
    measure(own, None, 2, ['boxes'], 'images')
    monkeypatch.setattr(measures, 'VERSIONS', dict(boxes=2))
    assert measure(own, None, 2, [], 'images') == {}
    assert 'boxes is measured otherwise now' in capsys.readouterr().out
    monkeypatch.setattr(measures, 'box_map', lambda *x: dict(bbox_mAP=0.5))
    for asked in (['boxes'], []):  # taken again, and kept
        assert measure(own, None, 2, asked, 'images') == dict(box_map=0.5)


def test_weights_to_start_from_are_told_apart_by_what_they_hold(tmp_path):
    cfg, recipes = load_base(find_config(CONFIG), {}), []
    for name, content in (('a', 'first'), ('b', 'first'), ('a', 'second')):
        (tmp_path / name).write_text(content)
        cfg.load_from = str(tmp_path / name)
        recipes.append(_recipe(cfg))
    assert recipes[0] == recipes[1] != recipes[2]


def test_figures_of_other_images_are_kept_aside(tmp_path, monkeypatch, capsys):
    """They may be outdated by a time stamp alone."""
    monkeypatch.setattr(measures, 'box_map', lambda *x: dict(bbox_mAP=0.25))
    own = arm_config(load_base(find_config(CONFIG), {}), 'untrained', 0, tmp_path, {})
    assert measure(own, None, 2, ['boxes'], 'images') == dict(box_map=0.25)
    assert measure(own, None, 2, [], 'images') == dict(box_map=0.25) and not capsys.readouterr().out
    assert measure(own, None, 2, [], 'others') == {}
    assert 'boxes were measured of other weights, settings or images' in capsys.readouterr().out
    (file,) = tmp_path.rglob('untrained.measures.json.*')
    old = json.loads(file.read_text())
    assert old['boxes']['box_map'] == 0.25


@pytest.mark.parametrize(
    ('given', 'expected'),
    [(None, [0, 3, 6]), (2, [0, 1]), (7, [0, 2, 4]), ([7, 5], [7, 5]), ([7, 5, 1, 2], [7, 5, 1])],
)
def test_corruptions_are_of_images_at_equal_distances(given, expected, tmp_path):
    """The first ones would be of the first classes, where images are in their order."""
    root = str(write_tiny_imagenet(tmp_path, classes=10))
    options = {f'evaluation.{split}.data_root': root for split in ('train', 'val')}
    options |= {} if given is None else {'evaluation.val.indices': given}
    cfg = load_base(find_config(CONFIG), options)
    names = measures._add_corruptions(cfg, 3)
    assert len(names) == 75
    assert all(cfg.evaluation[name].dataset.indices == expected for name in names)


def test_settings_of_the_untrained_network_are_kept(tmp_path):
    root = write_tiny_imagenet(tmp_path / 'tiny')
    data = [f'evaluation.{split}.data_root={root}' for split in ('train', 'val')]
    few = ['--config', CONFIG, '--arms', 'untrained', '--seeds', 0, '--measures', '--work-dir']
    command = ['compare', *few, tmp_path, '--out', tmp_path / 'out', '--cfg-options', *data]
    assert run_command(*command) is None
    assert run_command(*command) is None
    # It has the same weights.
    said = run_command(*command, 'model.algorithm.backbone.final_norm=False')
    assert 'untrained holds a run with other settings' in said


def test_runs_of_another_machine_join(tmp_path):
    few = ['compare', '--config', CONFIG, '--arms', 'untrained', '--measures', '--out', tmp_path]
    for seed in (1, 0, 1):  # whose images are elsewhere, too
        root = tmp_path / f'tiny{seed}'
        root.exists() or write_tiny_imagenet(root)
        data = [f'evaluation.{split}.data_root={root}' for split in ('train', 'val')]
        places = ['--seeds', seed, '--work-dir', tmp_path / f'machine{seed}']
        assert run_command(*few, *places, '--cfg-options', *data) is None
    file = tmp_path / 'mocov3_tiny_imagenet_short.json'
    written = file.read_text()
    assert [run['seed'] for run in json.loads(written)['runs']] == [0, 1]
    other = ['--seeds', 2, '--work-dir', tmp_path / 'other', '--images', 7, '--cfg-options', *data]
    said = run_command(*few, *other)
    assert said == (
        f'error: --out: {file} holds runs of other settings (images 1000, here 7); name another '
        'folder, or move that file away.'
    )
    faster = ['--seeds', 2, '--work-dir', tmp_path / 'other', '--cfg-options', *data]
    said = run_command(*few, *faster, 'optim_wrapper.optimizer.lr=0.1')
    assert 'holds runs of other settings (recipe ' in said
    said = run_command(*few, *faster, 'train_dataloader.num_batch_per_epoch=3')
    assert 'holds runs of other settings (recipe ' in said
    said = run_command(*few, '--gpus', 2, *faster)
    assert 'holds runs of other settings (processes 1, here 2)' in said
    fewer = write_tiny_imagenet(tmp_path / 'fewer', classes=2)
    other_data = [f'evaluation.{split}.data_root={fewer}' for split in ('train', 'val')]
    said = run_command(*few, *faster[:4], '--cfg-options', *other_data)
    assert "holds runs of other settings (data {'train': 12, 'val': 3}, here {'train': 8" in said
    again = ['--seeds', 1, '--work-dir', tmp_path / 'other', '--cfg-options', *data]
    assert run_command(*few, *again) == (
        f'error: --out: {file} holds untrained (seed 1) already, from elsewhere than '
        f'{tmp_path / "other"}; leave it out, or name another --out.'
    )
    assert file.read_text() == written and not (tmp_path / 'other').exists()
    file.write_text('{}')
    assert 'holds no runs of a comparison' in run_command(*few, *places, '--cfg-options', *data)


def test_a_seed_joins_the_results_in_the_docs(tmp_path):
    """They are of the recipe that is shipped."""
    file = tmp_path / 'mocov3_tiny_imagenet_short.json'
    held = json.loads((ROOT / 'docs/results/tiny_imagenet' / file.name).read_text())
    assert held['about']['data'] == dict(train=100_000, val=10_000)
    root = write_tiny_imagenet(tmp_path / 'tiny')
    held['about']['data'] = dict(train=12, val=3)  # of which there are fewer here
    file.write_text(json.dumps(held))
    before = held['runs']
    few = ['--config', CONFIG, '--arms', 'untrained', '--measures', '--seeds', 99]
    asked = ['--train-images', 25000, '--images', 500, '--solver', 'lbfgs', '--out', tmp_path]
    data = [f'evaluation.{split}.data_root={root}' for split in ('train', 'val')]
    work_dir = ['--work-dir', tmp_path / 'runs']
    assert run_command('compare', *few, *asked, *work_dir, '--cfg-options', *data) is None
    after = json.loads(file.read_text())['runs']
    assert [run for run in after if run['seed'] != 99] == before
    assert len(after) == len(before) + 1


@pytest.mark.parametrize(
    ('folder', 'count'), [('', 3), ('batches_of_512/', 3), ('quarter_of_the_weight/', 0)]
)
def test_the_page_has_the_tables_of_its_results(folder, count):
    file = ROOT / f'docs/results/tiny_imagenet/{folder}mocov3_tiny_imagenet_short.json'
    figures, *rest = report_comparison(json.loads(file.read_text())).split('\n\n')
    page = (ROOT / 'docs/results/tiny_imagenet.md').read_text()
    differences = [table for table in rest if table.startswith('| SER - ')]
    assert len(differences) == count
    assert all(table in page for table in (figures, *differences))


def test_readme_has_figures_of_the_page():
    columns = ['probe', 'probe_turned', 'knn', 'r2', 'matched_turns_last', 'box_map']
    file = ROOT / 'docs/results/tiny_imagenet/mocov3_tiny_imagenet_short.json'
    by_arm: dict = {}
    for run in json.loads(file.read_text())['runs']:
        by_arm.setdefault(run['arm'], []).append(run)
    text = (ROOT / 'README.md').read_text().replace('**', '')
    for arm in ('untrained', 'baseline', 'late [CLS]', 'views only', 'SER'):
        cells = [format_mean([run[key] for run in by_arm[arm]]) for key in columns]
        assert '| ' + ' | '.join([arm, *cells]) + ' |' in text


def test_tables_of_what_is_no_comparison(tmp_path, capsys):
    file = tmp_path / 'found.json'
    assert 'is no file; name' in run_command('compare', '--tables', file)
    for text in ('[]', '{}', 'no JSON', '{"runs": []}', '{"runs": [{"seed": 0}]}', '{"runs": 3}'):
        file.write_text(text)
        said = run_command('compare', '--tables', file)
        assert (
            said == f'error: --tables {file} holds no runs of a comparison; name the JSON of one.'
        )
    file.write_text(json.dumps(results(baseline=[0.1, 0.2], SER=[0.2, 0.3])))
    assert run_command('compare', '--tables', file) is None
    assert '| SER - baseline |' in capsys.readouterr().out


@pytest.mark.slow
def test_whole_chain_goes_on_where_it_was(tmp_path, capsys):
    root = write_tiny_imagenet(tmp_path / 'tiny', classes=5, per_class=20)
    options = [
        'train_cfg.max_epochs=1',
        'train_dataloader.batch_size=20',
        f'train_dataloader.dataset.dataset.data_root={root}',
        f'train_dataloader.dataset.folder={tmp_path / "cached"}',
        f'evaluation.train.data_root={root}',
        f'evaluation.val.data_root={root}',
        'default_hooks.logger.interval=1',
        'model.data_preprocessor.equi_ratio=0.2',
    ]
    places = ['--work-dir', tmp_path / 'runs', '--out', tmp_path / 'out']
    command = ['--config', CONFIG, '--images', 3, *places, '--cfg-options', *options]
    arms = ['untrained', 'baseline', 'views_only', 'ser']
    few = ['--arms', *arms, '--measures', 'accuracy', 'cost', '--seeds']
    assert run_command('compare', *few, 0, *command) is None
    file = tmp_path / 'out' / 'mocov3_tiny_imagenet_short.json'
    first = json.loads(file.read_text())
    assert [run['arm'] for run in first['runs']] == ['untrained', 'baseline', 'views only', 'SER']
    by_arm = {run['arm']: run for run in first['runs']}
    assert all(0 <= run['probe'] <= 1 for run in first['runs'])
    assert [x['step'] for x in by_arm['SER']['losses']] == [1, 2, 3, 4, 5]
    assert {'loss', 'loss_inv', 'loss_ser'} <= by_arm['SER']['losses'][0].keys()
    assert by_arm['SER']['gflops'] > by_arm['baseline']['gflops'] > 0

    capsys.readouterr()
    nearly_all = ['--measures', *(x for x in MEASURES if x != 'boxes')]
    assert run_command('compare', '--arms', 'ser', '--seeds', 0, *nearly_all, *command) is None
    told = capsys.readouterr().out
    assert '1 runs, 0 to train' in told
    assert 'train: features' in told  # those of the probe are still there for the corruptions
    again = json.loads(file.read_text())['runs']
    assert again[:-1] == first['runs'][:-1]  # those that were not named stay
    run = again[-1]
    assert run['losses'] == by_arm['SER']['losses'] and run['probe'] == by_arm['SER']['probe']
    assert set(run['corruptions_by_kind']) == set(CORRUPTIONS)
    assert all(len(x) == 5 for x in run['corruptions_by_kind'].values())
    assert COLUMNS.keys() - run.keys() == {'box_map'}
    assert not list(tmp_path.glob('runs/*/*/ser.features'))
    assert {x.name for x in file.parent.glob('*.png')} == {
        'mocov3_tiny_imagenet_short_angles.png',
        'mocov3_tiny_imagenet_short_blocks.png',
    }

    capsys.readouterr()
    assert run_command('compare', '--tables', file) is None
    assert capsys.readouterr().out.strip() == file.with_suffix('.md').read_text().strip()


def test_differences_to_the_supervised_network_are_those_of_its_results():
    file = ROOT / 'docs/results/tiny_imagenet/mocov3_tiny_imagenet_short.json'
    arms: dict = {}
    for run in json.loads(file.read_text())['runs']:
        arms.setdefault(run['arm'], {})[run['seed']] = run
    page = (file.parents[1] / 'tiny_imagenet.md').read_text()
    (sentence,) = re.findall(r'\*\*The network trained on the labels\*\*.*?\n\n', page, re.S)
    for key in ('probe', 'knn', 'corruptions', 'position_last', 'box_map'):
        own, other = ([arms[x][i][key] for i in (0, 1, 2)] for x in ('supervised', 'baseline'))
        found = paired_difference(other, own)
        low, high = found['interval']
        assert f'{sum(own) / 3:.3f}' in sentence, key
        short = f'{-found["mean"]:.3f} short ' if key == 'probe' else f'{found["mean"]:+.3f}, '
        interval = f'({low:+.3f} to {high:+.3f}' if key == 'probe' else f'{low:+.3f} to {high:+.3f}'
        assert short + interval in sentence, key


def test_differences_of_the_quarter_are_those_of_its_results():
    """Paired by seed, across two files."""
    folder = ROOT / 'docs/results/tiny_imagenet'
    arms: dict = {}
    for part in ('', 'quarter_of_the_weight/'):
        file = folder / f'{part}mocov3_tiny_imagenet_short.json'
        for run in json.loads(file.read_text())['runs']:
            arms.setdefault(f'{part}{run["arm"]}', {})[run['seed']] = run
    page = (folder.parent / 'tiny_imagenet.md').read_text()
    rows = {
        'linear probe': 'probe',
        'k-NN': 'knn',
        'R2 at SER layer': 'r2',
        'correspondence, quarter turns, last block': 'matched_turns_last',
        'correspondence, affine, last block': 'matched_last',
        'position R2, last block': 'position_last',
        'box mAP, frozen': 'box_map',
    }
    quarter = arms['quarter_of_the_weight/SER']
    for title, key in rows.items():
        cells = [title]
        for other in ('baseline', 'views only', 'SER'):
            pairs = [[arm[seed][key] for seed in (0, 1, 2)] for arm in (quarter, arms[other])]
            found = paired_difference(*pairs)
            low, high = found['interval']
            cells.append(f'{found["mean"]:+.3f}, {low:+.3f} to {high:+.3f}')
        assert f'| {" | ".join(cells)} |' in page
