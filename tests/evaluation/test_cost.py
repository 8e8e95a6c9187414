"""What SER adds to a step, in counts that no machine changes."""

import resource

import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from benchmarks.step import in_one_pass
from ser_mm.engine.operators import read_config
from ser_mm.evaluation.cost import OperatorCounter, TrainingStep, count_step, report_costs
from tests.support import short_run
from tests.support.algorithms import ALGORITHMS, EMBED_DIMS, IMAGE, PATCH, build, two_views
from tests.support.paths import ROOT


def config(model, views):
    pipeline = [dict(type='LoadImageFromFile'), views, dict(type='PackInputs')]
    return Config(dict(model=model, train_dataloader=dict(dataset=dict(pipeline=pipeline))))


def linear(rows, *widths):
    """FLOPs of linear layers, for both gradients as many again as for the product."""
    return 3 * sum(2 * rows * i * o for i, o in zip(widths, widths[1:], strict=False))


def test_flops_are_those_counted_by_hand():
    images, patches, width = 8, (IMAGE // PATCH) ** 2, EMBED_DIMS
    network = 2 * 2 * images * patches * width * 3 * PATCH**2  # no gradient to the images
    for tokens in [patches, patches, patches + 1, patches + 1]:  # [CLS] enters after block 2
        network += linear(images * tokens, width, 3 * width)
        network += linear(images * tokens, width, width)
        network += linear(images * tokens, width, 2 * width, width)
        # Attention is 2 products, and 5 backward: its kernels compute the scores again.
        network += 7 * 2 * images * tokens**2 * width
    projector = linear(images, width, 64, 32)
    plain = 2 * (network + projector) + linear(32, images, 32)

    model = ALGORITHMS['barlowtwins']
    counted = count_step(config(short_run.without_ser(model), short_run.MULTI_VIEW), images)
    assert counted['flops'] == plain and counted['parts'] == {} and counted['b2'] == 0

    def ser(b2):
        queries = b2 * patches
        neck = 2 * linear(queries, width, 40, 24)
        rho = b2 * 16 + 2 * queries * 8  # the elements, and where they sample
        return neck + rho, 2 * linear(queries, 24, queries)

    counted = count_step(config(model, short_run.equivariant_views(equi_ratio=0.25)), images)
    neck, loss = ser(2)
    assert counted['parts'] == dict(without_b2=plain, b2=0, neck=neck, loss=loss)
    assert counted['flops'] == plain + neck + loss and counted['b2'] == 2
    counted = count_step(config(model, short_run.equivariant_views(equi_ratio=0.3)), images)
    assert counted['b2'] == pytest.approx(2.4)
    weighed = plain + 0.6 * sum(ser(2)) + 0.4 * sum(ser(3))
    assert counted['flops'] == pytest.approx(weighed, abs=1)


@pytest.mark.parametrize('name', ['mocov3', 'simsiam_resnet'])
def test_operators_are_those_of_a_real_step(name):
    counted = count_step(config(ALGORITHMS[name], short_run.equivariant_views(0.25)), 8)
    model = build(ALGORITHMS[name])
    in_one_pass(True)(model)
    for module in model.modules():
        if hasattr(module, 'update_parameters'):
            module.update_parameters = lambda model: None
    views = two_views(6, 2, grids=[(IMAGE // PATCH,) * 2] * 2)
    with OperatorCounter() as operators:
        model.parse_losses(model(views, mode='loss'))[0].backward()
    assert counted['operators'] == operators.counts.total()
    assert counted['parameters'] == sum(p.numel() for p in model.parameters())


def test_counting_takes_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counted = count_step(config(ALGORITHMS['mocov3'], short_run.equivariant_views(2e-6)), 10**6)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert counted['flops'] > 10**14
    assert after - before < 2**20  # KiB; no values, no memory: one view would take 12 GB


def test_negatives_of_both_views_double_the_loss():
    """Its products, of queries with keys, and nothing else."""
    other, both = (
        count_step(
            config(
                dict(ALGORITHMS['mocov3'], head=dict(type='SERHead', negatives=negatives)),
                short_run.equivariant_views(0.25),
            ),
            8,
        )['parts']
        for negatives in ('other', 'both')
    )
    assert both == dict(other, loss=2 * other['loss'])


@pytest.mark.slow
def test_one_pass_for_b1_and_b2_costs_few_operators():
    init_default_scope('mmpretrain')
    MMLogger.get_instance('cost', log_level='ERROR')
    ser, baseline = (
        Config.fromfile(ROOT / 'configs' / f'{name}mocov3_vits16.py') for name in ('ser_', '')
    )
    counts = {
        name: TrainingStep(cfg, 4, 0.5, change).count()
        for name, cfg, change in [
            ('baseline', baseline, None),
            ('packed', ser, in_one_pass(True)),
            ('two passes', ser, in_one_pass(False)),
        ]
    }
    operators = {name: row['operators'] for name, row in counts.items()}
    assert operators['packed'] <= 1.3 * operators['baseline']
    assert operators['two passes'] > 2 * operators['baseline']
    assert counts['packed']['flops'] == counts['two passes']['flops']


@pytest.mark.slow
def test_costs_of_other_methods_are_those_of_the_docs():
    """Counts, which no machine changes; the extra views make the most of them."""
    names = dict.fromkeys(['ser', 'augself', 'stl', 'equimod'], '_mocov3_vits16')
    configs = [f'{name}{rest}' for name, rest in names.items()]
    configs += ['equimod_mocov3_vits16_layer3', 'essl_mocov3_vits16', 'essl_mocov3_vits16_layer3']
    configs += ['mocov3_vits16_multicrop']
    baseline = count_step(read_config('mocov3_vits16'))['flops']
    ratios = [f'{count_step(read_config(name))["flops"] / baseline:.4f}' for name in configs]
    assert f'| {" | ".join(ratios)} |' in (ROOT / 'docs/methods.md').read_text()


def test_local_crops_are_counted_in_ser():
    cfg = read_config('demo/ser_mocov3_multicrop')
    counted = count_step(cfg, 8)
    assert [max(view) for view in counted['views']] == [48, 48, 24, 24, 24, 24]
    assert counted['flops'] > count_step(read_config('demo/ser_mocov3'), 8)['flops']


def test_a_baseline_of_another_algorithm_is_told():
    ser = count_step(config(ALGORITHMS['mocov3'], short_run.equivariant_views(0.25)), 8)
    of = {
        name: count_step(config(short_run.without_ser(ALGORITHMS[name]), short_run.MULTI_VIEW), 8)
        for name in ('mocov3', 'barlowtwins')
    }
    assert '(MoCoV3, not BarlowTwins)' in report_costs(ser, of['barlowtwins'], 'ser', 'other')
    assert '([CLS] later)' in report_costs(ser, of['mocov3'], 'ser', 'same')


def test_a_step_costs_the_same_where_its_views_are_made(imagenet_tree):
    model = ALGORITHMS['mocov3']
    host = count_step(config(model, short_run.equivariant_views(0.25)), 8)
    plain = Config(dict(train_dataloader=dict(dataset=dict(pipeline=[])), optim_wrapper=OPTIM))
    plain.model = short_run.on_device(model, 0.25)
    assert count_step(plain, 8) == host
    step = TrainingStep(plain, 8, equi_ratio=0.5)
    step()
    inputs = step.model.data_preprocessor(step.batch, True)['inputs']
    assert [(len(view.base), len(view.equi)) for view in inputs] == [(4, 4)] * 2


OPTIM = dict(optimizer=dict(type='AdamW', lr=1e-3))
