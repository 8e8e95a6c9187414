"""Linear probe and k-NN of a frozen backbone: top-1 and top-5 with 95 % confidence intervals.

Features are extracted once and cached. All learning rates are trained in one pass over them; the
best on a held-out part of the training set is reported on the validation set, and on other sets of
the same classes or of some, as ImageNet-V2, -R, -A and -Sketch are published.
"""

import argparse
from collections.abc import Sequence

import torch
from mmengine.dist import is_main_process
from torch import Tensor, nn

from ser_mm.cli._arguments import (
    CONFIG_HELP,
    Fields,
    about_option,
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
from ser_mm.evaluation.data import build_loader
from ser_mm.evaluation.features import CachedFeatures
from ser_mm.evaluation.knn import check_shots, few_shot
from ser_mm.evaluation.linear import fit_head
from ser_mm.evaluation.metrics import tell_unseen
from ser_mm.evaluation.results import make_table, write_results
from ser_mm.evaluation.sets import add_sets, measure_set


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
    parser.add_argument(
        '--also',
        nargs='+',
        action=Fields,
        default={},
        metavar='NAME=FOLDER',
        help='other images to classify: folders of class folders, which are named as those of the '
        'training images (ImageNet-R, -A, -Sketch), or numbered from 0 (ImageNet-V2)',
    )
    parser.add_argument(
        '--shots',
        type=positive(int),
        nargs='+',
        default=[],
        metavar='N',
        help='k-NN with N training images of each class too, drawn --draws times',
    )
    parser.add_argument(
        '--draws',
        type=positive(int),
        default=10,
        help='times that the images of --shots are drawn, 2 or more (default: 10)',
    )
    add_probe_arguments(parser)
    add_feature_arguments(parser, 'work_dirs/probe')
    args = parser.parse_args(argv)
    if args.draws < 2:
        parser.error(f'--draws {args.draws}: the interval needs two or more.')
    return args


@one_sentence(interrupted='Interrupted; features that were extracted are kept.')
def main(argv: Sequence[str] | None = None) -> None:
    """Extract, train, vote, report.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    args = parse_args(argv)
    cfg = load_config(args.config, args)
    with about_option('--also'):
        subsets = add_sets(cfg, args.also)
    if args.shots:  # on all ranks, as some data sets wait for each other
        labels = torch.as_tensor(build_loader(cfg, 'train')[1].dataset.get_gt_labels())
        with about_option('--shots'):
            check_shots(labels, args.shots)
    source = CachedFeatures(cfg, args.checkpoint, **feature_options(args))
    val = source.load('val', main_only=True)
    head, choice, train = fit_head(source, **probe_options(args))
    sets = {name: source.load(name, main_only=True) for name in args.also}
    if is_main_process():  # what is left needs one process
        _report(args, head, choice, train, val, sets, subsets)
    close_process_group()


def _report(
    args: argparse.Namespace,
    head: nn.Linear,
    choice: dict,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    sets: dict[str, tuple[Tensor, Tensor]],
    subsets: dict[str, list[int]],
) -> None:
    vote = args.k, args.temperature
    results = measure_set(head, train, val, range(head.out_features), *vote)
    results['linear probe'] |= choice
    found: dict = dict(results=results)
    rows = [[name, _cell(r, 'top1'), _cell(r, 'top5')] for name, r in results.items()]
    tables = [make_table(['', 'top-1 [95 %]', 'top-5 [95 %]'], rows)]
    rate, width = choice['learning_rate'], head.in_features
    edge = rate in (min(args.lrs), max(args.lrs)) and len(args.lrs) > 1
    notes = [
        f'{args.checkpoint}, {len(train[1])} training and {len(val[1])} validation images, Wilson '
        '95 %.',
        f'Features: last {args.blocks} block(s), {width} wide, of the centre crop.'
        if args.blocks > 1
        else f'Features: last output, {width} wide, of the centre crop.',
        f'Linear probe: {args.epochs} epochs on 90 % of the training images; learning rate {rate} '
        'chosen on the others' + (', at the edge of the sweep: widen --lrs.' if edge else '.'),
        f'k-NN: weights exp(cosine / {args.temperature}).',
        *tell_unseen(train[1], val[1]),
    ]
    if sets:
        found['also'] = {
            name: dict(
                folder=args.also[name],
                images=len(images[1]),
                classes=len(subsets[name]),
                results=measure_set(head, train, images, subsets[name], *vote),
            )
            for name, images in sets.items()
        }
        rows = [
            [name, x['images'], x['classes'], *(_cell(r, 'top1') for r in x['results'].values())]
            for name, x in found['also'].items()
        ]
        tables.append(make_table(['top-1 [95 %]', 'images', 'classes', *results], rows))
        notes.append(
            'Other sets: the head answers with one of the classes of the set, and neighbours are '
            'sought among the training images of these.'
        )
    if args.shots:
        shots = few_shot(*train, *val, args.shots, args.draws, *vote)
        found['few_shot'] = {
            n: {f'{k}-NN': result for k, result in some.items()} for n, some in shots.items()
        }
        rows = [
            [f'{n} of each class', name, _cell(result, 'mean', 'interval')]
            for n, some in found['few_shot'].items()
            for name, result in some.items()
        ]
        tables.append(make_table(['few-shot', 'k', 'mean top-1 [95 %]'], rows))
        notes.append(
            f'Few-shot: mean of {args.draws} draws of the training images, Student 95 % of what '
            'the draw does; the validation images are the same.'
        )
    text = '\n\n'.join(tables) + '\n\n' + '\n'.join(f'- {note}' for note in notes)
    settings = dict(config=args.config, checkpoint=args.checkpoint, blocks=args.blocks)
    write_results(args.out, 'probe', {**settings, **found}, text)


def _cell(result: dict, name: str, interval: str | None = None) -> str:
    low, high = result[interval or f'{name}_ci']
    return f'{result[name]:.4f} [{low:.4f}, {high:.4f}]'


if __name__ == '__main__':
    main()
