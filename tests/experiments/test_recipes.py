"""The config that is made for a folder of images."""

import os
import re
import shutil
import tarfile

import pytest
import timm
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS
from safetensors.torch import save_file

from ser_mm.engine.options import read_fields, resolve_options
from ser_mm.evaluation.backbone import build_model
from ser_mm.evaluation.conversion import to_timm
from ser_mm.evaluation.data import build_preprocessor
from ser_mm.experiments.recipes import (
    BACKBONES,
    METHODS,
    choose_batch_size,
    list_images,
    pretraining_config,
)
from ser_mm.experiments.runs import check_settings
from tests.support.foreign import FOREIGN


def config(images, tmp_path, **options):
    options = {'model': 'vit_tiny_patch16', 'method': 'mocov3', 'image_size': 64, **options}
    return pretraining_config(images, tmp_path / 'out', **options)


def test_a_config_fits_images_and_machine(images, tmp_path):
    cfg = config(images, tmp_path, batch_size=8, epochs=20)
    assert cfg.train_dataloader.batch_size == 8
    assert cfg.train_dataloader.dataset.pipeline[1].equi_ratio == 2 / 8
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(2.4e-3 * 8 / 2048)
    assert [x.end for x in cfg.param_scheduler] == [10, 20]  # the warm-up keeps its length
    views = cfg.train_dataloader.dataset.pipeline[1].transforms
    assert [view[0].scale for view in views] == [64, 64]
    assert [x.get('scale', x.get('crop_size')) for x in cfg.evaluation.val.pipeline[1:3]] == [
        73,
        64,
    ]
    assert not cfg.evaluation.val.with_label
    assert config(images, tmp_path, batch_size=16, epochs=5).param_scheduler[-1].end == 5
    large = choose_batch_size(10**6)
    assert large >= 64 and choose_batch_size(40) == 5 and choose_batch_size(10**6, 4) == 4 * large


def test_the_learning_rate_falls_in_small_batches_too(images, tmp_path):
    """That of DINO ended at a fixed rate, above what it began with."""
    for method in METHODS:
        cfg = config(images, tmp_path, method=method, batch_size=4, epochs=20)
        assert not any(x.get('eta_min') for x in cfg.param_scheduler), method


@pytest.mark.parametrize('name', BACKBONES)
def test_every_backbone_has_its_width(images, tmp_path, name):
    algorithm = config(images, tmp_path, model=name).model.algorithm
    built = MODELS.build(algorithm.backbone)
    width = built.feat_dim if name.startswith('resnet') else built.embed_dims
    assert algorithm.neck.in_channels == width


@pytest.mark.parametrize('name', ['vit_tiny_patch16', 'timm/vit_tiny_patch16_224'])
def test_weights_of_timm_are_gone_on_from(images, tmp_path, name):
    """They have [CLS] from the input."""
    theirs = timm.create_model('vit_tiny_patch16_224', img_size=64, num_classes=0)
    save_file(theirs.state_dict(), tmp_path / 'timm.safetensors')
    cfg = config(images, tmp_path, model=name, weights=tmp_path / 'timm.safetensors')
    backbone = MODELS.build(cfg.model.algorithm.backbone)
    backbone.init_weights()
    assert (backbone.ser_layer, backbone.cls_layer) == (3, 0)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours, expected = backbone.eval()(pixels)[-1], theirs.eval()(pixels)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def saved_by_timm(folder, **arguments):
    """A ViT of no name in timm, and its folder."""
    arguments = dict(dict(patch_size=8, embed_dim=48, depth=4, num_heads=3), **arguments)
    torch.manual_seed(1)
    network = timm.create_model('vit_tiny_patch16_224', img_size=64, num_classes=0, **arguments)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    timm.models.save_for_hf(network, folder, model_args=dict(img_size=64, **arguments))
    return network


@pytest.mark.parametrize('layout', ['timm', 'MoCo v3', 'DINO', 'DINOv2'])
def test_weights_of_any_layout_and_a_network_that_timm_saved(images, tmp_path, monkeypatch, layout):
    more = dict(init_values=1e-5) if layout == 'DINOv2' else {}
    theirs = saved_by_timm(tmp_path / 'network v1.0', **more)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.eval()(pixels)
    torch.save(FOREIGN[layout](theirs), tmp_path / 'weights.pth')
    monkeypatch.chdir(tmp_path)
    cfg = config(images, tmp_path, model='timm/local-dir:network v1.0', weights='weights.pth')
    monkeypatch.chdir('/')  # where the run goes on does not matter
    backbone = MODELS.build(cfg.model.algorithm.backbone)
    backbone.init_weights()
    with torch.no_grad():
        torch.testing.assert_close(backbone.eval()(pixels)[-1], expected, rtol=0, atol=1e-4)
        exported, *_ = to_timm(backbone)  # as the run does at its end
        torch.testing.assert_close(exported.eval()(pixels), expected, rtol=0, atol=1e-4)


def test_weights_of_timm_get_the_pixels_that_they_know(images, tmp_path):
    network = saved_by_timm(tmp_path / 'network')  # mean and std are 0.5
    torch.save(network.state_dict(), tmp_path / 'weights.pth')
    options = dict(model=f'timm/local-dir:{tmp_path}/network')
    untrained = config(images, tmp_path, **options)
    trained = config(images, tmp_path, weights=tmp_path / 'weights.pth', **options)
    means = [build_preprocessor(cfg).mean.flatten().tolist() for cfg in (untrained, trained)]
    assert means == [pytest.approx([123.675, 116.28, 103.53]), [127.5] * 3]
    in_training = build_model(trained).data_preprocessor
    assert all(set(x.flatten().tolist()) == {127.5} for x in (in_training.mean, in_training.std))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(model='vit_tiny'), '--model vit_tiny: choose vit_tiny_patch16'),
        (dict(model='timm/vit_tiny'), 'is not in timm'),
        (dict(model='timm/convnext_tiny'), '--model timm/convnext_tiny has no recipe'),
        (dict(method='simclr'), '--method simclr: choose one of mocov3'),
        (dict(model='resnet50', method='dino'), '--method dino has no recipe for --model resnet50'),
        (dict(image_size=60), '--image-size 60: a token .* 16 pixels; choose a multiple of 16'),
        (dict(batch_size=41), 'has 40 images .* fewer than a batch of 41; .* --batch-size to 40'),
        (dict(batch_size=2), '--batch-size 2: .* four or more; choose 4'),
        (dict(batch_size=10, devices=4), '--batch-size 10: each of 4 devices .* choose 16'),
        (dict(weights='no.pth'), '--weights no.pth is not a file'),
        (dict(epochs=0), '--epochs 0, --seed 0: epochs are 1 or more'),
        (dict(model='timm/resnetv2_50'), '--model timm/resnetv2_50: SERTimmStages'),
    ],
)
def test_what_does_not_do_is_one_sentence(images, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        config(images, tmp_path, **options)
    assert not (tmp_path / 'out').exists()


def test_a_run_goes_on_when_images_are_removed(images, tmp_path):
    """What was derived from their number stays."""
    first = config(images, tmp_path)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'run.py').write_text(first.pretty_text)
    fewer = tmp_path / 'fewer'
    shutil.copytree(images, fewer)
    for file in list(fewer.iterdir())[:15]:
        file.unlink()
    again = config(fewer, tmp_path)
    assert choose_batch_size(25) != choose_batch_size(40) == again.train_dataloader.batch_size
    for cfg in (first, again):
        cfg.train_dataloader.dataset.pop('data_root')
        cfg.pop('evaluation'), cfg.pop('test_dataloader'), cfg.pop('images')
    assert again.to_dict() == first.to_dict()


def test_images_named_from_another_folder_are_the_same(images, tmp_path, monkeypatch, capsys):
    """A relative path was kept as it was written: the run was refused as another one's."""
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'run.py').write_text(config(images, tmp_path).pretty_text)
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    check_settings(config(os.path.relpath(images), tmp_path))
    assert 'has other images' not in capsys.readouterr().out


def test_the_file_of_a_run_has_what_is_read_alone(images, tmp_path):
    """A variable beside its copies, edited or set by an option, changed nothing."""
    (tmp_path / 'out').mkdir()
    file = tmp_path / 'out' / 'run.py'
    file.write_text(config(images, tmp_path).pretty_text)
    cfg = Config.fromfile(file)
    assert cfg.keys() - read_fields(cfg) == {'custom_imports', 'images'}
    with pytest.raises(ValueError, match='no field max_epochs; did you mean train_cfg.max_epochs'):
        resolve_options(cfg, {'max_epochs': '3'})
    file.write_text('max_epochs = 100\n' + file.read_text())  # as earlier versions wrote it
    check_settings(config(images, tmp_path))


def test_other_images_in_the_folder_of_a_run_are_told(images, tmp_path, capsys):
    """The network of the images before was exported for that of these, in silence."""
    data, run = tmp_path / 'data', tmp_path / 'out' / 'run.py'
    shutil.copytree(images, data)
    run.parent.mkdir()

    def again(begin=False):
        cfg = config(data, tmp_path)
        check_settings(cfg)
        run.write_text(cfg.pretty_text)
        if begin:
            (run.parent / 'run').mkdir(exist_ok=True)
            (run.parent / 'run' / 'epoch_1.pth').write_text('')
        return capsys.readouterr().out

    assert not again()
    (data / 'more.jpg').write_bytes((images / '1.jpg').read_bytes())
    assert not again(begin=True)  # nothing was trained before
    for file in images.iterdir():  # copied again
        shutil.copyfile(file, data / file.name)
    assert not again()
    (data / 'more.jpg').unlink()
    for _ in range(2):
        told = again()
        where = f'{data} has other images than when the run in {tmp_path / "out"} began'
        assert f'{where} (41 to train on then, 40 now);' in told and 'another --out' in told
    (data / 'more.jpg').write_bytes((images / '1.jpg').read_bytes())
    assert not again()
    shutil.copy(images / '1.jpg', data / '0.jpg')  # the same name, another size
    assert '(41 to train on then, 41 now)' in again()
    run.write_text(run.read_text().replace('images = dict', 'unknown = dict'))
    run.write_text(re.sub(r'(?s)unknown = dict\(.*?\)\n', '', run.read_text()))
    assert not again()  # of an earlier version


def test_other_images_to_validate_are_told(images, tmp_path, capsys):
    for split, names in dict(train=range(20), val=range(20, 24)).items():
        (tmp_path / 'data' / split).mkdir(parents=True)
        for name in names:
            shutil.copy(images / f'{name}.jpg', tmp_path / 'data' / split)
    cfg = config(tmp_path / 'data', tmp_path)
    (tmp_path / 'out' / 'run').mkdir(parents=True)
    (tmp_path / 'out' / 'run' / 'epoch_1.pth').write_text('')
    (tmp_path / 'out' / 'run.py').write_text(cfg.pretty_text)
    (tmp_path / 'data' / 'val' / '20.jpg').unlink()
    config(tmp_path / 'data', tmp_path)
    assert '(20 to train on then, 20 now)' in capsys.readouterr().out


def test_folders_of_one_image_each_are_no_classes(images, tmp_path):
    """The report failed after the training, whenever it was repeated."""
    data = tmp_path / 'data'
    for number in range(8):
        (data / f'scene{number}').mkdir(parents=True)
        shutil.copy(images / f'{number}.jpg', data / f'scene{number}' / 'rgb.jpg')
    cfg = config(data, tmp_path)
    assert not cfg.evaluation.val.with_label and not cfg.evaluation.train.with_label
    assert len(list_images(cfg.evaluation.val)) == 1
    shutil.copy(images / '9.jpg', data / 'scene0' / 'second.jpg')
    assert config(data, tmp_path).evaluation.val.with_label
    with tarfile.open(tmp_path / 'cut.tar', 'w') as whole:
        whole.add(images, 'a')
    for split in ('train', 'val'):
        shutil.copytree(data, tmp_path / 'divided' / split / 'a')
    (tmp_path / 'divided' / 'val' / 'b').mkdir()
    cut = (tmp_path / 'cut.tar').read_bytes()[:5000]
    shutil.rmtree(tmp_path / 'divided' / 'val' / 'a')
    (tmp_path / 'divided' / 'val' / 'b' / 'cut.tar').write_bytes(cut)
    with pytest.raises(ValueError, match='cut.tar is no whole tar archive'):
        config(tmp_path / 'divided', tmp_path)


def test_other_folders_to_validate_are_no_classes(images, tmp_path, capsys):
    """Accuracies were reported of classes that have nothing in common but their numbers."""
    for split, names in dict(train='ab', val='yz', again='ab', fewer='a').items():
        for number, name in enumerate(names):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(6):
                shutil.copy(images / f'{6 * number + i}.jpg', tmp_path / split / name)
    for split, labels in dict(val=False, again=True, fewer=True).items():
        cfg = config(tmp_path / 'train', tmp_path, val_data=tmp_path / split)
        assert cfg.evaluation.val.with_label is labels
        told = 'Sub-folders of the images to train on and to validate differ (a and 3 more'
        assert (told in capsys.readouterr().out) is not labels


def test_images_that_would_hold_the_pictures_are_refused(images, tmp_path):
    for data, out in ((tmp_path, tmp_path / 'out'), (images, images)):
        with pytest.raises(ValueError, match='is in --data .*; choose a folder elsewhere'):
            pretraining_config(data, out, model='vit_tiny_patch16', method='mocov3')


def test_weights_that_do_not_fit_are_refused_before_the_run(images, tmp_path):
    torch.save(dict(state_dict=torch.nn.Linear(2, 2).state_dict()), tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='other.pth do not fit --model vit_tiny_patch16: choose'):
        config(images, tmp_path, weights=tmp_path / 'other.pth')


def test_one_folder_of_images_is_no_class(images, tmp_path):
    shutil.copytree(images, tmp_path / 'data' / '2024')
    assert not config(tmp_path / 'data', tmp_path).evaluation.val.with_label


def test_networks_of_timm_have_the_recipe(images, tmp_path):
    backbones = [
        config(images, tmp_path, model=name, method=method).model.algorithm.backbone
        for name in ('vit_tiny_patch16', 'timm/vit_tiny_patch16_224')
        for method in ('mocov3', 'dino')
    ]
    ours, theirs = backbones[:2], backbones[2:]
    assert [x.get('stop_grad_conv1', False) for x in ours] == [x.stop_grad_conv1 for x in theirs]
    rates = [x.model_args.drop_path_rate for x in theirs]
    assert [x.get('drop_path_rate', 0.0) for x in ours] == rates == [0.0, 0.1]


def test_a_network_without_a_block_for_ser_is_refused(images, tmp_path):
    """It was called weights that do not fit, which no other weights would mend."""
    saved_by_timm(tmp_path / 'network', depth=3)
    with pytest.raises(ValueError, match='network has 3 blocks, and SER is on the third; choose'):
        config(images, tmp_path, model=f'timm/local-dir:{tmp_path / "network"}')
