"""MultiCropMoCoV3: two views as MoCo v3 has them, and crops that predict both keys."""

import copy

import torch
import torch.nn.functional as F

from tests.support.algorithms import (
    BACKBONE,
    EMBED_DIMS,
    IMAGE,
    build,
    mlp,
    mocov3,
    two_views,
    with_ser,
)

SMALL = IMAGE // 2
CLOSE = dict(rtol=1e-9, atol=1e-11)  # as in test_ser_algorithm, without float32 in between


def model_of(**options):
    torch.manual_seed(0)
    config = mocov3(dict(BACKBONE), mlp(EMBED_DIMS))
    return build(copy.deepcopy({**config, **options})).double().train()


def images(count, side, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 6, 3, side, side, generator=rng, dtype=torch.float64))


def test_with_two_views_it_is_moco_v3():
    plain, multi = model_of(), model_of(type='MultiCropMoCoV3')
    views = images(2, IMAGE)
    for model in (plain, multi):
        model.loss(views, None)['loss'].backward()
    assert torch.equal(multi.loss(views)['loss'], plain.loss(views, None)['loss'])
    for a, b in zip(multi.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


def terms(model, views, crops):
    """Every query against the keys of the other global views, one pass per view."""
    model = copy.deepcopy(model)
    queries = [model.neck(model.backbone(x))[0] for x in (*views, *crops)]
    with torch.no_grad():
        model.momentum_encoder.update_parameters(torch.nn.Sequential(model.backbone, model.neck))
        keys = [F.normalize(model.momentum_encoder(x)[0]) for x in views]
    losses = []
    for i, query in enumerate(queries):
        for j, key in enumerate(keys):
            if i != j:
                predicted = F.normalize(model.head.predictor([query])[0])
                logits = predicted @ key.t() / 0.2
                losses.append(0.4 * F.cross_entropy(logits, torch.arange(len(key))))
    return losses


def test_four_crops_make_ten_terms():
    model = model_of(type='MultiCropMoCoV3')
    views, crops = images(2, IMAGE), images(4, SMALL, seed=1)
    losses = terms(model, views, crops)
    assert len(losses) == 10
    torch.testing.assert_close(model.loss([*views, *crops])['loss'], sum(losses), **CLOSE)


def test_a_turned_crop_is_four():
    model = model_of(type='MultiCropMoCoV3', turn_crops=True)
    views, (crop,) = images(2, IMAGE), images(1, SMALL, seed=1)
    turned = [torch.rot90(crop, k, (2, 3)) for k in range(4)]
    expected = sum(terms(model, views, turned))
    torch.testing.assert_close(model.loss([*views, crop])['loss'], expected, **CLOSE)


def test_it_trains_in_ser():
    """b2 of two views, and a local crop of all images."""
    algorithm = dict(mocov3(dict(BACKBONE), mlp(EMBED_DIMS)), type='MultiCropMoCoV3')
    torch.manual_seed(0)
    model = build(copy.deepcopy(with_ser(algorithm))).train()
    views = two_views(6, 3)
    total, _ = model.parse_losses(model.loss([*views, torch.randn(9, 3, SMALL, SMALL)]))
    total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
