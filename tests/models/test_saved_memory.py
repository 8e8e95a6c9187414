"""What a step keeps for its backward pass, in bytes that no machine changes."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch.nn.utils import prune

from ser_mm.evaluation.cost import saved_bytes
from ser_mm.models import SERVisionTransformer
from ser_mm.models.backbones.ser_vit import _linear_of_parts
from ser_mm.views import ViewBatch
from tests.support.algorithms import ALGORITHMS, BACKBONE, IMAGE, build, two_views

pytestmark = pytest.mark.usefixtures('packed')

OPTIONS = {key: value for key, value in BACKBONE.items() if key != 'type'}


def whole_and_split(n1, n2):
    """The same images as one tensor, and as b1 and b2."""
    images = torch.randn(n1 + n2, 3, IMAGE, IMAGE)
    return images, ViewBatch(images[:n1], images[n1:], torch.zeros(n2, dtype=torch.long))


def kept(network, inputs, mixed):
    autocast = torch.autocast('cpu', torch.bfloat16) if mixed else nullcontext()
    with saved_bytes(network) as saved, autocast:
        network(inputs)
    return sum(saved.values())


@pytest.mark.parametrize('mixed', [False, True], ids=['float32', 'bfloat16'])
def test_a_packed_pass_keeps_what_one_tensor_of_images_does(mixed):
    """Nothing twice: on the grid of b1, the same bytes but for the positions of b2.

    With the tokens of each group concatenated for the layer after attention and kept there, it
    was one copy of all tokens more in each block.
    """
    network = SERVisionTransformer(**OPTIONS).train()
    images, split = whole_and_split(96, 32)
    whole, packed = (kept(network, x, mixed) for x in (images, split))
    copy = images.shape[0] * network.pos_embed[0].numel() * (2 if mixed else 4)
    assert abs(packed - whole) < copy / 4  # of one block


def test_on_a_cpu_what_is_kept_of_b1_does_not_depend_on_b2(monkeypatch):
    """A packed sequence has another size in every batch, by which memory fragments."""
    monkeypatch.setattr(SERVisionTransformer, 'one_pass', None)
    network = SERVisionTransformer(**OPTIONS).train()
    views = [two_views(6, n2, ((4, 4), grid))[0] for n2, grid in ((0, (4, 4)), (2, (3, 5)))]
    sizes = []
    for view in views:
        with saved_bytes(network) as saved:
            network(view)
        sizes.append(Counter(saved.values()))
    assert sizes[0].total() > 50 and sizes[0] <= sizes[1]


def test_momentum_maps_keep_nothing_of_b1():
    model = build(ALGORITHMS['mocov3'])
    views = two_views(6, 2)
    with torch.no_grad():
        model.algorithm.momentum_encoder(views[0])
    (token_map,) = views[0].token_maps.values()
    assert token_map.untyped_storage().nbytes() == token_map.nbytes


def test_saved_bytes_are_those_counted_by_hand():
    layer = torch.nn.Linear(5, 3)
    x = torch.randn(7, 5, requires_grad=True)
    with saved_bytes(layer) as saved:
        layer(x).exp().sum()
    assert sorted(saved.values()) == [7 * 3 * 4, 7 * 5 * 4]  # of exp its output; no parameter


def test_gradients_of_parts_are_those_of_their_concatenation():
    """Of the layer after attention, which does not keep the concatenation."""
    torch.manual_seed(0)
    network = SERVisionTransformer(**OPTIONS).double().train()
    images, split = whole_and_split(3, 2)
    results = []
    for x in (images.double(), ViewBatch(split.base.double(), split.equi.double(), split.elements)):
        (output,) = network(x)
        parameters = [p for p in network.parameters() if p.requires_grad]
        results.append(torch.autograd.grad(output.square().sum(), parameters))
    for whole, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, whole, rtol=1e-10, atol=1e-10)


def test_parts_that_autocast_left_in_float32():
    """On a GPU it computes norms in float32, and a ViT may have one after attention."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 4)
    parts = [torch.randn(n, 8, requires_grad=True) for n in (3, 2)]
    with torch.autocast('cpu', torch.bfloat16):
        output = _linear_of_parts(layer, parts)
        expected = layer(torch.cat(parts))
    assert output.dtype is torch.bfloat16 and torch.equal(output, expected)
    leaves = [*parts, *layer.parameters()]
    gradients, others = (torch.autograd.grad(x.sum(), leaves) for x in (output, expected))
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0.02, atol=0.02)


def test_a_layer_of_another_class_is_called():
    """LoRA replaces layers, and so do others: their forward pass is not passed over."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    network = SERVisionTransformer(**OPTIONS).eval()
    images, split = whole_and_split(3, 2)
    before = network(split)[0]
    for layer in network.layers:
        layer.attn.proj.__class__ = Doubled
    torch.testing.assert_close(network(split)[0], network(images)[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(network(split)[0], before, rtol=1e-2)


def test_hooks_of_the_layer_after_attention_are_called():
    """Those of pruning compute its weight."""
    network = SERVisionTransformer(**OPTIONS).train()
    _, split = whole_and_split(3, 2)
    seen = []
    network.layers[0].attn.proj.register_forward_hook(lambda *args: seen.append(args[2]))
    network(split)
    assert len(seen) == 1
    prune.l1_unstructured(network.layers[1].attn.proj, 'weight', 0.5)
    for _ in range(2):
        network(split)[0].sum().backward()
