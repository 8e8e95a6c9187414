"""Compiled backbones and losses: few graphs, and the numbers of eager mode."""

import copy

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmpretrain.registry import MODELS
from torch._dynamo.testing import CompileCounterWithBackend

from ser_mm.engine.compiling import compile_backbones
from ser_mm.geometry import draw_grid
from tests.support.algorithms import ALGORITHMS, BACKBONE, EMBED_DIMS, build, two_views
from tests.support.two_ranks import on_two_ranks

pytestmark = pytest.mark.usefixtures('packed')

# The second block has drop path, the first none, [CLS] comes between them.
SMALL = {
    **BACKBONE,
    'arch': dict(embed_dims=EMBED_DIMS, num_layers=2, num_heads=3, feedforward_channels=48),
    'ser_layer': 1,
    'drop_path_rate': 0.3,
}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    config = torch._dynamo.config
    with config.patch(cache_size_limit=config.cache_size_limit, optimize_ddp=config.optimize_ddp):
        torch._dynamo.reset()
        yield


def small(**options):
    torch.manual_seed(0)
    return MODELS.build({**SMALL, **options}).train()


def views_of(step, sizes=(2, 3)):
    """8 images on grids that change with every step, as those of b2 do, and their number too."""
    rng = torch.Generator().manual_seed(step)
    grids = [draw_grid((4, 4), generator=rng) for _ in range(2)]
    n2 = sizes[step % len(sizes)]
    return two_views(8 - n2, n2, grids, seed=step)


def run(forward, backbone, steps, sizes=(2, 3), momentum=None):
    """Training steps in mixed precision, forward and backward."""
    for step in range(steps):
        view = views_of(step, sizes)[0]
        with torch.autocast('cpu', dtype=torch.bfloat16):
            (out,) = forward(view)
            loss = out.float().square().mean() + view.token_maps[backbone].float().square().sum()
            if momentum is not None:
                with torch.no_grad():
                    momentum(view)
        loss.backward()


def test_the_backbone_is_one_graph_whatever_b2_is():
    """With sizes told to be dynamic; a break anywhere is an error."""
    backbone, counter = small(), CompileCounterWithBackend('eager')
    compiled = torch.compile(backbone, backend=counter, fullgraph=True)

    def forward(view):
        torch._dynamo.maybe_mark_dynamic(view.base, 0)
        torch._dynamo.maybe_mark_dynamic(view.equi, [0, 2, 3])
        return compiled(view)

    run(forward, backbone, 50)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize('with_cp', [False, True])
def test_the_backbone_takes_few_graphs_untold(with_cp):
    """Of the first sizes, of those that had changed by the second step, and of all."""
    backbone, counter = small(with_cp=with_cp), CompileCounterWithBackend('eager')
    run(torch.compile(backbone, backend=counter, fullgraph=True), backbone, 50)
    assert 1 <= counter.frame_count <= 3


@pytest.mark.parametrize('with_cp', [False, True])
def test_blocks_share_their_graphs(with_cp):
    """With drop path and without, each with gradient and, of the momentum branch, without."""
    backbone, counter = small(with_cp=with_cp), CompileCounterWithBackend('eager')
    momentum = copy.deepcopy(backbone)
    for module in (backbone, momentum):
        module.compile(backend=counter, fullgraph=True)
    run(backbone, backbone, 50, momentum=momentum)
    assert counter.frame_count == 4


@pytest.mark.slow
def test_all_sizes_of_b2_fit_in_the_cache():
    backbone, counter = small(), CompileCounterWithBackend('eager')
    momentum = copy.deepcopy(backbone)
    compile_backbones(torch.nn.ModuleList([backbone, momentum]), backend=counter, fullgraph=True)
    run(backbone, backbone, 12, (3, 2, 1, 0), momentum)
    count = counter.frame_count
    assert count == 12
    run(backbone, backbone, 8, (3, 2, 1, 0), momentum)
    assert counter.frame_count == count


def outputs_and_gradients(forward, backbone):
    """In float64, and the gradient of positions apart."""
    backbone.zero_grad()
    values = []
    for step in range(3):  # with a grid, of the same and of other sizes
        grids = [(4, 4), (4, 5), (3, 5)][step]
        view = two_views(5, step + 1, [grids] * 2, seed=step, dtype=torch.float64)[0]
        torch.manual_seed(step)
        (out,) = forward(view)
        token_map = view.token_maps[backbone]
        (out.square().sum() + token_map.square().sum()).backward()
        values += [out.detach(), token_map.detach()]
    return values + [p.grad for name, p in backbone.named_parameters() if name != 'pos_embed'], (
        backbone.pos_embed.grad
    )


@pytest.mark.parametrize(
    'how, cls_layer',
    [('blocks', None), ('blocks', 0), pytest.param('whole', None, marks=pytest.mark.slow)],
)
def test_the_numbers_are_those_of_eager_mode(how, cls_layer):
    """Drop path included, which draws from the same random numbers in the same order."""
    backbone = small(cls_layer=cls_layer).double()
    expected = outputs_and_gradients(backbone, backbone)
    forward = backbone
    if how == 'whole':
        forward = torch.compile(backbone, backend='aot_eager', fullgraph=True)
    else:
        backbone.compile(backend='aot_eager', fullgraph=True)
    values, of_positions = outputs_and_gradients(forward, backbone)
    for a, b in zip(values, expected[0], strict=True):
        # Of float64, as in test_ranks; a wrong position or path is off by a hundredth.
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    # MMPretrain interpolates positions in float32: 3 steps of 16 taps and a rounding for each.
    bound = 64 * 2**-24 * expected[1].abs().max().item()
    torch.testing.assert_close(of_positions, expected[1], rtol=0, atol=bound)


def test_compiling_leaves_keys_and_copies_alone():
    backbone = small()
    keys = list(backbone.state_dict())
    backbone.compile(backend='eager')
    assert list(backbone.state_dict()) == keys
    assert '_run_layer' not in vars(copy.deepcopy(backbone))


@pytest.mark.slow
@pytest.mark.parametrize('name, breaks', [('simsiam', 0), ('barlowtwins', 0), ('mocov3', 1)])
def test_breaks_in_the_loss(name, breaks):
    """None, or one, where the momentum branch is updated."""
    config = copy.deepcopy(ALGORITHMS[name])
    config['algorithm']['backbone'] = SMALL
    model = build(config).train()
    explained = torch._dynamo.explain(lambda views: model(views, mode='loss'))(two_views())
    lines = [reason.user_stack[-1] for reason in explained.break_reasons]
    assert len(lines) == breaks
    assert all('update_parameters' in line.line for line in lines)


def step_on_rank(rank, with_cp):
    """Gradients that DDP averages, of a model as it is, and compiled."""
    torch.manual_seed(0)
    config = copy.deepcopy(ALGORITHMS['mocov3'])
    config['algorithm']['backbone'] = dict(SMALL, with_cp=with_cp)
    model = build(config).double()
    gradients = []
    for compiled in (False, True):
        run = copy.deepcopy(model)
        if compiled:
            compile_backbones(run, backend='aot_eager')
        ddp = MMDistributedDataParallel(run, find_unused_parameters=False)
        for step in range(2):
            views = two_views(4 + rank, 2 - rank, seed=2 * step + rank, dtype=torch.float64)
            torch.manual_seed(step)
            run.zero_grad()
            run.parse_losses(ddp(views, None, mode='loss'))[0].backward()
        gradients.append([p.grad for p in run.parameters() if p.requires_grad])
    torch._dynamo.reset()  # compiled code holds on to DDP, and that to its process group
    return gradients


@pytest.mark.slow
@pytest.mark.parametrize('with_cp', [False, True])
def test_two_ranks(with_cp):
    (eager, compiled), (_, other) = on_two_ranks(step_on_rank, with_cp)
    for a, b, c in zip(compiled, eager, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        assert torch.equal(a, c)
