import os
from collections.abc import Sequence
from typing import Annotated

import mmcv
import torch
from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import DATASETS

from ser_mm.arguments import Name, checked, filled
from ser_mm.datasets._custom_dataset import CUSTOM_DATASET

VIDEOS = ('.mp4',)


@DATASETS.register_module()
@checked(**CUSTOM_DATASET, data_root=str | os.PathLike)
class SequenceFolder(CustomDataset):
    """Videos in class folders, each a sequence of frames with one label.

    An item has ``inputs`` of shape (T, 3, H, W). All videos have to have as many frames as the
    first.

    Args:
        extensions (Sequence[str]): Of the files. Defaults to ('.mp4',).
        **kwargs: Those of MMPretrain's ``CustomDataset``; the pipeline begins with the frame.
    """

    def __init__(
        self, *args, extensions: Annotated[Sequence[Name], filled] = VIDEOS, **kwargs
    ) -> None:
        super().__init__(*args, extensions=extensions, **kwargs)
        self.frames = len(mmcv.VideoReader(self.get_data_info(0)['img_path']))

    def load_data_list(self) -> list[dict]:
        """List the videos.

        Returns:
            list[dict]: ``img_path`` and ``gt_label`` of each.

        Raises:
            ValueError: If the folder or the list does not exist.
        """
        try:
            return super().load_data_list()
        except FileNotFoundError as error:
            raise ValueError(
                f'SequenceFolder: data_root={self.data_root!r} with data_prefix='
                f'{self.data_prefix.get("img_path")!r} and ann_file={self.ann_file!r}: '
                f'{error.filename or error} does not exist; name a folder of class folders.'
            ) from error

    def prepare_data(self, idx: int) -> dict:
        """Read a video and put each of its frames through the pipeline.

        Args:
            idx (int): Index of the video.

        Returns:
            dict: ``inputs`` and ``data_samples``, the data sample of the first frame.

        Raises:
            ValueError: If the video has less than two frames that can be read, or not as many as
                the first video.
        """
        info = self.get_data_info(idx)
        frames = [
            self.pipeline(dict(info, img=frame, img_shape=frame.shape[:2]))
            for frame in mmcv.VideoReader(info['img_path'])
        ]
        if len(frames) < 2 or len(frames) != self.frames:
            raise ValueError(
                f'{info["img_path"]} has {len(frames)} readable frames, the first video '
                f'{self.frames}; replace it.'
            )
        inputs = torch.stack([frame['inputs'] for frame in frames])
        return dict(inputs=inputs, data_samples=frames[0]['data_samples'])
