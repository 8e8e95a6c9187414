"""Annotation files in COCO's format for detection, checked before they are trained on."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SHOWN = 3  # examples in a sentence
_HUGE = 1e9  # pixels; also lets NaN and infinity fail a comparison
_FEW = 0.1  # fraction of annotations that may be of no use
_DECODED = 10_000  # annotations of a file whose compressed masks are decoded, in a second or so
_BOX = 'give [x, y, width, height] in pixels, or remove the annotation'


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
    for key, diagnose in (('images', _image_problem), ('categories', _category_problem)):
        problems = _Problems(path, key, len(content[key]))
        known: dict = {}
        for index, entry in enumerate(content[key]):
            problem = diagnose(entry, masks) or _duplicate(entry, known)
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
        if _is_plain(entry, known, summary, masks):
            known.add(entry['id'])
            summary.objects[entry['category_id']] += 1
            if as_corners:
                as_corners = _may_be_corners(entry['bbox'], summary.images[entry['image_id']])
            continue
        problem = _object_problem(entry, summary, masks, evaluation, decode)
        if not problem and entry['id'] in known:
            problem = 'id', 'that another has too', entry['id'], 'give each an id of its own'
        if problem:
            problems.add(index, entry, *problem)
            continue
        known.add(entry['id'])
        image = summary.images[entry['image_id']]
        x, y, w, h = entry['bbox']
        width, height = image['width'], image['height']
        if x + w > 1.1 * width + 1 or y + h > 1.1 * height + 1:
            far.append(index)
        as_corners = as_corners and _may_be_corners(entry['bbox'], image)
        problem = _reason_to_skip(entry, width, height, masks)
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


def _is_plain(entry: Any, known: set, summary: CocoSummary, masks: bool) -> bool:
    """Whether an annotation certainly is fine, as nearly all of a million are."""
    try:
        key, (x, y, w, h) = entry['id'], entry['bbox']
        image = summary.images[entry['image_id']]
        return (
            type(key) is int
            and key not in known
            and entry['category_id'] in summary.objects
            and type(x + y + w + h) in (int, float)
            and w >= 1 <= h
            and x >= 0 <= y
            and x + w <= image['width']
            and y + h <= image['height']
            and 0 < entry['area'] < _HUGE
            and entry['iscrowd'] == 0
            and 'ignore' not in entry
            and (not masks or all(map(_is_polygon, entry['segmentation'] or [None])))
        )
    except (KeyError, TypeError, ValueError):
        return False


def _is_polygon(value: Any) -> bool:
    is_list = type(value) is list and len(value) >= 6 and len(value) % 2 == 0
    return is_list and -_HUGE < sum(value) < _HUGE


def _may_be_corners(box: list, image: dict) -> bool:
    return box[0] < box[2] <= image['width'] + 1 and box[1] < box[3] <= image['height'] + 1


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
            kind.append(place if value is _MISSING else f'{_short(value)} of {place}')

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


_MISSING = object()


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


def _is_id(value: Any) -> bool:
    return type(value) is int or type(value) is str or (type(value) is float and value % 1 == 0)


def _as_other_type(value: int | float | str) -> int | str | None:
    if not isinstance(value, str):
        return str(value)
    return int(value) if value.isdecimal() else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_HUGE < value < _HUGE


def _id_problem(entry: Any) -> tuple | None:
    if not isinstance(entry, dict):
        return 'id', 'missing', entry, 'write an object with the fields of COCO'
    if 'id' not in entry:
        return 'id', 'missing', _MISSING, 'number them'
    if not _is_id(entry['id']):
        return 'id', 'that is not a number', entry['id'], 'number them'
    return None


def _duplicate(entry: dict, known: dict) -> tuple | None:
    if entry['id'] in known:
        return 'id', 'that another has too', entry['id'], 'give each an id of its own'
    return None


def _image_problem(image: Any, masks: bool) -> tuple | None:
    problem = _id_problem(image)
    if problem:
        return problem
    name = image.get('file_name', _MISSING)
    if not (isinstance(name, str) and name):
        return 'file_name', 'missing or not a name', name, 'give the path below data_prefix.img'
    for key in ('width', 'height'):
        value = image.get(key, _MISSING)
        if not (_is_number(value) and value > 0 and value % 1 == 0):
            what = 'missing' if value is _MISSING else 'that is not a positive whole number'
            return key, what, value, 'give the size of the image file in pixels'
    return None


def _category_problem(category: Any, masks: bool) -> tuple | None:
    problem = _id_problem(category)
    if problem:
        return problem
    name = category.get('name', _MISSING)
    if not (isinstance(name, str) and name):
        return 'name', 'missing or not a text', name, 'give the name of the class'
    return None


def _object_problem(
    entry: Any, summary: CocoSummary, masks: bool, evaluation: bool, decode: bool
) -> tuple | None:
    """Field, defect, value and remedy of an annotation that cannot be used; None if it can."""
    problem = _id_problem(entry)
    if problem:
        return problem
    if evaluation and type(entry['id']) is str:
        return 'id', 'that is a text', entry['id'], 'number them: pycocotools needs numbers'
    for key, known, name in (
        ('image_id', summary.images, 'images'),
        ('category_id', summary.categories, 'categories'),
    ):
        value = entry.get(key, _MISSING)
        if not _is_id(value):
            what = 'missing' if value is _MISSING else f'that is not an id of {name}'
            return key, what, value, f"give the id of an entry of '{name}'"
        if value not in known:
            remedy = f"add the entry to '{name}', or remove the annotation"
            if _as_other_type(value) in known:
                remedy = f"write the id as in '{name}': one is a number, the other a text"
            return key, f'that none of the {name} has', value, remedy
    box = entry.get('bbox', _MISSING)
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        what = 'missing' if box is _MISSING else 'that is not four finite numbers'
        return 'bbox', what, box, _BOX
    if box[2] < 0 or box[3] < 0:
        return 'bbox', 'with a negative width or height', box, _BOX
    area = entry.get('area', _MISSING)
    if not _is_number(area):
        what = 'missing' if area is _MISSING else 'that is not a number'
        return 'area', what, area, 'give that of the mask in pixels, or of the box without one'
    crowd = entry.get('iscrowd')
    if crowd not in ((0, 1) if evaluation else (0, 1, None)):
        what = 'missing' if crowd is None else 'that is neither 0 nor 1'
        return 'iscrowd', what, _MISSING if crowd is None else crowd, 'give 0, or 1 for a crowd'
    return _mask_problem(entry, summary.images[entry['image_id']], decode) if masks else None


def _mask_problem(entry: dict, image: dict, decode: bool) -> tuple | None:
    mask = entry.get('segmentation', _MISSING)
    remedy = 'give a list of polygons [x1, y1, x2, y2, ...] or a run-length code, or choose a '
    remedy += 'detector without masks'
    if mask is _MISSING or not mask:
        return 'segmentation', 'missing or empty', mask, remedy
    if isinstance(mask, dict):
        counts, size = mask.get('counts'), mask.get('size')
        if size != [image['height'], image['width']]:
            what = 'of another size than [height, width] of its image'
            return 'segmentation', what, size, remedy
        try:
            if isinstance(counts, str) and counts:
                if decode:
                    from pycocotools.mask import decode as to_bitmap  # comes with MMDetection

                    to_bitmap(mask)
                return None
            if isinstance(counts, list) and sum(counts) == size[0] * size[1] and min(counts) >= 0:
                return None
        except (TypeError, ValueError):
            pass
        return 'segmentation', "whose 'counts' do not fill the image", counts, remedy
    try:
        if isinstance(mask, list) and all(
            isinstance(polygon, list) and -_HUGE < sum(polygon) < _HUGE for polygon in mask
        ):
            return None
    except TypeError:
        pass
    return 'segmentation', 'that is not a list of polygons', mask, remedy


def _reason_to_skip(entry: dict, width: int, height: int, masks: bool) -> tuple | None:
    """As :func:`_object_problem`, for what MMDetection skips without a word."""
    x, y, w, h = entry['bbox']
    remedy = 'MMDetection skips them; correct or remove them'
    if w < 1 or h < 1:
        if x <= 1 and y <= 1 and x + w <= 1 and y + h <= 1:
            remedy += ' (if these are fractions of the image, multiply them by its size)'
        return 'bbox', 'of less than a pixel', entry['bbox'], remedy
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return 'bbox', 'outside of the image', entry['bbox'], remedy
    if entry['area'] <= 0:
        return 'area', 'that is not positive', entry['area'], remedy
    if masks and isinstance(entry['segmentation'], list):
        if not any(len(p) >= 6 and len(p) % 2 == 0 for p in entry['segmentation']):
            return 'segmentation', 'without three points', entry['segmentation'], remedy
    return None
