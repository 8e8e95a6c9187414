"""SER: pretrain, evaluate and compare self-supervised networks."""

import argparse
import difflib
import importlib
from collections.abc import Sequence

import ser_mm

COMMANDS = {
    'pretrain': 'pretrain a backbone on a folder of images, and show what it learned',
    'train': 'train a model, self-supervised or other, from a config',
    'test': 'evaluate a classifier or a detector on the test data of its config',
    'probe': 'linear probe and k-NN of a frozen backbone',
    'robustness': 'ImageNet-C and ImageNet-P of a frozen backbone',
    'equivariance': 'how equivariant the token map of every block is: R2 and retrieval',
    'dense': 'token maps under warps: correspondence, accuracy by angle, position by block',
    'tsne': 't-SNE of features, clean and corrupted',
    'embed': 'features of a folder of images, in one file',
    'detect': 'train detectors on your boxes, by backbone and labelled share, and compare',
    'boxes': 'write the boxes of Tiny ImageNet as annotation files for detection',
    'export': 'write a backbone for timm, torchvision, plain MMPretrain or ONNX',
    'cost': 'FLOPs, operators, parameters and time that SER adds to a training step',
    'ablate': 'sweep the settings of SER over several seeds',
    'compare': 'train arms of an experiment, measure all, and report paired differences',
    'demo': 'pretrain with and without SER at toy scale, and evaluate',
    'demo-detection': 'train a detector on the backbones of the demo',
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that comes first on the command line.

    Args:
        argv (Sequence[str], optional): Command and its arguments. Defaults to None: those of the
            process.
    """
    width = max(map(len, COMMANDS))
    lines = '\n'.join(f'  {name:{width}}  {text}' for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog='ser-mm',
        description=__doc__,
        usage='ser-mm COMMAND [arguments], ser-mm COMMAND --help',
        epilog=f'commands:\n{lines}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=f'ser_mm {ser_mm.__version__}')
    parser.add_argument('command', metavar='COMMAND', help='one of those below')
    parser.add_argument(
        'arguments', nargs=argparse.REMAINDER, metavar='...', help='arguments of the command'
    )
    args = parser.parse_args(argv)
    if args.command not in COMMANDS:
        near = difflib.get_close_matches(args.command, COMMANDS, n=1)
        remedy = f'did you mean {near[0]}?' if near else f'choose one of {", ".join(COMMANDS)}.'
        parser.exit(2, f'ser-mm: error: unknown command {args.command!r}; {remedy}\n')
    module = importlib.import_module(f'ser_mm.cli.{args.command.replace("-", "_")}')
    module.main(args.arguments)


if __name__ == '__main__':
    main()
