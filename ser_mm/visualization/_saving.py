from pathlib import Path

from matplotlib.figure import Figure

from ser_mm.files import replacing


def save_figure(figure: Figure, file: str | Path) -> None:
    """Write a figure whole or not at all, as PNG if the file has no suffix that says otherwise.

    Args:
        figure (Figure): Figure to write.
        file (str | Path): Its file; the folder is made if it is not there.
    """
    file = Path(file)
    with replacing(file if file.suffix else file.with_suffix('.png')) as part:
        figure.savefig(part, dpi=150)
