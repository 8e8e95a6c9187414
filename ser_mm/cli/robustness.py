"""ImageNet-C and ImageNet-P of a frozen backbone, under the linear head that the probe fits.

Folders as published: CORRUPTION/SEVERITY/CLASS/*.JPEG and PERTURBATION/CLASS/*.mp4. Without
ImageNet-C, the validation images are corrupted on the fly. What was measured is kept: the same
command goes on where it was interrupted.
"""

import argparse
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process
from torch import nn

from ser_mm.cli._arguments import (
    add_arguments,
    add_probe_arguments,
    check_classes,
    feature_options,
    fit_head,
    load_config,
    make_table,
    run,
    write_results,
)
from ser_mm.engine.cpu import check_dataset
from ser_mm.evaluation import load_features
from ser_mm.evaluation.robustness import (
    CORRUPTIONS,
    PERTURBATIONS,
    SEVERITIES,
    Corrupt,
    corrupted,
    corruption_errors,
    flip_probability,
    flip_rates,
    perturbed,
)

FRAMES = 31  # of most sequences of ImageNet-P


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of the model, with `evaluation`')
    parser.add_argument('checkpoint', help='its checkpoint, or one of the backbone')
    for name in ('c', 'p'):
        parser.add_argument(
            f'--imagenet-{name}',
            type=Path,
            help=f'folder of ImageNet-{name.upper()} (default: data/imagenet-{name}, if there)',
        )
    parser.add_argument(
        '--corruptions', nargs='+', choices=CORRUPTIONS, default=CORRUPTIONS, metavar='NAME'
    )
    add_probe_arguments(parser)
    add_arguments(parser, 'work_dirs/robustness')
    args = parser.parse_args()
    for name in ('imagenet_c', 'imagenet_p'):
        root, default = getattr(args, name), Path('data', name.replace('_', '-'))
        if root is None and default.is_dir():
            setattr(args, name, default)
        elif root is not None and not root.is_dir():
            parser.error(f'--{name.replace("_", "-")} {root} is not a folder.')
    return args


def classify(cfg: Config, args: argparse.Namespace, head: nn.Linear, split: str) -> tuple:
    """Classes that the head gives the images of a split, and their labels."""
    options = feature_options(args)
    if cfg.evaluation[split].type == 'SequenceFolder':
        options['batch_size'] = max(1, args.batch_size // FRAMES)
    return load_features(cfg, args.checkpoint, split, head=head, **options)


def add_datasets(
    cfg: Config, datasets: dict[str, dict], root: Path | None
) -> tuple[list[str], list[str]]:
    """Add data sets to ``cfg.evaluation``, checked before the long work.

    Args:
        cfg (Config): With the clean images as ``evaluation.val``.
        datasets (dict[str, dict]): Configs by name, which is their folder in ``root``.
        root (Path, optional): None for images that are made on the fly.

    Returns:
        tuple: Names of those added, and of those whose folder is missing.

    Raises:
        FileNotFoundError: If a folder has no images.
        ValueError: If a folder has other classes.
    """
    missing = [name for name in datasets if root and not (root / name).is_dir()]
    names = [name for name in datasets if name not in missing]
    for name in names:
        if root and is_main_process():
            check_dataset(name, datasets[name], 'mmpretrain')
            check_classes({'evaluation.val': cfg.evaluation.val, name: datasets[name]})
        cfg.evaluation[name] = datasets[name]
    return names, missing


def measure_corruptions(
    cfg: Config, args: argparse.Namespace, head: nn.Linear, names: list[str], images: int
) -> dict:
    """Errors by corruption and severity, and what is incomplete of the folders."""
    errors, incomplete = {}, []
    for name in names:
        classes, labels = classify(cfg, args, head, name)
        error = float((classes != labels).double().mean())
        if len(labels) < images:
            incomplete.append(f'{name} ({len(labels)} of {images} images)')
        else:
            errors.setdefault(name.partition('/')[0], []).append(error)
        if is_main_process():
            print(f'{name}: top-1 {1 - error:.4f}', flush=True)
    whole = {name: values for name, values in errors.items() if len(values) == len(SEVERITIES)}
    return dict(errors=whole, missing=incomplete)


def measure_perturbations(
    cfg: Config, args: argparse.Namespace, head: nn.Linear, names: list[str]
) -> dict:
    """Top-1 and flip probability by perturbation."""
    top1, flips = {}, {}
    for name in names:
        classes, labels = classify(cfg, args, head, name)
        top1[name] = float((classes == labels[:, None]).double().mean())
        flips[name] = flip_probability(classes, noise='noise' in name)
        if is_main_process():
            print(f'{name}: top-1 {top1[name]:.4f}, flips {flips[name]:.4f}', flush=True)
    return dict(top1=top1, flips=flips)


def report_corruptions(args: argparse.Namespace, result: dict) -> str:
    """Table of ImageNet-C; adds the metrics to the result."""
    errors = result['errors']
    result['CE'] = corruption_errors(errors)
    result['top1'] = {name: 1 - sum(v) / len(v) for name, v in errors.items()}
    rows = [
        [name, result['top1'][name], *(1 - value for value in values), result['CE'][name]]
        for name, values in errors.items()
    ]
    if errors:
        result['mean_top1'] = sum(result['top1'].values()) / len(errors)
        means = [sum(row[i] for row in rows) / len(rows) for i in range(2, 7)]
        rows.append(['mean', result['mean_top1'], *means, result['CE'].get('mCE', '-')])
    result['source'] = (
        f'ImageNet-C as published, from {args.imagenet_c}'
        if args.imagenet_c
        else 'validation images corrupted on the fly by imagecorruptions: not the published files'
    )
    header = ['corruption', 'top-1', *(f'severity {s}' for s in SEVERITIES), 'CE']
    notes = [f'Source: {result["source"]}.']
    left_out = [name for name in CORRUPTIONS if name not in errors]
    if left_out:
        notes.append(f'No mCE without {", ".join(left_out)}.')
    if result['missing']:
        notes.append(f'Missing or incomplete: {", ".join(result["missing"])}.')
    notes.append("CE: error relative to AlexNet's on ImageNet-C, their mean is mCE; on other data")
    notes[-1] += ' it serves for comparisons only.'
    return '\n'.join([make_table(header, rows), '', *(f'- {note}' for note in notes)])


def report_perturbations(args: argparse.Namespace, result: dict) -> str:
    """Table of ImageNet-P; adds the metrics to the result."""
    top1, flips = result['top1'], result['flips']
    result['FR'] = flip_rates(flips)
    rows = [[name, top1[name], flips[name], result['FR'][name]] for name in flips]
    if flips:
        means = [sum(values.values()) / len(values) for values in (top1, flips)]
        result |= dict(zip(('mean_top1', 'mean_flips'), means, strict=True))
        rows.append(['mean', *means, result['FR'].get('mFR', '-')])
    notes = [f'Source: ImageNet-P as published, from {args.imagenet_p}.']
    if result['missing']:
        notes.append(f'No mFR without {", ".join(result["missing"])}, which are missing.')
    notes.append("FR: flip probability relative to AlexNet's, their mean is mFR.")
    table = make_table(['perturbation', 'top-1', 'flip probability', 'FR'], rows)
    return '\n'.join([table, '', *(f'- {note}' for note in notes)])


def main() -> None:
    """Fit the head, classify everything, report."""
    args = parse_args()
    cfg = load_config(args)
    clean = cfg.evaluation.val
    corruptions = {
        f'{name}/{severity}': corrupted(clean, name, severity, args.imagenet_c)
        for name in args.corruptions
        for severity in SEVERITIES
    }
    corruptions, missing = add_datasets(cfg, corruptions, args.imagenet_c)
    if not args.imagenet_c:
        Corrupt(args.corruptions[0], SEVERITIES[0])  # is its package here?
    if args.imagenet_p:
        perturbations = {name: perturbed(clean, name, args.imagenet_p) for name in PERTURBATIONS}
        perturbations, missing_p = add_datasets(cfg, perturbations, args.imagenet_p)
    head, choice, _ = fit_head(cfg, args.checkpoint, args)
    classes, labels = classify(cfg, args, head, 'val')
    clean = float((classes == labels).double().mean())
    results = dict(
        config=args.config, checkpoint=args.checkpoint, blocks=args.blocks, head=choice, clean=clean
    )
    results['imagenet_c'] = measure_corruptions(cfg, args, head, corruptions, len(labels))
    results['imagenet_c']['missing'] += missing
    if args.imagenet_p:
        results['imagenet_p'] = measure_perturbations(cfg, args, head, perturbations)
        results['imagenet_p']['missing'] = missing_p
    if not is_main_process():
        return

    text = [
        f'{args.checkpoint}: top-1 {clean:.4f} on {len(labels)} clean images, linear head on the '
        f'last {args.blocks} block(s).',
        report_corruptions(args, results['imagenet_c']),
    ]
    if args.imagenet_p:
        text.append(report_perturbations(args, results['imagenet_p']))
    else:
        text.append('ImageNet-P: not measured, as data/imagenet-p is not there; see --imagenet-p.')
    write_results(args.out, 'robustness', results, '\n\n'.join(text))


if __name__ == '__main__':
    run(main)
