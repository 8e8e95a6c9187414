from mmcv.transforms import BaseTransform
from mmpretrain.registry import TRANSFORMS


@TRANSFORMS.register_module()
class CheckImageSize(BaseTransform):
    """Refuse an image that does not have the size its annotation file states.

    Boxes and masks are in pixels of the image that was annotated. If the file was resized since,
    or is turned by its EXIF orientation on reading, they are in the wrong place, and training goes
    on all the same. Comes right after the transform that reads the image. Without an annotated
    size, as for a new image, nothing is checked.
    """

    def transform(self, results: dict) -> dict:
        """Compare the sizes.

        Args:
            results (dict): With ``img_shape``, and with ``height`` and ``width`` in pixels if the
                image is annotated.

        Returns:
            dict: The same.

        Raises:
            ValueError: Naming the file, both sizes and the remedy.
        """
        height, width = results.get('height'), results.get('width')
        if height is not None and width is not None:
            shape, annotated = tuple(results['img_shape'][:2]), (height, width)
            if shape != annotated:
                raise ValueError(describe_size_mismatch(results['img_path'], shape, annotated))
        return results


def describe_size_mismatch(path: str, found: tuple[int, int], annotated: tuple[int, int]) -> str:
    """A sentence on an image whose size is not that of its annotations.

    Args:
        path (str): Image file.
        found (tuple[int, int]): Height and width as read.
        annotated (tuple[int, int]): Height and width in the annotation file.
    """
    if found == annotated[::-1]:
        remedy = (
            'if it has an EXIF orientation, read it as it was annotated: LoadImageFromFile with '
            "color_type='color_ignore_orientation' takes it as stored, as COCO does, with "
            "color_type='color' as turned"
        )
    else:
        remedy = 'use the image that was annotated, or annotate this one'
    return (
        f'{path} is read as {found[1]} x {found[0]} pixels, but its annotation file has width '
        f'{annotated[1]} and height {annotated[0]}; {remedy}.'
    )
