# What probes and the other evaluations look at: ImageNet-1k, centre crops of 224 x 224.
# data/imagenet/{train,val}/<wordnet id>/*.JPEG
eval_pipeline = [
    dict(type='LoadReadableImage', skip=False),
    dict(type='ResizeEdge', scale=256, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
evaluation = {
    split: dict(
        type='CustomDataset',
        data_root='data/imagenet/',
        data_prefix=split,
        pipeline=eval_pipeline,
    )
    for split in ('train', 'val')
}
