"""What a config needs before it can run: its devices, its processes and its data."""

import gc
import inspect
import os
import subprocess
from collections.abc import Iterator, Sequence
from datetime import timedelta
from os.path import abspath, exists, isdir, join

import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from mmpretrain.datasets import CustomDataset

from ser_mm.datasets import BundledPhotos

DATALOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')

# Where each launcher leaves what torch.distributed reads from RANK, WORLD_SIZE and LOCAL_RANK.
_TORCH_VARIABLES = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')
_LAUNCHER_VARIABLES = dict(
    pytorch=_TORCH_VARIABLES,
    slurm=('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    mpi=('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
)


def get_local_rank(launcher: str) -> int:
    """Rank of this process on its machine, known before there is a process group.

    Args:
        launcher (str): 'none', 'pytorch', 'slurm' or 'mpi'.
    """
    if launcher == 'none':
        return 0
    return int(os.environ.get(_LAUNCHER_VARIABLES[launcher][2], 0))


def init_cpu_process_group(launcher: str, timeout: float | None = None) -> bool:
    """Make the gloo process group of a distributed run on machines without an accelerator.

    MMEngine's launchers select a CUDA device first and so cannot start on the CPU, whatever the
    backend. The Runner leaves a process group alone that is there already, so call this before
    building it. Does nothing with an accelerator, without a launcher, or when a group exists.

    Args:
        launcher (str): 'none', 'pytorch', 'slurm' or 'mpi'.
        timeout (float, optional): Seconds until a collective operation fails. Defaults to None,
            torch's own.

    Returns:
        bool: Whether a group was made.
    """
    if launcher == 'none' or get_device() != 'cpu' or dist.is_initialized():
        return False
    for name, source in zip(_TORCH_VARIABLES, _LAUNCHER_VARIABLES[launcher], strict=True):
        os.environ[name] = os.environ[source]
    if launcher == 'slurm' and 'MASTER_ADDR' not in os.environ:
        show_hosts = ['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']]
        os.environ['MASTER_ADDR'] = subprocess.check_output(show_hosts, text=True).split()[0]
    os.environ.setdefault('MASTER_PORT', '29500')
    dist.init_process_group('gloo', timeout=timedelta(seconds=timeout) if timeout else None)
    return True


def close_process_group() -> None:
    """Leave the process group, if there is one; the last thing that a distributed run does.

    To be called when the Runner is out of scope. Gloo's worker threads end with their group,
    which DDP keeps alive; one that is still letting go of a tensor when Python shuts down aborts
    a process that had finished its work (seen in 9 of 20 runs, and in none of 14 with this).
    """
    if dist.is_initialized():
        gc.collect()  # the Runner and DDP are in reference cycles
        dist.destroy_process_group()


def adapt_to_device(cfg: Config) -> None:
    """Let a config written for GPUs run on the CPU; with an accelerator, leave it alone.

    Mixed precision, synchronised BatchNorm and pinned memory do not exist on the CPU. Every
    change is logged. Without synchronised BatchNorm each process takes the statistics of its own
    share of the batch, which makes no difference to a run of one process.

    Args:
        cfg (Config): Config of the run, changed in place.
    """
    if get_device() != 'cpu':
        return

    optim_wrapper = cfg.get('optim_wrapper') or {}
    if _type_name(optim_wrapper) == 'AmpOptimWrapper':
        optim_wrapper['type'] = 'OptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            optim_wrapper.pop(key, None)
        _log_change('optim_wrapper.type: AmpOptimWrapper -> OptimWrapper (float32)')

    if cfg.get('sync_bn'):
        _log_change(f'sync_bn: {cfg.sync_bn} -> None (BatchNorm per process)')
        cfg.sync_bn = None

    pinned = [name for name in DATALOADERS if (cfg.get(name) or {}).get('pin_memory')]
    for name in pinned:
        cfg[name].pin_memory = False
    if pinned:
        _log_change(f'pin_memory: True -> False ({", ".join(pinned)})')

    if cfg.get('launcher', 'none') != 'none':
        _adapt_distributed(cfg)


def _adapt_distributed(cfg: Config) -> None:
    """Replace NCCL by gloo, and leave out the device numbers DDP refuses for a CPU model."""
    backend = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('backend')
    if backend != 'gloo':
        cfg.merge_from_dict({'env_cfg.dist_cfg.backend': 'gloo'})
        _log_change(f'env_cfg.dist_cfg.backend: {backend} -> gloo')
    if cfg.get('model_wrapper_cfg') is None:
        # What the Runner uses when none is configured, but for the device numbers.
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
    if cfg.model_wrapper_cfg.get('device_ids', ()) is not None:
        cfg.model_wrapper_cfg.device_ids = None
        _log_change('model_wrapper_cfg.device_ids: local rank -> None')


def _type_name(cfg: dict) -> str:
    """Bare name of the class that a config names by string (scoped or not) or gives itself."""
    kind = cfg.get('type', '')
    return kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__


def _log_change(change: str) -> None:
    print_log(f'No GPU here, changed {change}', logger='current')


def check_data(cfg: Config, dataloaders: Sequence[str] = DATALOADERS[:2]) -> None:
    """Fail early, and in one sentence, when the data a config names is missing or has no images.

    Otherwise the same mistake ends in a traceback from inside the data set, after the model was
    built. Only local paths are looked at, and no more files than it takes to find one image.
    Wrapped and concatenated data sets are followed.

    Args:
        cfg (Config): Config of the run.
        dataloaders (Sequence[str]): Names of the data loaders to look at. Defaults to those
            that training uses.

    Raises:
        FileNotFoundError: Naming the field, its value and the remedy.
    """
    for name in dataloaders:
        for field, dataset in walk_datasets(name, cfg.get(name) or {}):
            check_dataset(field, dataset, cfg.get('default_scope'))


def walk_datasets(field: str, cfg: dict) -> Iterator[tuple[str, dict]]:
    """Yield every data set config inside `cfg`, with its place in the config."""
    inner = {'dataset': cfg.get('dataset')}
    inner |= {f'datasets.{i}': dataset for i, dataset in enumerate(cfg.get('datasets') or ())}
    for name, dataset in inner.items():
        if isinstance(dataset, dict):
            yield f'{field}.{name}', dataset
            yield from walk_datasets(f'{field}.{name}', dataset)


def check_dataset(field: str, dataset: dict, scope: str | None = None) -> None:
    """Check the paths of one data set, as far as its class gives them the usual meaning.

    Args:
        field (str): Its place in the config.
        dataset (dict): Its config.
        scope (str, optional): Default scope of the config. Defaults to None.

    Raises:
        FileNotFoundError: Naming the field, its value and the remedy.
    """
    with DATASETS.switch_scope_and_registry(scope) as registry:
        kind = dataset.get('type')
        kind = registry.get(kind) if isinstance(kind, str) else kind
    if kind is None:
        return
    root = dataset.get('data_root') or ''
    # Some data sets make their folder, or download themselves; others live in a remote store.
    if issubclass(kind, BundledPhotos) or 'download' in inspect.signature(kind).parameters:
        return
    if '://' in root or dataset.get('backend_args'):
        return

    def fail(key: str, path: str, problem: str, remedy: str = '') -> None:
        remedy = remedy or f'set it in the config or with --cfg-options {field}.{key}=PATH'
        value = f'{field}.{key} = {dataset.get(key)!r}'
        raise FileNotFoundError(f'{value}: {abspath(path)} {problem}; {remedy}.')

    if root and not exists(root):
        fail('data_root', root, 'does not exist')
    ann_file = dataset.get('ann_file')
    if ann_file and isinstance(ann_file, str):
        if not exists(join(root, ann_file)):
            fail('ann_file', join(root, ann_file), 'does not exist')
        return
    if not issubclass(kind, CustomDataset):
        return

    # A folder of images: `data_root`, or what `data_prefix` or else `split` names in it.
    split = dataset.get('split') or ''
    if split and exists(join(root, 'meta', f'{split}.txt')):
        return
    prefix = dataset.get('data_prefix') or split
    folder = join(root, prefix.get('img_path', '') if isinstance(prefix, dict) else prefix)
    key = 'data_root' if root else 'data_prefix'
    if not isdir(folder):
        fail(key, folder, 'is not a folder')
    suffixes = tuple(suffix.lower() for suffix in dataset.get('extensions') or IMAGE_SUFFIXES)
    in_classes = dataset.get('with_label', split != 'test')
    if not _has_image(folder, suffixes, in_classes):
        if in_classes and _has_image(folder, suffixes, False):
            remedy = f'make one for each class, or set {field}.with_label=False to do without'
            fail(key, folder, 'has images, but no sub-folders of images', remedy)
        fail(key, folder, f'has no images ({", ".join(suffixes)})')


def _has_image(folder: str, suffixes: tuple[str, ...], in_subfolders: bool) -> bool:
    """Whether an image is below a folder, not counting those directly in it if so asked."""
    for place, _, names in os.walk(folder, followlinks=True):
        if in_subfolders and place == folder:
            continue
        if any(n.lower().endswith(suffixes) and not n.startswith('.') for n in names):
            return True
    return False
