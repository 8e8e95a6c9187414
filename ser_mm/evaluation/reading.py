"""Reading images for an evaluation: those that cannot be read are named, the others are used."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset, get_worker_info


class Unreadable(NamedTuple):
    """An image that could not be read."""

    reason: str
    """Its path, and what went wrong."""
    error: Exception | None
    """None if it was read by another process."""


class ReadBatch(NamedTuple):
    """A batch of those images that could be read."""

    indices: list[int]
    """Places of its images in the data set."""
    content: dict | None
    """The collated images. None if there is none."""
    unreadable: list[Unreadable]
    """Images that it lacks."""


class _Items(Dataset):
    """Items with their places; in place of one that cannot be read, what is known of it."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, Any]:
        index = int(self.indices[place])
        try:
            return index, self.dataset[index]
        except MemoryError:
            raise
        except Exception as error:  # of many types, by format and decoder
            told = (str(error).splitlines() or [''])[0]
            path = self.dataset.get_data_info(index).get('img_path', f'image {index}')
            reason = f'{path} ({type(error).__name__}: {told})'
            return index, Unreadable(reason, None if get_worker_info() else error)


class _Collate:
    def __init__(self, collate: Callable) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[tuple[int, Any]]) -> ReadBatch:
        read = [(index, item) for index, item in items if not isinstance(item, Unreadable)]
        return ReadBatch(
            [index for index, _ in read],
            self.collate([item for _, item in read]) if read else None,
            [item for _, item in items if isinstance(item, Unreadable)],
        )


def read_batches(
    loader: DataLoader, indices: Sequence[int], batch_size: int
) -> Iterator[ReadBatch]:
    """Batches of some images of a data set, without those that cannot be read.

    Args:
        loader (DataLoader): What :func:`~ser_mm.evaluation.build_loader` made; its data set, its
            processes and how it collates are taken.
        indices (Sequence[int]): Places in its data set.
        batch_size (int): Images per batch, at most.

    Yields:
        ReadBatch: One for every ``batch_size`` of the indices.
    """
    yield from DataLoader(
        _Items(loader.dataset, indices),
        batch_size,
        num_workers=loader.num_workers,
        collate_fn=_Collate(loader.collate_fn),
    )


def refuse(split: str, unreadable: Sequence[Unreadable], total: int, kept: str = '') -> None:
    """Raise an error that names images that cannot be read; do nothing if there are none.

    Args:
        split (str): Key of ``evaluation``.
        unreadable (Sequence[Unreadable]): The images.
        total (int): Images that were asked for.
        kept (str): What else is to be said. Defaults to ''.

    Raises:
        ValueError: If there is one.
    """
    if unreadable:
        named = ', '.join(x.reason for x in unreadable[:5])
        more = f' and {len(unreadable) - 5} more' if len(unreadable) > 5 else ''
        raise ValueError(
            f'evaluation.{split}: {len(unreadable)} of {total} images cannot be read: {named}'
            f'{more}; replace or remove them.{kept}'
        ) from unreadable[0].error
