"""How much SER's loss weighs in the gradient, beside that of the algorithm that it is added to.

The norms are of the gradient of each loss, weighted as in the config, in the blocks of the ViT
before the token map: what both losses pull at. They are medians over batches of the config's
data, as one batch has few images of b2.

    python benchmarks/gradients.py configs/demo/ser_barlowtwins.py --checkpoint SER/epoch_8.pth
"""

import argparse
import statistics
from itertools import islice
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MessageHub
from mmengine.runner import Runner, set_random_seed
from step import prepare, report

from ser_mm.checkpoint import read_weights
from ser_mm.datasets import split_batches
from ser_mm.evaluation.backbone import build_model


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', type=Path, help='config of SERAlgorithm')
    parser.add_argument('--checkpoint', help='of that config (default: at initialization)')
    parser.add_argument('--batches', type=int, default=10, help='default: 10')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/gradients.json'))
    args = parser.parse_args()
    prepare()
    cfg = Config.fromfile(args.config)
    backbone = cfg.model.get('algorithm', {}).get('backbone', {}).get('type')
    if backbone != 'SERVisionTransformer':
        parser.error(f'{args.config} is no config of SERAlgorithm with a SERVisionTransformer.')
    MessageHub.get_current_instance().update_info('max_iters', 1000)
    set_random_seed(0)
    batches = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    split_batches(batches)
    model = build_model(cfg)
    model.init_weights()
    if args.checkpoint:
        model.load_state_dict(read_weights(args.checkpoint))
    model.to(get_device()).train()
    layers = model.backbone.layers[: model.backbone.ser_layer]
    shared = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    found = {'loss_inv': [], 'loss_ser': []}
    for batch in islice(batches, args.batches):
        losses = model(**model.data_preprocessor(batch, True), mode='loss')
        for name, values in found.items():
            gradient = torch.autograd.grad(losses[name], shared, retain_graph=True)
            norm = torch.nn.utils.get_total_norm(gradient)
            values.append((losses[name].item(), norm.item()))
    rows = {}
    for name, values in found.items():
        loss, gradient = map(statistics.median, zip(*values, strict=True))
        rows[name] = dict(loss=loss, gradient=gradient)
    about = dict(
        config=args.config.stem,
        checkpoint=args.checkpoint,
        loss_weight=model.loss_weight,
        batches=len(found['loss_inv']),
    )
    report(args.out, about, rows)
    for name, row in rows.items():
        print(f'{name}: {row["loss"]:.3f}, gradient {row["gradient"]:.4f}')
    ratio = rows['loss_ser']['gradient'] / rows['loss_inv']['gradient']
    print(f'ratio of the gradients: {ratio:.4f}')


if __name__ == '__main__':
    main()
