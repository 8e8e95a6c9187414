"""t-SNE of features of some classes, clean and corrupted, of one checkpoint or several.

Each panel has numbers for what the eye sees: the silhouette of the classes, and the share of a
point's 10 nearest neighbours that are of its class, both on the map and of the features.
"""

import argparse
from collections.abc import Sequence

from mmengine.dist import is_main_process

from ser_mm.cli._arguments import (
    add_feature_arguments,
    feature_options,
    load_config,
    make_parser,
    one_sentence,
    place,
    positive,
)
from ser_mm.datasets.transforms.corrupt import SEVERITIES
from ser_mm.engine.cpu import close_process_group
from ser_mm.evaluation.features import CachedFeatures
from ser_mm.evaluation.results import make_table, write_results
from ser_mm.evaluation.tsne import MEASURES, NEIGHBOURS, embed, load_panels, measure_classes
from ser_mm.visualization import draw_tsne


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('tsne', __doc__)
    parser.add_argument(
        'runs',
        nargs='+',
        metavar='CONFIG CHECKPOINT',
        help='config (a path, or the name of a shipped one) and checkpoint; several pairs are '
        'drawn side by side',
    )
    parser.add_argument(
        '--names', nargs='+', help='names of the pairs in the figure (default: the checkpoints)'
    )
    parser.add_argument(
        '--classes', nargs='+', help='names of the classes to show (default: 20, evenly spaced)'
    )
    parser.add_argument(
        '--per-class', type=positive(int), default=50, help='images of each class (default: 50)'
    )
    parser.add_argument(
        '--corruption',
        default='defocus_blur',
        help='corruption of the second row of panels (default: %(default)s)',
    )
    parser.add_argument(
        '--severity',
        type=int,
        default=3,
        choices=SEVERITIES,
        help='severity of the corruption (default: 3)',
    )
    parser.add_argument(
        '--imagenet-c',
        type=place,
        metavar='ROOT',
        help='folder of ImageNet-C (default: the validation images, corrupted on the fly)',
    )
    parser.add_argument(
        '--perplexity', type=positive(float), default=30, help='perplexity of t-SNE (default: 30)'
    )
    parser.add_argument('--seed', type=int, default=0, help='seed of t-SNE (default: 0)')
    add_feature_arguments(parser, 'work_dirs/tsne')
    args = parser.parse_args(argv)
    if len(args.runs) % 2:
        parser.error(f'{len(args.runs)} positional arguments; give pairs of CONFIG and CHECKPOINT.')
    args.runs = list(zip(args.runs[::2], args.runs[1::2], strict=True))
    args.names = args.names or [checkpoint for _, checkpoint in args.runs]
    if len(args.names) != len(args.runs) or len(set(args.names)) < len(args.names):
        parser.error(f'--names needs {len(args.runs)} different names, one per checkpoint.')
    if args.imagenet_c and not args.imagenet_c.is_dir():
        parser.error(f'--imagenet-c {args.imagenet_c} is not a folder.')
    return args


@one_sentence(interrupted='Interrupted; features that were extracted are kept.')
def main(argv: Sequence[str] | None = None) -> None:
    """Extract, embed, measure, draw.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    args = parse_args(argv)
    panels, classes = {}, args.classes
    for name, (config, checkpoint) in zip(args.names, args.runs, strict=True):
        cfg = load_config(config, args, ['val'])
        source = CachedFeatures(cfg, checkpoint, **feature_options(args))
        panels[name], classes = load_panels(
            source,
            args.corruption,
            args.severity,
            args.imagenet_c,
            classes,
            args.per_class,
            args.perplexity,
        )
    if is_main_process():
        _report(args, panels, classes)
    close_process_group()


def _report(args: argparse.Namespace, panels: dict[str, dict], classes: list[str]) -> None:
    results, drawn, rows = {}, {}, []
    for name, found in panels.items():
        results[name] = {}
        for data, (features, labels) in found.items():
            print(f't-SNE of {name}, {data}: {len(labels)} images', flush=True)
            places = embed(features, args.perplexity, args.seed)
            result = dict(
                map=measure_classes(places, labels), features=measure_classes(features, labels)
            )
            results[name][data] = result
            title = f'{name}, {data}\n' + ', '.join(
                f'{key} {result["map"][key]:.3f}' for key in MEASURES
            )
            drawn.setdefault(data, []).append((title, places, labels))
            measures = [result[space][key] for space in ('map', 'features') for key in MEASURES]
            rows.append([f'{name}, {data}', *measures])

    args.out.mkdir(parents=True, exist_ok=True)
    draw_tsne(list(drawn.values()), classes, args.out / 'tsne.png')
    header = ['', *(f'{key}, {space}' for space in ('map', 'features') for key in MEASURES)]
    made = f'from {args.imagenet_c}' if args.imagenet_c else 'made on the fly'
    note = (
        f'- {len(classes)} classes, at most {args.per_class} images each; {args.corruption} '
        f'{made}.\n- agreement: share of the {NEIGHBOURS} nearest neighbours of the same class. '
        'Features are normalized.'
    )
    names = 'runs', 'blocks', 'corruption', 'severity', 'per_class', 'perplexity', 'seed'
    settings = {**{name: getattr(args, name) for name in names}, 'classes': classes}
    text = f'{make_table(header, rows)}\n\n{note}'
    write_results(args.out, 'tsne', {**settings, 'results': results}, text)


if __name__ == '__main__':
    main()
