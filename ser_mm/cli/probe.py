"""Linear probe and k-NN of a frozen backbone: top-1 and top-5 with 95 % confidence intervals.

Features are extracted once and cached. All learning rates are trained in one pass over them; the
best on a held-out part of the training set is reported on the validation set.
"""

import argparse

from mmengine.dist import is_main_process

from ser_mm.cli._arguments import (
    add_arguments,
    add_probe_arguments,
    feature_options,
    fit_head,
    load_config,
    make_table,
    positive,
    run,
    write_results,
)
from ser_mm.evaluation import accuracy, knn_votes, load_features


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of the model, with `evaluation`')
    parser.add_argument('checkpoint', help='its checkpoint, or one of the backbone')
    parser.add_argument(
        '--k', type=positive(int), nargs='+', default=[10, 20, 100], help='neighbours'
    )
    parser.add_argument('--temperature', type=positive(float), default=0.07, help='of their votes')
    add_probe_arguments(parser)
    add_arguments(parser, 'work_dirs/probe')
    return parser.parse_args()


def main() -> None:
    """Extract, train, vote, report."""
    args = parse_args()
    cfg = load_config(args)
    val = load_features(cfg, args.checkpoint, 'val', **feature_options(args), main_only=True)
    head, choice, train = fit_head(cfg, args.checkpoint, args)
    if not is_main_process():
        return  # what is left needs one process
    (train, train_labels), (val, val_labels) = train, val

    results = {'linear probe': {**accuracy(head(val).detach(), val_labels), **choice}}
    votes = knn_votes(train, train_labels, val, args.k, args.temperature)
    results |= {f'{k}-NN': accuracy(votes[k], val_labels) for k in args.k}

    def cell(result: dict, name: str) -> str:
        low, high = result[f'{name}_ci']
        return f'{result[name]:.4f} [{low:.4f}, {high:.4f}]'

    rows = [[name, cell(r, 'top1'), cell(r, 'top5')] for name, r in results.items()]
    rate = choice['learning_rate']
    edge = rate in (min(args.lrs), max(args.lrs)) and len(args.lrs) > 1
    notes = [
        f'{args.checkpoint}, {len(train)} training and {len(val)} validation images, Wilson 95 %.',
        f'Features: last {args.blocks} block(s), {train.shape[1]} wide, of the centre crop.'
        if args.blocks > 1
        else f'Features: last output, {train.shape[1]} wide, of the centre crop.',
        f'Linear probe: {args.epochs} epochs on 90 % of the training images; learning rate {rate} '
        'chosen on the others' + (', at the edge of the sweep: widen --lrs.' if edge else '.'),
        f'k-NN: weights exp(cosine / {args.temperature}).',
    ]
    table = make_table(['', 'top-1 [95 %]', 'top-5 [95 %]'], rows)
    text = f'{table}\n\n' + '\n'.join(f'- {note}' for note in notes)
    settings = dict(config=args.config, checkpoint=args.checkpoint, blocks=args.blocks)
    write_results(args.out, 'probe', {**settings, 'results': results}, text)


if __name__ == '__main__':
    run(main)
