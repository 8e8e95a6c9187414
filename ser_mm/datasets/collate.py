from collections.abc import Sequence
from typing import Any

from mmengine.dataset import default_collate as collate
from mmengine.registry import FUNCTIONS


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
    """
    return collate(data_batch)
