from collections.abc import Sequence
from typing import Any

from mmengine.dataset import default_collate as collate
from mmengine.registry import FUNCTIONS
from torch import Tensor


@FUNCTIONS.register_module(force=True)
def default_collate(data_batch: Sequence, _scope_: str | None = None) -> Any:
    """MMEngine's ``default_collate``, which it replaces in the registry, without its stumbling.

    A config that inherits from another package gets ``_scope_`` into each of its dicts, also into
    ``collate_fn``, and MMEngine hands it to the function as an argument.

    Args:
        data_batch (Sequence): Samples.
        _scope_ (str, optional): Ignored. Defaults to None.

    Returns:
        Any: A batch, of the structure of a sample.

    Raises:
        ValueError: If images of the batch differ in size.
    """
    try:
        return collate(data_batch)
    except RuntimeError as error:
        # What torch says of it depends on whether it stacks in a worker process.
        for view in zip(*(_images(sample) for sample in data_batch), strict=False):
            sizes = sorted({' x '.join(map(str, image.shape[-2:])) for image in view})
            if len(sizes) > 1:
                raise ValueError(
                    f'default_collate: images of a batch differ in size ({sizes[0]}, {sizes[1]}); '
                    'end the pipeline of each view with a crop or a resize to one size.'
                ) from error
        raise


def _images(sample: Any) -> list[Tensor]:
    """The images of a sample."""
    inputs = sample.get('inputs') if isinstance(sample, dict) else None
    inputs = inputs if isinstance(inputs, (list, tuple)) else [inputs]
    return [x for x in inputs if isinstance(x, Tensor) and x.ndim == 3]
