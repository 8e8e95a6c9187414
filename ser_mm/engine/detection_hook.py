"""Drawing what a detector of MMDetection finds; imports MMDetection, so configs name it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
from mmcv.transforms import LoadImageFromFile
from mmdet.engine.hooks import DetVisualizationHook
from mmengine import fileio
from mmengine.runner import Runner
from mmpretrain.registry import HOOKS

from ser_mm.arguments import Name, NaturalFloat, Positive, Share, checked


@HOOKS.register_module()
@checked(interval=Positive, score_thr=Share, wait_time=NaturalFloat, test_out_dir=Name | None)
class DrawDetectionsHook(DetVisualizationHook):
    """MMDetection's ``DetVisualizationHook``, on images as the detector saw them.

    That of MMDetection turns an image by its EXIF orientation whatever the pipeline does, so that
    boxes are drawn in wrong places.

    Args:
        **kwargs: Those of ``DetVisualizationHook``: draw, interval, score_thr, test_out_dir, ...
    """

    def before_run(self, runner: Runner) -> None:
        """Draw with the run's own visualizer, not with the last one of this process."""
        self._visualizer = runner.visualizer
        if self.show:  # as in ``DetVisualizationHook``
            self._visualizer._vis_backends = {}

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Sequence
    ) -> None:
        """Draw the first image of every ``interval``-th batch, if ``draw`` is set."""
        step = runner.iter + batch_idx
        if self.draw and step % self.interval == 0:
            self._draw(runner.val_dataloader, outputs[0], 'val_img', step, None)

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Sequence
    ) -> None:
        """Draw every image, if ``draw`` is set, to ``test_out_dir`` in the folder of the run."""
        for sample in outputs if self.draw else ():
            self._test_index += 1
            file = None
            if self.test_out_dir is not None:
                folder = Path(runner.work_dir, runner.timestamp, self.test_out_dir)
                file = str(folder / Path(sample.img_path).name)
            self._draw(runner.test_dataloader, sample, 'test_img', self._test_index, file)

    def _draw(self, loader: Any, sample: Any, name: str, step: int, file: str | None) -> None:
        transforms = getattr(getattr(loader.dataset, 'pipeline', None), 'transforms', ())
        found = [t for t in transforms if isinstance(t, LoadImageFromFile)]
        how = dict(flag=found[0].color_type, backend=found[0].imdecode_backend) if found else {}
        content = fileio.get(sample.img_path, backend_args=self.backend_args)
        self._visualizer.add_datasample(
            Path(sample.img_path).name if self.show else name,
            mmcv.imfrombytes(content, channel_order='rgb', **how),
            data_sample=sample,
            show=self.show,
            wait_time=self.wait_time,
            pred_score_thr=self.score_thr,
            step=step,
            out_file=file,
        )
