"""Linear probe and k-NN of a frozen backbone: top-1 and top-5 with 95 % confidence intervals.

Features are extracted once and cached. All learning rates are trained in one pass over them; the
best on a held-out part of the training set is reported on the validation set.
"""

import argparse
from collections.abc import Sequence

from mmengine.dist import is_main_process
from torch import Tensor, nn

from ser_mm.cli._arguments import (
    CONFIG_HELP,
    add_feature_arguments,
    add_probe_arguments,
    feature_options,
    load_config,
    make_parser,
    one_sentence,
    positive,
    probe_options,
)
from ser_mm.engine.cpu import close_process_group
from ser_mm.evaluation.features import CachedFeatures
from ser_mm.evaluation.knn import knn_votes
from ser_mm.evaluation.linear import fit_head
from ser_mm.evaluation.metrics import accuracy
from ser_mm.evaluation.results import make_table, write_results


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('probe', __doc__)
    parser.add_argument('config', help=f'{CONFIG_HELP}; with `evaluation`')
    parser.add_argument('checkpoint', help='checkpoint of this config, or one of its backbone')
    parser.add_argument(
        '--k',
        type=positive(int),
        nargs='+',
        default=[10, 20, 100],
        help='numbers of neighbours of the k-NN vote (default: 10 20 100)',
    )
    parser.add_argument(
        '--temperature',
        type=positive(float),
        default=0.07,
        help='temperature of the k-NN vote, whose weights are exp(cosine / temperature) '
        '(default: 0.07)',
    )
    add_probe_arguments(parser)
    add_feature_arguments(parser, 'work_dirs/probe')
    return parser.parse_args(argv)


@one_sentence(interrupted='Interrupted; features that were extracted are kept.')
def main(argv: Sequence[str] | None = None) -> None:
    """Extract, train, vote, report.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    args = parse_args(argv)
    cfg = load_config(args.config, args)
    source = CachedFeatures(cfg, args.checkpoint, **feature_options(args))
    val = source.load('val', main_only=True)
    head, choice, train = fit_head(source, **probe_options(args))
    if is_main_process():  # what is left needs one process
        _report(args, head, choice, *train, *val)
    close_process_group()


def _report(
    args: argparse.Namespace,
    head: nn.Linear,
    choice: dict,
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
) -> None:
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
    main()
