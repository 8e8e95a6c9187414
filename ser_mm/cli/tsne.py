"""t-SNE of features of some classes, clean and corrupted, of one checkpoint or several.

Each panel has numbers for what the eye sees: the silhouette of the classes, and the share of a
point's 10 nearest neighbours that are of its class, both on the map and of the features.
"""

import argparse
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmpretrain.registry import DATASETS
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from ser_mm.cli._arguments import (
    add_arguments,
    feature_options,
    load_config,
    make_table,
    positive,
    run,
    write_results,
)
from ser_mm.engine.cpu import check_dataset
from ser_mm.evaluation import load_features
from ser_mm.evaluation.robustness import SEVERITIES, corrupted
from ser_mm.visualization import draw_tsne

NEIGHBOURS = 10
MEASURES = ('silhouette', 'agreement')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'runs', nargs='+', metavar='CONFIG CHECKPOINT', help='one pair or several, side by side'
    )
    parser.add_argument('--names', nargs='+', help='of the pairs (default: the checkpoints)')
    parser.add_argument('--classes', nargs='+', help='their names (default: 20, evenly spaced)')
    parser.add_argument('--per-class', type=positive(int), default=50, help='images (default: 50)')
    parser.add_argument('--corruption', default='defocus_blur', help='default: %(default)s')
    parser.add_argument('--severity', type=int, default=3, choices=SEVERITIES, help='default: 3')
    parser.add_argument(
        '--imagenet-c', type=Path, help='its folder (default: corrupt on the fly)', metavar='ROOT'
    )
    parser.add_argument(
        '--perplexity', type=positive(float), default=30, help='of t-SNE (default: 30)'
    )
    parser.add_argument('--seed', type=int, default=0, help='of t-SNE (default: 0)')
    add_arguments(parser, 'work_dirs/tsne')
    args = parser.parse_args()
    if len(args.runs) % 2:
        parser.error(f'{len(args.runs)} positional arguments; give pairs of CONFIG and CHECKPOINT.')
    args.runs = list(zip(args.runs[::2], args.runs[1::2], strict=True))
    args.names = args.names or [checkpoint for _, checkpoint in args.runs]
    if len(args.names) != len(args.runs) or len(set(args.names)) < len(args.names):
        parser.error(f'--names needs {len(args.runs)} different names, one per checkpoint.')
    if args.imagenet_c and not args.imagenet_c.is_dir():
        parser.error(f'--imagenet-c {args.imagenet_c} is not a folder.')
    return args


def choose(dataset: dict, classes: list[str] | None, per_class: int) -> tuple[dict, list[str]]:
    """The first images of some classes of a data set.

    Args:
        dataset (dict): Config.
        classes (list[str], optional): Their names. None for 20, evenly spaced.
        per_class (int): Images of each.

    Returns:
        tuple: Config of the subset, and the names in the order of the data set.

    Raises:
        ValueError: If a class is not in the data set.
    """
    whole = DATASETS.build(dataset)
    known = list(whole.metainfo.get('classes') or [])
    if classes is None:
        count = min(20, len(known))
        classes = [known[i * len(known) // count] for i in range(count)]
    odd = [name for name in classes if name not in known]
    if odd or len(classes) < 2:
        raise ValueError(
            f'--classes {" ".join(odd or classes)}: choose two or more of '
            f'{", ".join(known[:20])}{", ..." if len(known) > 20 else ""}.'
        )
    classes = [name for name in known if name in classes]
    labels = np.array([whole.get_data_info(i)['gt_label'] for i in range(len(whole))])
    chosen = [np.flatnonzero(labels == known.index(name))[:per_class] for name in classes]
    indices = np.concatenate(chosen)
    given = dataset.get('indices')
    if given is not None:
        indices = np.arange(given)[indices] if isinstance(given, int) else np.array(given)[indices]
    return dict(dataset, indices=indices.tolist()), classes


def measure(places: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How well classes are apart, in [-1, 1] and [0, 1]."""
    near = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(places).kneighbors(return_distance=False)
    return dict(
        silhouette=float(silhouette_score(places, labels)),
        agreement=float((labels[near] == labels[:, None]).mean()),
    )


def load_panels(cfg: Config, checkpoint: str, args: argparse.Namespace) -> dict[str, tuple]:
    """Features and labels, clean and corrupted; fixes the classes that are shown."""
    corruption = f'{args.corruption}/{args.severity}'
    clean = cfg.evaluation.val
    datasets = {
        'clean': clean,
        corruption: corrupted(clean, args.corruption, args.severity, args.imagenet_c),
    }
    for name, dataset in datasets.items():
        check_dataset(name, dataset, 'mmpretrain')
        cfg.evaluation[name], args.classes = choose(dataset, args.classes, args.per_class)
        count = len(cfg.evaluation[name].indices)
        if count <= max(args.perplexity, NEIGHBOURS):
            raise ValueError(
                f'--perplexity {args.perplexity} needs more than {count} images; lower it or raise '
                '--per-class.'
            )
    panels = {}
    for name in datasets:
        features, labels = load_features(cfg, checkpoint, name, **feature_options(args))
        # Labels count the classes of the data set; from here on, those that are shown.
        panels[name] = F.normalize(features).numpy(), np.unique(labels, return_inverse=True)[1]
    return panels


def main() -> None:
    """Extract, embed, measure, draw."""
    args = parse_args()
    panels = {}
    for name, (config, checkpoint) in zip(args.names, args.runs, strict=True):
        args.config = config
        panels[name] = load_panels(load_config(args, ['val']), checkpoint, args)
    if not is_main_process():
        return

    results, drawn, rows = {}, {}, []
    for name, own in panels.items():
        results[name] = {}
        for data, (features, labels) in own.items():
            print(f't-SNE of {name}, {data}: {len(labels)} images', flush=True)
            places = TSNE(perplexity=args.perplexity, init='pca', random_state=args.seed)
            places = places.fit_transform(features)
            result = dict(map=measure(places, labels), features=measure(features, labels))
            results[name][data] = result
            title = f'{name}, {data}\n' + ', '.join(
                f'{key} {result["map"][key]:.3f}' for key in MEASURES
            )
            drawn.setdefault(data, []).append((title, places, labels))
            rows.append([f'{name}, {data}'])
            rows[-1] += [result[space][key] for space in ('map', 'features') for key in MEASURES]

    args.out.mkdir(parents=True, exist_ok=True)
    draw_tsne(list(drawn.values()), args.classes, args.out / 'tsne.png')
    header = ['', *(f'{key}, {space}' for space in ('map', 'features') for key in MEASURES)]
    made = f'from {args.imagenet_c}' if args.imagenet_c else 'made on the fly'
    note = (
        f'- {len(args.classes)} classes, at most {args.per_class} images each; {args.corruption} '
        f'{made}.\n- agreement: share of the {NEIGHBOURS} nearest neighbours of the same class. '
        'Features are normalized.'
    )
    settings = dict(runs=args.runs, blocks=args.blocks, classes=args.classes)
    text = f'{make_table(header, rows)}\n\n{note}'
    write_results(args.out, 'tsne', {**settings, 'results': results}, text)


if __name__ == '__main__':
    run(main)
