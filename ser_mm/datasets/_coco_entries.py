"""What is wrong with one entry of an annotation file: field, defect, value and remedy."""

from collections.abc import Collection, Mapping
from typing import Any

_HUGE = 1e9  # pixels; also lets NaN and infinity fail a comparison
_BOX = 'give [x, y, width, height] in pixels, or remove the annotation'

MISSING = object()
"""Stands for the value of a field that an entry lacks."""


def is_plain(entry: Any, known: set, images: Mapping, categories: Collection, masks: bool) -> bool:
    """Whether an annotation certainly is fine, as nearly all of a million are."""
    try:
        key, (x, y, w, h) = entry['id'], entry['bbox']
        image = images[entry['image_id']]
        return (
            type(key) is int
            and key not in known
            and entry['category_id'] in categories
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


def may_be_corners(box: list, image: dict) -> bool:
    return box[0] < box[2] <= image['width'] + 1 and box[1] < box[3] <= image['height'] + 1


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
        return 'id', 'missing', MISSING, 'number them'
    if not _is_id(entry['id']):
        return 'id', 'that is not a number', entry['id'], 'number them'
    return None


def duplicate(entry: dict, known: Collection) -> tuple | None:
    if entry['id'] in known:
        return 'id', 'that another has too', entry['id'], 'give each an id of its own'
    return None


def image_problem(image: Any, masks: bool) -> tuple | None:
    problem = _id_problem(image)
    if problem:
        return problem
    name = image.get('file_name', MISSING)
    if not (isinstance(name, str) and name):
        return 'file_name', 'missing or not a name', name, 'give the path below data_prefix.img'
    for key in ('width', 'height'):
        value = image.get(key, MISSING)
        if not (_is_number(value) and value > 0 and value % 1 == 0):
            what = 'missing' if value is MISSING else 'that is not a positive whole number'
            return key, what, value, 'give the size of the image file in pixels'
    return None


def category_problem(category: Any, masks: bool) -> tuple | None:
    problem = _id_problem(category)
    if problem:
        return problem
    name = category.get('name', MISSING)
    if not (isinstance(name, str) and name):
        return 'name', 'missing or not a text', name, 'give the name of the class'
    return None


def object_problem(
    entry: Any, images: Mapping, categories: Collection, masks: bool, evaluation: bool, decode: bool
) -> tuple | None:
    """Field, defect, value and remedy of an annotation that cannot be used; None if it can."""
    problem = _id_problem(entry)
    if problem:
        return problem
    if evaluation and type(entry['id']) is str:
        return 'id', 'that is a text', entry['id'], 'number them: pycocotools needs numbers'
    for key, known, name in (
        ('image_id', images, 'images'),
        ('category_id', categories, 'categories'),
    ):
        value = entry.get(key, MISSING)
        if not _is_id(value):
            what = 'missing' if value is MISSING else f'that is not an id of {name}'
            return key, what, value, f"give the id of an entry of '{name}'"
        if value not in known:
            remedy = f"add the entry to '{name}', or remove the annotation"
            if _as_other_type(value) in known:
                remedy = f"write the id as in '{name}': one is a number, the other a text"
            return key, f'that none of the {name} has', value, remedy
    box = entry.get('bbox', MISSING)
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        what = 'missing' if box is MISSING else 'that is not four finite numbers'
        return 'bbox', what, box, _BOX
    if box[2] < 0 or box[3] < 0:
        return 'bbox', 'with a negative width or height', box, _BOX
    area = entry.get('area', MISSING)
    if not _is_number(area):
        what = 'missing' if area is MISSING else 'that is not a number'
        return 'area', what, area, 'give that of the mask in pixels, or of the box without one'
    crowd = entry.get('iscrowd')
    if crowd not in ((0, 1) if evaluation else (0, 1, None)):
        what = 'missing' if crowd is None else 'that is neither 0 nor 1'
        return 'iscrowd', what, MISSING if crowd is None else crowd, 'give 0, or 1 for a crowd'
    return _mask_problem(entry, images[entry['image_id']], decode) if masks else None


def _mask_problem(entry: dict, image: dict, decode: bool) -> tuple | None:
    mask = entry.get('segmentation', MISSING)
    remedy = 'give a list of polygons [x1, y1, x2, y2, ...] or a run-length code, or choose a '
    remedy += 'detector without masks'
    if mask is MISSING or not mask:
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


def reason_to_skip(entry: dict, width: int, height: int, masks: bool) -> tuple | None:
    """As :func:`object_problem`, for what MMDetection skips without a word."""
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
