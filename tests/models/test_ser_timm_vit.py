"""SERTimmViT: timm's ViTs as backbones for SER."""

import copy
import sys

import pytest
import torch
from mmpretrain.registry import MODELS
from torch import nn

from ser_mm.checkpoint import to_timm_name
from ser_mm.models.backbones.ser_timm_vit import _can_be_packed
from tests.support.algorithms import (
    BACKBONE,
    EMBED_DIMS,
    IMAGE,
    PATCH,
    build,
    mlp,
    mocov3,
    two_views,
    with_ser,
)
from tests.support.networks import gradients, images
from tests.support.paths import ROOT
from tests.support.rounding import assert_far_above_rounding

timm = pytest.importorskip('timm')

pytestmark = pytest.mark.usefixtures('packed')

SMALL = dict(
    img_size=IMAGE, patch_size=PATCH, embed_dim=EMBED_DIMS, depth=4, num_heads=3, mlp_ratio=2
)
VIT = dict(type='SERTimmViT', model='vit_tiny_patch16_224', model_args=SMALL)
# Of float64, see test_tolerance_is_far_above_rounding.
CLOSE = dict(rtol=1e-10, atol=1e-10)


KINDS = {
    'class token': {},
    'mean of the patches': dict(global_pool='avg'),
    'no class token': dict(global_pool='avg', class_token=False),
    'registers': dict(reg_tokens=3),
    'registers, no class token': dict(reg_tokens=2, global_pool='avg', class_token=False),
    'positions of patches alone': dict(reg_tokens=2, no_embed_class=True),
    'no positions': dict(pos_embed='none'),
    'norms of queries and keys': dict(qk_norm=True),
    'layer scale, pre-norm, no bias': dict(init_values=0.1, pre_norm=True, qkv_bias=False),
    'head with a norm of its own': dict(fc_norm=True),
    'oblong': dict(img_size=(32, 48)),
}
NAMES = {  # of kinds that timm has under a name
    'gated MLP': 'vit_small_patch14_reg4_dinov2',
    'blocks of another kind': 'vit_small_patch16_18x2_224',
}
NAMED = dict(
    {'gated MLP': dict(mlp_layer=timm.layers.SwiGLUPacked, mlp_ratio=2)},
    **{'blocks of another kind': {}},
)


def built(config):
    torch.manual_seed(0)
    return randomized(MODELS.build(config))


def randomized(network):
    for p in network.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    return network.double()


def kind_of(name, **options):
    """Config of a kind, and its arguments in timm."""
    args = {**SMALL, **KINDS.get(name, {}), **NAMED.get(name, {})}
    model = NAMES.get(name, VIT['model'])
    return {**VIT, 'model': model, 'model_args': args, **options}


def theirs_of(config):
    return timm.create_model(
        config['model'], num_classes=0, dynamic_img_size=True, **config['model_args']
    ).double()


def test_tolerance_is_far_above_rounding():
    network = built(kind_of('registers', ser_layer=2))
    results = []
    for dtype in (torch.float64, torch.float32):
        outputs = network.to(dtype)(images(3, 24, 40).to(dtype))
        results.append([*outputs, *gradients(network, outputs)])
    assert_far_above_rounding(*results, **CLOSE)


@pytest.mark.parametrize('name', [*KINDS, *NAMES])
def test_equals_timm(name):
    """In names, outputs and gradients, also at other sizes, where positions are resized."""
    config = kind_of(name)
    ours, theirs = built(config), theirs_of(config)
    state = ours.state_dict()
    assert set(state) == set(theirs.state_dict())
    theirs.load_state_dict(state, strict=True)
    for mode in (True, False):
        ours.train(mode), theirs.train(mode)
        for size in (ours.img_size, (24, 40), (8, 8)):
            x = images(2, *size)
            close = CLOSE if size == ours.img_size else dict(rtol=1e-5, atol=1e-5)  # float32's
            torch.testing.assert_close(ours(x)[-1], theirs(x), **close)
    x = images(2, *ours.img_size)
    names = [n for n, _ in ours.named_parameters()]
    expected = dict(
        zip([n for n, _ in theirs.named_parameters()], gradients(theirs, [theirs(x)]), strict=True)
    )
    for n, found in zip(names, gradients(ours, ours(x)), strict=True):
        torch.testing.assert_close(found, expected[n], **CLOSE)


@pytest.mark.parametrize('out_type', ['cls_token', 'avg_featmap', 'featmap', 'raw'])
def test_outputs_of_every_block(out_type):
    network = built(kind_of('registers', out_type=out_type, out_indices=[0, 1, 2, -1]))
    theirs = theirs_of(kind_of('registers'))
    theirs.load_state_dict(network.state_dict())
    x = images(2)
    final, maps = theirs.forward_intermediates(x, return_prefix_tokens=True)
    outs = network(x)
    for i, (patches, prefix) in enumerate(maps):
        if i == 3:
            prefix, patches = final.split([4, 16], 1)
            patches = patches.mT.unflatten(2, (4, 4))
        expected = dict(
            cls_token=prefix[:, 0],
            avg_featmap=patches.mean(dim=(2, 3)),
            featmap=patches,
            raw=torch.cat([prefix, patches.flatten(2).mT], dim=1),
        )[out_type]
        torch.testing.assert_close(outs[i], expected, **CLOSE)


@pytest.mark.parametrize('cls_layer', [0, 2])
def test_is_our_vit_where_both_have_the_parts(cls_layer, tmp_path):
    """With the same weights, by the names of either, and SER: outputs, token map, gradients."""
    ours = built(dict(BACKBONE, cls_layer=cls_layer, pos_resize='timm'))
    config = kind_of('class token', ser_layer=2, cls_layer=cls_layer)
    config['init_cfg'] = dict(type='Pretrained', checkpoint=str(tmp_path / 'timm.pth'))
    timm_names = MODELS.build({**config, 'init_cfg': None})
    state = {f'backbone.{to_timm_name(k)}': v for k, v in ours.float().state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'timm.pth')
    network = MODELS.build(config)
    network.init_weights()
    assert network.state_dict().keys() == timm_names.state_dict().keys()
    network.double(), ours.double()
    results = {}
    for backbone in (ours, network):
        view, _ = two_views(4, 3, dtype=torch.float64)
        view.wants_features = True
        outputs = (*backbone(view), view.token_maps[backbone], view.features[backbone])
        found = gradients(backbone, outputs)
        names = [to_timm_name(n) for n, _ in backbone.named_parameters()]
        results[backbone] = outputs, dict(zip(names, found, strict=True))
        torch.testing.assert_close(backbone.features(view.base), outputs[2][:4], **CLOSE)
    (a, slopes_a), (b, slopes_b) = results.values()
    # Positions are resized in float32 in both, by the same operations.
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    assert slopes_a.keys() == slopes_b.keys()
    for n in slopes_a:
        torch.testing.assert_close(slopes_a[n], slopes_b[n], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('n1, n2', [(4, 0), (4, 3), (0, 2)])
@pytest.mark.parametrize('cls_layer', [0, 3])
@pytest.mark.parametrize(
    'name', ['class token', 'registers', 'no class token', *NAMES, 'norms of queries and keys']
)
def test_packed_equals_separate(name, cls_layer, n1, n2):
    late = 0 if name == 'no class token' else cls_layer
    network = built(kind_of(name, ser_layer=2, cls_layer=late))
    packs = {_can_be_packed(block) for block in network.blocks}
    assert packs == {name != 'blocks of another kind'}
    view, _ = two_views(n1, n2, dtype=torch.float64)
    (packed,) = network(view)
    separate = torch.cat([network(x)[0] for x in (view.base, view.equi) if len(x)])
    torch.testing.assert_close(packed, separate, **CLOSE)
    token_map = view.token_maps[network]
    assert token_map.shape == (n2, EMBED_DIMS, 3, 5)
    if n2:
        maps = copy.copy(network)
        maps.out_type, maps.out_indices = 'featmap', [1]
        torch.testing.assert_close(token_map, maps(view.equi)[0], **CLOSE)
        expected = maps(view.equi)[0]
        found = gradients(network, (packed, token_map))
        expected = gradients(network, (separate, expected))
        for (n, _), a, b in zip(network.named_parameters(), found, expected, strict=True):
            # Positions are resized in float32: sums of some 20 products.
            close = dict(rtol=1e-4, atol=1e-4) if n == 'pos_embed' else CLOSE
            torch.testing.assert_close(a, b, **close, msg=lambda m, n=n: f'{n}: {m}')


@pytest.mark.parametrize('name', ['class token', 'registers'])
def test_late_cls_and_registers_enter_after_the_block(name):
    """Before it, patches know nothing of them; their positions are gone."""
    network = built(kind_of(name, cls_layer=2, out_type='raw', out_indices=[0, 1, 2, 3]))
    assert network.pos_embed.shape == (1, 16, EMBED_DIMS)
    extra = 1 if name == 'class token' else 4
    x = images(2)
    before = network(x)
    assert [out.shape[1] for out in before] == [16, 16, 16 + extra, 16 + extra]
    for token in (network.cls_token, network.reg_token):
        if token is not None:
            token.data += torch.randn_like(token)
            after = network(x)
            same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            assert same == [True, True, False, False]


def test_drop_path_draws_per_image_and_is_timms_when_separate():
    config = kind_of('class token', ser_layer=1, cls_layer=0)
    config['model_args'] = dict(config['model_args'], drop_path_rate=0.9)
    network = built(config).train()
    view, _ = two_views(60, 40, grids=((4, 4), (4, 4)), dtype=torch.float64)
    view.base, view.equi = (images(1).expand(n, -1, -1, -1) for n in (60, 40))
    rows = network(view)[0]
    # Of equal images some keep what others drop, and few agree in all of six draws.
    assert 4 < len(torch.unique(rows.round(decimals=6), dim=0)) < 100
    network.eval()
    assert torch.isclose(network(view)[0], network(images(1))[0]).all()


def test_with_cp_changes_nothing():
    results = []
    for with_cp in (False, True):
        network = built(kind_of('registers', ser_layer=2, with_cp=with_cp))
        view, _ = two_views(3, 2, dtype=torch.float64)
        outputs = *network(view), view.token_maps[network]
        results.append([*outputs, *gradients(network, outputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_ser_trains_the_blocks_below_its_token_map():
    model = build(with_ser(mocov3(kind_of('class token', ser_layer=2), mlp(EMBED_DIMS))))
    losses = model.loss(two_views(), [None] * 9)
    losses['loss_ser'].backward()
    reached = {
        n.split('.')[1]
        for n, p in model.algorithm.backbone.named_parameters()
        if n.startswith('blocks.') and p.grad is not None and p.grad.any()
    }
    assert reached == {'0', '1'}


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_weights_of_timm_from_a_file(suffix, tmp_path):
    """With a classifier, and for another image size."""
    theirs = timm.create_model(VIT['model'], num_classes=5, **SMALL)
    randomized(theirs).float().eval()
    file = tmp_path / f'weights{suffix}'
    if suffix == '.pth':
        torch.save(theirs.state_dict(), file)
    else:
        pytest.importorskip('safetensors.torch').save_file(theirs.state_dict(), file)
    init = dict(type='Pretrained', checkpoint=str(file))
    network = MODELS.build(dict(VIT, init_cfg=init)).eval()
    network.init_weights()
    x = images(2).float()
    theirs.reset_classifier(0)
    torch.testing.assert_close(network(x)[-1], theirs(x), rtol=1e-5, atol=1e-5)
    network = MODELS.build(dict(VIT, init_cfg=init, model_args={**SMALL, 'img_size': 48}))
    network.init_weights()
    theirs.set_input_size(48)
    x = images(2, 48, 48).float()
    torch.testing.assert_close(network.eval()(x)[-1], theirs(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match='SERTimmViT: .*after block 0.*set cls_layer=0'):
        MODELS.build(dict(VIT, init_cfg=init, cls_layer=2)).init_weights()


REFUSED = {
    'unknown name': (dict(model='vit_tiny_patch16_225'), 'not in timm .*vit_tiny_patch16_224'),
    'download': (dict(model_args=dict(pretrained=True)), 'model_args.pretrained loads weights'),
    'hub': (dict(model='hf-hub:timm/vit_tiny'), "model='hf-hub.*left to init_cfg"),
    'unknown argument': (dict(model_args=dict(depht=3)), 'cannot build .*depht'),
    'ResNet': (dict(model='resnet18', model_args=None), 'is no ViT whose positions|a ResNet'),
    'Swin': (dict(model='swin_tiny_patch4_window7_224', model_args=None), 'cannot be used'),
    'EVA': (dict(model='eva02_tiny_patch14_224', model_args=None), 'a Eva, not a plain'),
    'distilled': (
        dict(model='deit_tiny_distilled_patch16_224', model_args=None),
        'a VisionTransformerDistilled',
    ),
    'attention pooling': (dict(model_args={**SMALL, 'global_pool': 'map'}), "global_pool='map'"),
    'patch dropout': (dict(model_args={**SMALL, 'patch_drop_rate': 0.5}), 'patch_drop_rate'),
    'padding': (dict(model_args={**SMALL, 'dynamic_img_pad': True}), 'dynamic_img_pad'),
    'ser_layer': (dict(ser_layer=5), 'ser_layer=5 .* from 1 to 4'),
    'cls_layer': (dict(cls_layer=4), 'cls_layer=4 .* from 0 to 3'),
    'out_indices': (dict(out_indices=[4]), r'out_indices=\[4\]'),
    'early [CLS]': (dict(cls_layer=2, out_indices=[1]), 'before it enters'),
    'no [CLS]': (
        dict(
            out_type='cls_token', model_args={**SMALL, 'class_token': False, 'global_pool': 'avg'}
        ),
        'no .CLS. token',
    ),
    'late without [CLS]': (
        dict(cls_layer=1, model_args={**SMALL, 'class_token': False, 'global_pool': 'avg'}),
        'cls_layer=1 needs a .CLS.',
    ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_is_refused_by_name(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as info:
        MODELS.build({**copy.deepcopy(VIT), **options})
    assert '\n' not in str(info.value)


def test_without_timm_it_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ImportError, match=r"needs timm.*run `pip install 'ser_mm\[timm\]'`"):
        MODELS.build(VIT)


def test_patch_embedding_can_be_kept_and_copies_work():
    network = MODELS.build(dict(VIT, ser_layer=2, stop_grad_conv1=True))
    frozen = [n for n, p in network.named_parameters() if not p.requires_grad]
    assert frozen == ['patch_embed.proj.weight', 'patch_embed.proj.bias']
    twin = copy.deepcopy(network)
    nn.init.zeros_(twin.norm.weight)
    assert network.norm.weight.all()
    assert network.get_layer_depth('backbone.blocks.3.norm1.weight', 'backbone.') == (4, 6)
    assert network.get_layer_depth('norm.weight') == (5, 6)
    assert network.get_layer_depth('pos_embed') == (0, 6)


def test_networks_of_the_guide():
    guide = (ROOT / 'docs/howto/own_algorithm.md').read_text()
    section = guide.partition('## A network of timm')[2].partition('## ')[0]
    lines = section.partition('```python\n')[2].partition('```')[0]
    for part in lines.split('algorithm.backbone = ')[1:]:
        network = MODELS.build(eval(part))
        assert network.token_map_stride == 16


@pytest.mark.parametrize(
    'name, cls_layer, expected',
    [
        ('registers', 0, lambda x: x[:, 0]),
        ('registers', 3, lambda x: x.mean(dim=1)),  # neither is in yet
        ('registers, no class token', 0, lambda x: x[:, 2:].mean(dim=1)),
    ],
)
def test_features_are_the_cls_token_or_else_the_mean_of_the_patches(name, cls_layer, expected):
    network = built(kind_of(name, ser_layer=2, cls_layer=cls_layer))
    plain = built(kind_of(name, cls_layer=cls_layer, out_type='raw', out_indices=[1]))
    x = images(2)
    torch.testing.assert_close(network.features(x), expected(plain(x)[0]), **CLOSE)


def test_dropout_of_timm_drops_in_training_alone():
    for rate in ('attn_drop_rate', 'proj_drop_rate', 'pos_drop_rate'):
        config = kind_of('class token')
        config['model_args'] = {**config['model_args'], rate: 0.5}
        network = built(config).train()
        x = images(2)
        assert not torch.equal(network(x)[0], network(x)[0]), rate
        network.eval()
        assert torch.equal(network(x)[0], network(x)[0])
