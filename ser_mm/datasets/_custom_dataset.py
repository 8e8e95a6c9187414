"""What the parameters of MMPretrain's ``CustomDataset`` accept."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from ser_mm.arguments import ModuleCfg, Name, Natural, Positive, Rule, filled

_found = Rule('that names a file', lambda x: '://' in x or Path(x).expanduser().is_file())

CUSTOM_DATASET: dict[str, Any] = dict(
    pipeline=Sequence[ModuleCfg | Callable],
    extensions=Annotated[Sequence[Name], filled],
    indices=Positive | Annotated[Sequence[Natural], filled] | None,
    max_refetch=Natural,
    classes=Annotated[str, filled, _found] | Annotated[Sequence[Name], filled] | None,
)
"""For :func:`~ser_mm.arguments.checked`, where MMPretrain's annotations are wider or missing."""
