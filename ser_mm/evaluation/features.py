from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def extract_features(
    backbone: nn.Module, preprocessor: Callable[[dict], dict], batches: Iterable[dict]
) -> tuple[Tensor, Tensor]:
    """Features and labels of a data set, by a network in eval mode.

    What a feature is, the network's own ``out_type`` and ``out_indices`` decide: [CLS] tokens
    (N, C), token maps (N, C, h, w), ... The features of several ``out_indices`` are concatenated
    along the channels.

    Args:
        backbone (nn.Module): Called with images; returns a tuple of tensors or one tensor. It
            is left in the mode that it was in.
        preprocessor (Callable): Makes a batch the network's input, on the network's device, e.g.
            MMPretrain's ``ClsDataPreprocessor``.
        batches (Iterable[dict]): Collated batches with ``inputs`` and labelled ``data_samples``, as
            a data loader of MMPretrain gives them.

    Returns:
        tuple: Features, shape (N, C) or (N, C, h, w), and labels, shape (N,), both on the CPU.
    """
    training = backbone.training
    backbone.eval()
    features, labels = [], []
    try:
        for batch in batches:
            batch = preprocessor(batch)
            outputs = backbone(batch['inputs'])
            if isinstance(outputs, (tuple, list)):
                outputs = torch.cat(outputs, dim=1)
            features.append(outputs.cpu())
            labels += [int(sample.gt_label) for sample in batch['data_samples']]
    finally:
        backbone.train(training)
    return torch.cat(features), torch.tensor(labels)
