"""ser-mm boxes."""

from ser_mm.cli.boxes import main
from tests.support.command import run_command
from tests.support.tiny_imagenet import write_tiny_imagenet


def test_files_and_what_is_said_of_them(tmp_path, capsys):
    root, out = write_tiny_imagenet(tmp_path / 'tiny'), tmp_path / 'boxes'
    line = root / 'val' / 'val_annotations.txt'
    line.write_text(f'{line.read_text()}none.JPEG\tn00000010\t3\t4\t3\t9\n')
    main([str(root), str(out), '--train', '2', '--all-classes'])
    assert capsys.readouterr().out.splitlines() == [
        f'{out}/train.json: 6 images, and 0 left out whose box has no area.',
        f'{out}/val.json: 3 images, and 1 left out whose box has no area.',
    ]
    assert (out / 'classes.txt').read_text().split() == ['n00000010', 'n00000020', 'n00000030']


def test_a_folder_that_is_not_the_data_set_is_one_sentence(tmp_path):
    sentence = run_command('boxes', tmp_path, tmp_path / 'boxes')
    assert sentence.startswith('error: TinyImageNet: data_root=') and 'unpack' in sentence
