"""SERVisionTransformer: MMPretrain's ViT, a late [CLS], and b1 and b2, packed or not."""

import copy
import pickle

import pytest
import torch
from mmengine.runner import load_checkpoint
from mmpretrain.models.backbones import VisionTransformer
from torch import nn

from ser_mm.checkpoint import load_backbone
from ser_mm.models import SERVisionTransformer
from tests.support import reference
from tests.support.algorithms import BACKBONE, EMBED_DIMS, IMAGE, PATCH, two_views
from tests.support.networks import gradients, images
from tests.support.rounding import assert_far_above_rounding, rounding

ARCH = {key: BACKBONE[key] for key in ('arch', 'img_size', 'patch_size')}
# Of float64, see test_tolerance_is_far_above_rounding.
CLOSE = dict(rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True, params=[True, False], ids=['one pass', 'two passes'])
def passes(request, monkeypatch):
    """As on a GPU, and as on a CPU."""
    monkeypatch.setattr(SERVisionTransformer, 'one_pass', request.param)


@pytest.fixture
def float64_positions(monkeypatch):
    reference.float64_positions(monkeypatch)


def vit(seed=0, **options):
    torch.manual_seed(seed)
    network = SERVisionTransformer(**{**ARCH, **options})
    network.init_weights()
    for p in network.parameters():  # no zeros and ones: every parameter makes a difference
        p.data += 0.05 * torch.randn_like(p)
    return network.double()


@pytest.mark.parametrize('out_type', ['cls_token', 'avg_featmap'])
def test_tolerance_is_far_above_rounding(out_type):
    """Of outputs and gradients through twelve blocks, the most that are compared here."""
    network = vit(arch=dict(ARCH['arch'], num_layers=12), ser_layer=3, out_type=out_type)
    results = []
    for dtype in (torch.float64, torch.float32):
        outputs = network.to(dtype)(images(9, 24, 40).to(dtype))
        results.append([*outputs, *gradients(network, outputs)])
    assert_far_above_rounding(*results, **CLOSE)


OPTIONS = {
    'cls_token': dict(out_type='cls_token'),
    'featmap': dict(out_type='featmap'),
    'avg_featmap': dict(out_type='avg_featmap'),
    'raw': dict(out_type='raw'),
    'every block': dict(out_type='raw', out_indices=[0, 1, 2, 3]),
    'no [CLS]': dict(out_type='featmap', with_cls_token=False),
    'layer scale': dict(layer_scale_init_value=0.1),
    'pre-norm': dict(pre_norm=True),
    'no final norm': dict(final_norm=False),
    'no qkv bias': dict(qkv_bias=False),
    'frozen': dict(frozen_stages=2),
    'oblong': dict(img_size=(16, 48)),
}


@pytest.mark.parametrize('name', OPTIONS)
def test_equals_the_vit_of_mmpretrain(name):
    options = {**ARCH, **OPTIONS[name]}
    ours = vit(**copy.deepcopy(options))
    theirs = VisionTransformer(**copy.deepcopy(options)).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [p.requires_grad for p in ours.parameters()] == [
        p.requires_grad for p in theirs.parameters()
    ]
    for mode in (True, False):
        ours.train(mode), theirs.train(mode)
        for size in ((IMAGE, IMAGE), (24, 40), (8, 8)):
            x = images(3, *size)
            outputs, expected = ours(x), theirs(x)
            assert len(outputs) == len(expected)
            for a, b in zip(outputs, expected, strict=True):
                torch.testing.assert_close(a, b, **CLOSE)
    ours.requires_grad_(True), theirs.requires_grad_(True)
    for a, b in zip(gradients(ours, ours(x)), gradients(theirs, theirs(x)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_layer_depth_is_that_of_mmpretrain():
    ours, theirs = vit(cls_layer=2), VisionTransformer(**ARCH)
    for name, _ in theirs.named_parameters():
        assert ours.get_layer_depth(name) == theirs.get_layer_depth(name)


@pytest.mark.parametrize('cls_layer', [0, 1, 3])
@pytest.mark.parametrize('size', [(IMAGE, IMAGE), (24, 40)])
def test_late_cls(cls_layer, size, float64_positions):
    """[CLS] enters, without a position, after the block asked for."""
    x = images(2, *size)
    network = vit(cls_layer=cls_layer, out_type='raw', out_indices=[0, 1, 2, 3]).eval()
    expected, _ = reference.vit(network, x)
    expected[-1] = network.ln1(expected[-1])
    patches = size[0] * size[1] // PATCH**2
    for i, (a, b) in enumerate(zip(network(x), expected, strict=True)):
        assert a.shape == (2, patches + (i >= cls_layer), EMBED_DIMS)
        torch.testing.assert_close(a, b, **CLOSE)
    for out_type, of in dict(
        cls_token=lambda t: t[:, 0],
        featmap=lambda t: t[:, -patches:].mT.unflatten(2, [side // PATCH for side in size]),
    ).items():
        network.out_type, network.out_indices = out_type, [3]
        torch.testing.assert_close(network(x)[0], of(expected[-1]), **CLOSE)


@pytest.mark.parametrize('n1, n2', [(4, 0), (4, 1), (4, 5), (0, 2)])
@pytest.mark.parametrize('out_type', ['cls_token', 'avg_featmap'])
@pytest.mark.parametrize('cls_layer', [0, 3, 11])
def test_packed_equals_separate(cls_layer, out_type, n1, n2, float64_positions):
    arch = dict(ARCH['arch'], num_layers=12)
    network = vit(arch=arch, ser_layer=3, cls_layer=cls_layer, out_type=out_type)
    view, _ = two_views(n1, n2, dtype=torch.float64)
    (packed,) = network(view)
    parts = [x for x in (view.base, view.equi) if len(x)]
    separate = torch.cat([network(x)[0] for x in parts])
    torch.testing.assert_close(packed, separate, **CLOSE)
    token_map = view.token_maps[network]
    expected = reference.token_map(network, view.equi)
    torch.testing.assert_close(token_map, expected, **CLOSE)
    assert token_map.shape == (n2, EMBED_DIMS, 3, 5) and list(view.token_maps) == [network]
    # The map is taken after block 3, so the loss reaches it by two ways.
    packed = gradients(network, (packed, token_map))
    separate = gradients(network, (separate, expected))
    for name, a, b in zip(dict(network.named_parameters()), packed, separate, strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, name=name: f'{name}: {m}')


def test_packed_equals_separate_at_several_outputs(float64_positions):
    network = vit(ser_layer=1, cls_layer=1, out_indices=[1, 3])
    view, _ = two_views(2, 3, dtype=torch.float64)
    for i, packed in enumerate(network(view)):
        separate = torch.cat([network(x)[i] for x in (view.base, view.equi)])
        torch.testing.assert_close(packed, separate, **CLOSE)


@pytest.mark.parametrize('out_type', ['raw', 'featmap'])
def test_outputs_that_differ_in_shape_cannot_be_packed(out_type):
    with pytest.raises(ValueError, match=f"out_type='{out_type}'"):
        vit(ser_layer=2, out_type=out_type)(two_views(dtype=torch.float64)[0])


def test_without_ser_layer_no_token_map_is_left():
    view, _ = two_views(dtype=torch.float64)
    assert len(vit(cls_layer=2)(view)[0]) == len(view) == 9
    assert view.token_maps == {}


@pytest.mark.parametrize('packed', [False, True])
def test_drop_path_draws_one_mask_per_image(packed):
    """Of equal images, each keeps or drops attention and MLP of the last block on its own.

    That leaves four outcomes, each of probability 1/4, the same for all tokens of an image. One
    mask for a batch would leave one outcome, one per token many.
    """
    network = vit(drop_path_rate=0.5, ser_layer=1, cls_layer=0).train()
    for i, layer in enumerate(network.layers):  # in the last block alone
        if i < 3:
            layer.attn.out_drop = layer.ffn.dropout_layer = nn.Identity()
    network.out_type = 'avg_featmap' if packed else 'featmap'
    network.ln2 = nn.Identity()
    x = images(1).expand(300, -1, -1, -1)
    if packed:
        view, _ = two_views(200, 100, grids=((4, 4), (4, 4)), dtype=torch.float64)
        view.base, view.equi = x[:200], x[200:]
        rows = network(view)[0]
        groups = rows.split([200, 100])
    else:
        rows = network(x)[0].flatten(1)
        groups = [rows]
    low, high = zip(*(reference.binomial_range(len(group), 1 / 4) for group in groups), strict=True)
    outcomes = rows[:1]
    for row in rows:
        if not torch.isclose(row, outcomes, atol=1e-9).all(1).any():
            outcomes = torch.cat([outcomes, row[None]])
    assert len(outcomes) == 4
    for group, least, most in zip(groups, low, high, strict=True):
        same = torch.isclose(group[:, None], outcomes, atol=1e-9).all(2)
        assert (same.sum(1) == 1).all()
        assert ((same.sum(0) >= least) & (same.sum(0) <= most)).all()


@pytest.mark.parametrize('cls_layer', [0, 2])
@pytest.mark.parametrize(
    'old, new', [(32, 48), (48, 32), (32, (24, 48)), (32, 32), ((32, 64), (32, 64))]
)
def test_positions_are_resized_on_load(cls_layer, old, new, float64_positions):
    saved = vit(img_size=old, cls_layer=cls_layer)
    loaded = vit(img_size=new, cls_layer=cls_layer, seed=1)
    loaded.load_state_dict(saved.state_dict(), strict=True)
    extra = int(cls_layer == 0)
    pos = saved.pos_embed[:, extra:].unflatten(1, saved.patch_resolution).permute(0, 3, 1, 2)
    if old != new:
        pos = reference.resize_positions(pos, loaded.patch_resolution)
    else:
        pos = pos.flatten(2).mT
    torch.testing.assert_close(loaded.pos_embed[:, extra:], pos, **CLOSE)
    assert torch.equal(loaded.pos_embed[:, :extra], saved.pos_embed[:, :extra])
    x = images(1, 48, 48)
    if old == new:
        assert torch.equal(saved.eval()(x)[0], loaded.eval()(x)[0])


@pytest.mark.parametrize('cls_layer', [0, 2])
def test_positions_of_no_square_are_refused(cls_layer, tmp_path):
    """By a bare AssertionError of MMPretrain; MMEngine alone would leave random ones, and go on."""
    torch.save(vit(img_size=(40, 16), cls_layer=cls_layer).state_dict(), tmp_path / 'oblong.pth')
    message = 'positions of 10 patches, neither the 16 of this network nor a square; use the'
    for load in (load_backbone, load_checkpoint):
        with pytest.raises(ValueError, match=message):
            load(vit(cls_layer=cls_layer), str(tmp_path / 'oblong.pth'))


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copied):
    network = vit(ser_layer=2)
    twin = copied(network)
    views = [two_views(dtype=torch.float64)[0] for _ in range(2)]
    assert torch.equal(network(views[0])[0], twin(views[1])[0])
    assert twin.state_dict().keys() == network.state_dict().keys()
    assert list(views[1].token_maps) == [twin]
    twin.load_state_dict(vit(ser_layer=2, seed=1).state_dict())  # hooks serve the copy
    assert not torch.equal(twin.pos_embed, network.pos_embed)
    with pytest.raises(ValueError, match='cls_layer=1'):
        twin.load_state_dict(vit(cls_layer=1).state_dict())


def test_mixed_precision():
    """bfloat16 rounds by 2^-9 at most, 0.001 in root mean square.

    Eight updates of ten roundings each are off by sqrt(80) * 0.001 together where roundings are
    independent, and in the norm of thousands of values there is little chance; twice that passes.
    """
    network = vit(ser_layer=2).float()
    views = [two_views()[0] for _ in range(2)]
    (exact,) = network(views[0])
    with torch.autocast('cpu', torch.bfloat16):
        (output,) = network(views[1])
    assert output.isfinite().all()
    assert 0 < (output.float() - exact).norm() < 0.02 * exact.norm()
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize('mixed', [False, True])
def test_checkpointing_saves_memory_and_changes_nothing_else(mixed):
    """Not a bit, as the same operations run again on the same numbers."""

    def step(with_cp, depth=4):
        arch = dict(ARCH['arch'], num_layers=depth)
        network = vit(arch=arch, ser_layer=2, drop_path_rate=0.3, with_cp=with_cp).float().train()
        view, _ = two_views(4, 3)
        kept = []
        torch.manual_seed(1)
        with (
            torch.autocast('cpu', torch.bfloat16, enabled=mixed),
            torch.autograd.graph.saved_tensors_hooks(
                lambda x: kept.append(x.nbytes) or x, lambda x: x
            ),
        ):
            outputs = *network(view), view.token_maps[network]
        return [*outputs, *gradients(network, outputs)], sum(kept)

    (plain, _), (checkpointed, kept) = step(False), step(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    tokens = 4 * (1 + 4 * 4) + 3 * (1 + 3 * 5)
    one_more = step(True, depth=5)[1] - kept
    assert one_more == tokens * EMBED_DIMS * 4, 'a block keeps more than its input, in float32'


@pytest.mark.slow
def test_compiled():
    """For two pairs of sizes.

    Positions are resized in float32, compiled by other operations: 0 stays 0, and gradients are
    sums of some 20 products.
    """
    torch._dynamo.reset()
    network = vit(ser_layer=2)
    network.pos_embed.data.zero_()
    compiled = torch.compile(network, backend='aot_eager')
    for n2, grids in ((3, ((3, 5), (4, 4))), (2, ((5, 4), (4, 3)))):
        views = [two_views(4, n2, grids, dtype=torch.float64)[0] for _ in range(2)]
        results = []
        for module, view in zip((network, compiled), views, strict=True):
            outputs = *module(view), view.token_maps[network]
            results.append((*outputs, *gradients(network, outputs)))
        for a, b in zip(*results, strict=True):
            close = CLOSE
            if a.shape == network.pos_embed.shape:
                close = dict(rtol=0, atol=rounding(20, 5 * b.abs().max().item(), torch.float32))
            torch.testing.assert_close(a, b, **close)


def test_initialization_is_that_of_moco_v3():
    network = SERVisionTransformer(**ARCH, ser_layer=2)
    network.init_weights()
    for layer in network.layers:
        for matrix in layer.attn.qkv.weight.chunk(3):  # q, k and v: fans 48 and 48, not 48 and 144
            bound = (6 / (2 * EMBED_DIMS)) ** 0.5  # which float32 may round up
            assert 0.95 * bound < matrix.abs().max() <= bound * (1 + 2**-23)
        assert not layer.attn.qkv.bias.any() and not layer.ffn.layers[1].bias.any()
    assert network.cls_token.std() < 2e-6


def test_initialization_of_deit_and_dino():
    network = SERVisionTransformer(**ARCH, ser_layer=2, linear_init='trunc_normal')
    network.init_weights()
    # The deviation of 2304 draws and more is known to 1.5 %, that of 48 to 10 %.
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert not module.bias.any()
    assert network.cls_token.std().item() == pytest.approx(0.02, rel=0.4)
    with pytest.raises(ValueError, match="linear_init='normal' must be 'xavier'"):
        SERVisionTransformer(**ARCH, linear_init='normal')


def test_frozen_patch_embedding():
    network = vit(ser_layer=2, stop_grad_conv1=True)
    frozen = [n for n, p in network.named_parameters() if not p.requires_grad]
    assert frozen == ['patch_embed.projection.weight', 'patch_embed.projection.bias']


@pytest.mark.parametrize('cls_layer', [0, 2])
@pytest.mark.parametrize('ser_layer', [None, 2])
def test_features_are_the_cls_token_or_else_the_mean_of_the_patches(ser_layer, cls_layer):
    """What an ordinary pass gives behind that block, of images of both sizes."""
    network = vit(ser_layer=ser_layer, cls_layer=cls_layer)
    views = two_views(4, 3, dtype=torch.float64)
    views[0].wants_features = True
    network(views[0])
    plain = vit(cls_layer=cls_layer, out_type='raw', out_indices=(1, 3))
    plain.load_state_dict(network.state_dict())
    expected = []
    for x in (views[0].base, views[0].equi):
        tokens = plain(x)[1 if ser_layer is None else 0]
        late = ser_layer is not None and cls_layer >= ser_layer
        expected.append(tokens.mean(dim=1) if late else tokens[:, 0])
        torch.testing.assert_close(network.features(x), expected[-1], **CLOSE)
    torch.testing.assert_close(views[0].features[network], torch.cat(expected), **CLOSE)
    assert not views[1].features
