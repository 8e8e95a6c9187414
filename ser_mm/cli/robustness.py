"""ImageNet-C and ImageNet-P of a frozen backbone, under the linear head that the probe fits.

Folders as published: CORRUPTION/SEVERITY/CLASS/*.JPEG and PERTURBATION/CLASS/*.mp4. Without
ImageNet-C, the validation images are corrupted on the fly. What was measured is kept: the same
command continues where it was interrupted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.dist import is_main_process

from ser_mm.cli._arguments import (
    CONFIG_HELP,
    add_feature_arguments,
    add_probe_arguments,
    feature_options,
    load_config,
    make_parser,
    one_sentence,
    place,
    probe_options,
)
from ser_mm.datasets import Corrupt
from ser_mm.engine.cpu import close_process_group
from ser_mm.evaluation.features import CachedFeatures
from ser_mm.evaluation.linear import fit_head
from ser_mm.evaluation.metrics import tell_unseen
from ser_mm.evaluation.results import write_results
from ser_mm.evaluation.robustness import (
    CORRUPTIONS,
    add_datasets,
    classify,
    corrupted_datasets,
    measure_corruptions,
    measure_perturbations,
    perturbed_datasets,
    report_corruptions,
    report_perturbations,
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('robustness', __doc__)
    parser.add_argument('config', help=f'{CONFIG_HELP}; with `evaluation`')
    parser.add_argument('checkpoint', help='checkpoint of this config, or one of its backbone')
    for name in ('c', 'p'):
        parser.add_argument(
            f'--imagenet-{name}',
            type=place,
            help=f'folder of ImageNet-{name.upper()} (default: data/imagenet-{name}, if it is '
            'there; with --data none)',
        )
    parser.add_argument(
        '--corruptions',
        nargs='+',
        choices=CORRUPTIONS,
        default=CORRUPTIONS,
        metavar='NAME',
        help=f'corruptions to measure, of {", ".join(CORRUPTIONS)} (default: all)',
    )
    add_probe_arguments(parser)
    add_feature_arguments(parser, 'work_dirs/robustness')
    args = parser.parse_args(argv)
    for name in ('imagenet_c', 'imagenet_p'):
        root, default = getattr(args, name), Path('data', name.replace('_', '-'))
        if root is None and default.is_dir() and not args.data:  # of ImageNet's classes
            setattr(args, name, default)
        elif root is not None and not root.is_dir():
            parser.error(f'--{name.replace("_", "-")} {root} is not a folder.')
    return args


@one_sentence(interrupted='Interrupted; the same command continues with what is not measured yet.')
def main(argv: Sequence[str] | None = None) -> None:
    """Fit the head, classify everything, report.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    args = parse_args(argv)
    cfg = load_config(args.config, args)
    clean = cfg.evaluation.val
    corruptions = corrupted_datasets(clean, args.corruptions, args.imagenet_c)
    corruptions, missing_c = add_datasets(cfg, corruptions, args.imagenet_c)
    if not args.imagenet_c:
        Corrupt(args.corruptions[0], 1)  # is its package here?
    if args.imagenet_p:
        perturbations = perturbed_datasets(clean, args.imagenet_p)
        perturbations, missing_p = add_datasets(cfg, perturbations, args.imagenet_p)

    source = CachedFeatures(cfg, args.checkpoint, **feature_options(args))
    head, choice, train = fit_head(source, **probe_options(args))
    classes, labels = classify(source, head, 'val')
    clean = float((classes == labels).double().mean())
    results = dict(
        config=args.config, checkpoint=args.checkpoint, blocks=args.blocks, head=choice, clean=clean
    )
    results['imagenet_c'] = measure_corruptions(
        source, head, corruptions, len(labels), missing_c, args.imagenet_c
    )
    if args.imagenet_p:
        results['imagenet_p'] = measure_perturbations(source, head, perturbations, missing_p)
    if is_main_process():
        text = [
            f'{args.checkpoint}: top-1 {clean:.4f} on {len(labels)} clean images, linear head on '
            f'the last {args.blocks} block(s).',
            *tell_unseen(train[1], labels),
            report_corruptions(results['imagenet_c']),
            report_perturbations(results['imagenet_p'], args.imagenet_p)
            if args.imagenet_p
            else 'ImageNet-P: not measured, as data/imagenet-p is not there; see --imagenet-p.',
        ]
        write_results(args.out, 'robustness', results, '\n\n'.join(text))
    close_process_group()


if __name__ == '__main__':
    main()
