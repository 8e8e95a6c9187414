"""The table of what was drawn for a view: the names of its columns, and where they are.

It has a row per image and view, float32, in units that the policy sets, so that no constants of a
data set are needed:

- ``top``, ``left``, ``height``, ``width``: the crop, as shares of the image's height and width;
- ``flip``: 1 if mirrored left-right, after the crop;
- ``jitter``: 1 if the colours were jittered; ``order_0`` to ``order_3``: which of brightness (0),
  contrast (1/3), saturation (2/3) and hue (1) was changed first to last, in this order if none was;
- ``brightness``, ``contrast``, ``saturation``, ``hue``: distance from no change as a share of the
  configured range, so within [-1/2, 1/2] for a range around it; 0 if none;
- ``gray``, ``blur``: 1 if applied; ``sigma``: of the blur, as a share of the largest; 0 if none;
- ``solarize``: share of the grey values that are inverted, 1 - threshold / 256; 0 if none.
"""

COLUMNS = (
    'top',
    'left',
    'height',
    'width',
    'flip',
    'jitter',
    *(f'order_{i}' for i in range(4)),
    'brightness',
    'contrast',
    'saturation',
    'hue',
    'gray',
    'blur',
    'sigma',
    'solarize',
)
NUM_DRAWS = len(COLUMNS)


def places(*names: str) -> list[int]:
    """Where columns are in the table.

    Args:
        *names (str): Of :data:`COLUMNS`.
    """
    return [COLUMNS.index(name) for name in names]
