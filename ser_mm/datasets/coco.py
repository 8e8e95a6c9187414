"""Annotation files in COCO's format for detection, checked before they are trained on."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ser_mm.datasets._coco_entries import (
    MISSING,
    category_problem,
    duplicate,
    image_problem,
    is_plain,
    may_be_corners,
    object_problem,
    reason_to_skip,
)

_SHOWN = 3  # examples in a sentence
_FEW = 0.1  # fraction of annotations that may be of no use
_DECODED = 10_000  # annotations of a file whose compressed masks are decoded, in a second or so


@dataclass
class CocoSummary:
    """What an annotation file holds.

    Args:
        images (dict): By id, what the file says of an image.
        categories (dict): Names of the categories by id, in the file's order.
        objects (dict): By category id, the number of annotations to train on or to find: those of
            crowds, and those too small or outside of their image, are not counted.
        notes (list[str]): Sentences on what is accepted but may not be meant.
    """

    images: dict[Any, dict] = field(default_factory=dict)
    categories: dict[Any, str] = field(default_factory=dict)
    objects: dict[Any, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_coco(path: str | Path) -> dict:
    """Read an annotation file.

    Args:
        path (str | Path): File.

    Returns:
        dict: Its content, not checked further.

    Raises:
        ValueError: If it is not a JSON object; the sentence names the file, the place in it and
            the remedy.
    """
    try:
        text = Path(path).read_bytes().decode()
    except IsADirectoryError:
        raise ValueError(
            f'{path} is a folder; name the annotation file in it, a .json file.'
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f'{path} is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8.'
        ) from None
    if text.startswith('\ufeff'):
        raise ValueError(
            f'{path} starts with a byte order mark, which JSON does not allow; save it as UTF-8 '
            'without one.'
        )
    if not text.strip():
        raise ValueError(f'{path} is empty; copy or export the annotations again.')
    try:
        with _without_collection():
            content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f'{path} is not complete JSON ({error}); copy or export the annotations again.'
        ) from None
    if not isinstance(content, dict):
        raise ValueError(
            f'{path} holds a {type(content).__name__}, but COCO annotations are an object with '
            "'images', 'annotations' and 'categories'; export them in COCO's format for detection."
        )
    return content


@contextmanager
def _without_collection() -> Iterator[None]:
    """Reading makes millions of lists; looking for cycles among them doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_annotations(
    content: dict,
    path: str | Path,
    *,
    masks: bool = False,
    evaluation: bool = False,
    annotated: bool = True,
) -> CocoSummary:
    """Check what :func:`read_coco` returned.

    Refused is what ends in an error later, or means something else than it says: MMDetection and
    pycocotools skip boxes of no size, annotations of unknown categories and those of unknown
    images without a word. Accepted are images without annotations, boxes that reach beyond their
    image, and, with a note, up to a tenth of annotations that will be skipped.

    Args:
        content (dict): Content of the file.
        path (str | Path): Its path, for the sentences.
        masks (bool): Whether masks are needed, not only boxes. Defaults to False.
        evaluation (bool): Whether pycocotools evaluates on the file; it needs ``iscrowd``, and
            counts an annotation with id 0 as missed. Defaults to False.
        annotated (bool): Whether the file has annotations; lists of images to predict have none.
            Defaults to True.

    Returns:
        CocoSummary: What it holds.

    Raises:
        ValueError: Naming the file, the entries (the first three, and how many), the field, the
            value and the remedy.
    """
    summary = CocoSummary()
    for key in ('images', 'categories', 'annotations') if annotated else ('images', 'categories'):
        _check_list(content, key, path)
    for key, diagnose in (('images', image_problem), ('categories', category_problem)):
        problems = _Problems(path, key, len(content[key]))
        known: dict = {}
        for index, entry in enumerate(content[key]):
            problem = diagnose(entry, masks) or duplicate(entry, known)
            if problem:
                problems.add(index, entry, *problem)
            else:
                known[entry['id']] = entry
        problems.raise_first()
        setattr(summary, key, known)
    categories = {entry['id']: entry['name'] for entry in content['categories']}
    summary.categories = categories
    if len(set(categories.values())) < len(categories):
        name = next(n for n in categories.values() if list(categories.values()).count(n) > 1)
        raise ValueError(
            f'{path}: more than one of the categories has the name {name!r}; give each a name of '
            'its own, or merge them under one id.'
        )
    if annotated:
        _check_objects(content['annotations'], path, summary, masks, evaluation)
    return summary


def _check_objects(
    annotations: list, path: str | Path, summary: CocoSummary, masks: bool, evaluation: bool
) -> None:
    problems = _Problems(path, 'annotations', len(annotations))
    skipped = _Problems(path, 'annotations', len(annotations))
    summary.objects = dict.fromkeys(summary.categories, 0)
    known: set = set()
    far, as_corners = [], True
    decode = len(annotations) <= _DECODED
    for index, entry in enumerate(annotations):
        if is_plain(entry, known, summary.images, summary.objects, masks):
            known.add(entry['id'])
            summary.objects[entry['category_id']] += 1
            if as_corners:
                as_corners = may_be_corners(entry['bbox'], summary.images[entry['image_id']])
            continue
        problem = object_problem(
            entry, summary.images, summary.objects, masks, evaluation, decode
        ) or duplicate(entry, known)
        if problem:
            problems.add(index, entry, *problem)
            continue
        known.add(entry['id'])
        image = summary.images[entry['image_id']]
        x, y, w, h = entry['bbox']
        width, height = image['width'], image['height']
        if x + w > 1.1 * width + 1 or y + h > 1.1 * height + 1:
            far.append(index)
        as_corners = as_corners and may_be_corners(entry['bbox'], image)
        problem = reason_to_skip(entry, width, height, masks)
        if problem:
            skipped.add(index, entry, *problem)
        elif not entry.get('iscrowd') and not entry.get('ignore'):
            summary.objects[entry['category_id']] += 1
    problems.raise_first()
    if as_corners and far:
        raise ValueError(
            f"{path}: 'bbox' of the annotations seems to be [x1, y1, x2, y2], as read as COCO's "
            f'[x, y, width, height] {len(far)} of {len(annotations)} reach far beyond their '
            f'images, such as {annotations[far[0]]["bbox"]} of id {annotations[far[0]]["id"]!r}; '
            'write x2 - x1 and y2 - y1 for the last two.'
        )
    if skipped.count > _FEW * len(annotations):
        skipped.raise_first()
    summary.notes += skipped.sentences()
    if far:
        summary.notes.append(
            f"{path}: 'bbox' of {len(far)} of {len(annotations)} annotations reaches far beyond "
            f'the image, such as {annotations[far[0]]["bbox"]} of id {annotations[far[0]]["id"]!r}.'
        )
    if evaluation and 0 in known:
        summary.notes.append(
            f'{path}: pycocotools counts the annotation with id 0 as missed, whatever a detector '
            'finds; count ids from 1.'
        )


class _Problems:
    """Defects of the entries of a list, those of a kind together."""

    def __init__(self, path: str | Path, key: str, total: int) -> None:
        self.path, self.key, self.total = path, key, total
        self.kinds: dict[tuple, list] = {}

    def add(self, index: int, entry: Any, name: str, what: str, value: Any, remedy: str) -> None:
        kind = self.kinds.setdefault((name, what, remedy), [0])
        kind[0] += 1
        if len(kind) <= _SHOWN:
            known = isinstance(entry, dict) and 'id' in entry and name != 'id'
            place = f'id {entry["id"]!r}' if known else f'{self.key}[{index}]'
            kind.append(place if value is MISSING else f'{_short(value)} of {place}')

    @property
    def count(self) -> int:
        return sum(kind[0] for kind in self.kinds.values())

    def sentences(self) -> list[str]:
        return [
            f'{self.path}: {count} of {self.total} {self.key} have {name!r} {what}: '
            f'{", ".join(examples)}{", ..." if count > len(examples) else ""}; {remedy}.'
            for (name, what, remedy), (count, *examples) in self.kinds.items()
        ]

    def raise_first(self) -> None:
        if self.kinds:
            first, *others = self.sentences()
            more = f' There are defects of {len(others)} other kinds, too.' if others else ''
            raise ValueError(first + more)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


def _check_list(content: dict, key: str, path: str | Path) -> None:
    if key not in content:
        raise ValueError(
            f'{path} has no {key!r}, only {_short(list(content))}; export the annotations in '
            "COCO's format for detection."
        )
    value = content[key]
    if not isinstance(value, list):
        raise ValueError(
            f'{path}: {key!r} is {_short(value)}; make it a list with an object for each entry.'
        )
    if not value and key != 'annotations':
        raise ValueError(f'{path}: {key!r} is empty; export the annotations again.')
