"""Counts of what a computation does, which do not depend on the machine."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Operators that only describe a tensor anew, and launch nothing.
_METADATA = set(
    'alias as_strided detach diagonal empty empty_like empty_strided expand lift_fresh new_empty '
    'new_empty_strided permute select slice split split_with_sizes squeeze t transpose unbind '
    'unfold unsqueeze view _reshape_alias _unsafe_view'.split()
)


class OperatorCounter(TorchDispatchMode):
    """Count the operators that launch work: on a GPU, kernels or groups of them.

    Attributes:
        counts (Counter[str]): Calls of each operator; views and metadata are left out.

    Example:
        >>> with OperatorCounter() as operators:
        ...     loss.backward()
        >>> operators.counts.total()
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operator, and count it."""
        name = func._schema.name.partition('::')[2]
        if name not in _METADATA:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))
