"""t-SNE of chosen classes: a figure, and numbers that say what it shows."""

import json

import numpy as np
from PIL import Image

from tests.support.command import run_command
from tests.support.probed import config, write_checkpoint


def test_two_checkpoints_side_by_side(imagenet_tree, tmp_path):
    runs = []
    for seed in range(2):
        checkpoint = write_checkpoint(tmp_path / f'{seed}.pth', seed)
        runs += [tmp_path / 'config.py', checkpoint]
    cfg = config(imagenet_tree, indices=[15, *range(15)])  # the subset is one of this subset
    cfg.default_scope = 'mmpretrain'
    cfg.dump(tmp_path / 'config.py')
    places = ('--cache-dir', tmp_path / 'cache', '--out', tmp_path / 'out')
    names = ('--names', 'a', 'b', '--perplexity', 3, '--corruption', 'contrast', '--severity', 5)
    chosen = ('--classes', 'n00000003', 'n00000000', 'n00000001')
    assert run_command('tsne', *runs, *names, *chosen, *places) is None
    results = json.loads((tmp_path / 'out' / 'tsne.json').read_text())
    assert results['classes'] == sorted(chosen[1:])
    assert results['perplexity'] == 3 and results['seed'] == 0 and results['severity'] == 5
    assert list(results['results']) == ['a', 'b']
    clean = results['results']['a']['clean']
    assert clean != results['results']['a']['contrast/5'] != results['results']['b']['contrast/5']
    assert set(clean['map']) == set(clean['features']) == {'silhouette', 'agreement'}
    assert Image.open(tmp_path / 'out' / 'tsne.png').size[0] > 1000
    for file in (tmp_path / 'cache').iterdir():
        with np.load(file) as arrays:
            assert sorted(set(arrays['labels'].tolist())) == [0, 1, 3]

    code = run_command('tsne', *runs, *names, '--classes', 'n00000000', 'dog', *places)
    assert code == (
        'error: classes dog: choose two or more that have images, of n00000000, n00000001, '
        'n00000002, n00000003.'
    )
    code = run_command('tsne', *runs, *names[:3], *chosen, *places)
    assert code.startswith('error: perplexity 30 needs more than 12 images')
