"""The commands of README and docs: what runs each, or why nothing does.

Commands stand here as they stand there, without comments and line breaks. Those of the tutorials
are run as they are, by ``tests/test_tutorials.py``.
"""

IMAGENET = 'needs ImageNet, and GPUs'
TINY = 'needs Tiny ImageNet'
HOURS = 'trains for many minutes or hours; at a smaller size: '
NETWORK = 'installs from the network, or makes an environment'

COMMANDS = {
    # Files of tests, and functions in them: the same command, or the function that it calls, on
    # smaller data.
    'tests/cli/test_probe.py::test_command_reports_and_speaks_one_sentence': [
        'ser-mm probe CONFIG CHECKPOINT',
        'ser-mm probe configs/demo/ser_mocov3.py $run/SER/epoch_8.pth --epochs 500',
    ],
    'tests/cli/test_data.py::test_pretraining_and_probe_on_a_folder_of_any_name': [
        'ser-mm probe CONFIG CHECKPOINT --data PATH',
        'ser-mm probe ser_mocov3_vits16 CHECKPOINT --data /path/to/images',
        'ser-mm train ser_mocov3_vits16 --data /path/to/images',
    ],
    'tests/cli/test_robustness.py::test_corruptions_on_the_fly_are_labelled': [
        'ser-mm robustness CONFIG CHECKPOINT',
        'ser-mm robustness configs/demo/ser_mocov3.py $run/SER/epoch_8.pth --epochs 500',
    ],
    'tests/cli/test_equivariance.py::test_networks_of_two_configs': [
        'ser-mm equivariance CONFIG CHECKPOINT',
        'ser-mm equivariance $demo/mocov3.py $run/baseline/epoch_8.pth $demo/ser_mocov3.py '
        '$run/SER/epoch_8.pth --images 450',
    ],
    'tests/cli/test_dense.py::test_results_are_written': [
        'ser-mm dense CONFIG CHECKPOINT',
        'ser-mm dense demo/ser_mocov3 $run/SER/epoch_8.pth --out work_dirs/dense_SER.json',
        'ser-mm dense demo/ser_mocov3 --out work_dirs/dense_untrained.json',
    ],
    'tests/cli/test_probe_sets.py::test_published_folders_with_a_known_answer': [
        'ser-mm probe CONFIG CHECKPOINT --also v2=data/imagenetv2-matched-frequency-format-val '
        'r=data/imagenet-r a=data/imagenet-a sketch=data/sketch',
        'ser-mm probe CONFIG CHECKPOINT --shots 1 5 10',
    ],
    'tests/cli/test_ranks.py::test_ranks_do_not_matter': [
        'SCRIPT=dense.py tools/dist_train.sh CONFIG 2 CHECKPOINT',
    ],
    'tests/test_benchmark_configs.py::test_commands_of_the_page': [
        'tools/dist_train.sh configs/benchmarks/linear_mocov3_vits16.py 8 --cfg-options '
        'model.backbone.init_cfg.checkpoint=work_dirs/ser_mocov3_vits16/epoch_100.pth',
        'ser-mm train linear_mocov3_vits16 --auto-scale-lr --work-dir work_dirs/linear_baseline '
        '--cfg-options model.backbone.init_cfg.checkpoint=work_dirs/mocov3_vits16/epoch_100.pth '
        'model.backbone.cls_layer=0',
        'ser-mm test linear_mocov3_vits16 work_dirs/linear_mocov3_vits16/epoch_90.pth',
        'ser-mm probe linear_mocov3_vits16 work_dirs/ser_mocov3_vits16/epoch_100.pth',
    ],
    'tests/test_benchmark_configs.py::test_list_of_the_page_for_one_percent': [
        'mkdir -p data/imagenet/meta',
        "ls data/imagenet/train | awk 'NR == FNR { label[$1] = NR - 1; next }",
        '{ split($1, part, "_"); print part[1] "/" $1, label[part[1]] }\' - 1percent.txt > '
        'data/imagenet/meta/train_1percent.txt',
    ],
    'tests/evaluation/test_segmentation.py::test_command': [
        'ser-mm dense CONFIG CHECKPOINT --measures segmentation --masks data/shapes',
    ],
    'tests/cli/test_tsne.py::test_two_checkpoints_side_by_side': [
        'ser-mm tsne CONFIG CHECKPOINT CONFIG CHECKPOINT --names A B',
        'ser-mm tsne CONFIG CHECKPOINT CONFIG CHECKPOINT --names A B --corruption defocus_blur',
        'ser-mm tsne $demo/mocov3.py $run/baseline/epoch_8.pth $demo/ser_mocov3.py '
        '$run/SER/epoch_8.pth --names baseline SER --corruption defocus_blur --severity 1',
    ],
    'tests/test_howto.py::test_features_by_embedder_by_mmpretrain_and_by_command': [
        'ser-mm embed ser_mocov3_vits16 work_dirs/ser_mocov3_vits16/epoch_100.pth '
        '--data "my images" --out features.npy',
    ],
    'tests/test_howto.py::test_features_by_onnx': [
        'ser-mm export ser_mocov3_vits16 work_dirs/ser_mocov3_vits16/epoch_100.pth vits16.onnx '
        '--to onnx',
    ],
    'tests/cli/test_embed.py::test_a_folder_by_command': [
        'ser-mm embed CONFIG CHECKPOINT --data FOLDER --out features.npy',
        'ser-mm embed out/run.py out/run/epoch_100.pth --data "my images" --out features.npy',
    ],
    'tests/evaluation/test_embedding.py::test_features_are_those_of_timm_and_of_mmpretrain': [
        'ser-mm embed out/run.py out/run/epoch_100.pth --data "my images" --out features.parquet',
    ],
    'tests/cli/test_export.py::test_what_it_prints_loads_what_it_wrote': [
        'ser-mm export CONFIG CHECKPOINT OUT',
        'ser-mm export ser_mocov3_vits16 work_dirs/ser_mocov3_vits16/epoch_100.pth out/timm',
    ],
    'tests/evaluation/test_export.py::test_mmpretrain_loads_its_own_class': [
        'ser-mm export mocov3_vits16 work_dirs/mocov3_vits16/epoch_100.pth vits16.pth '
        '--to mmpretrain',
    ],
    'tests/evaluation/test_conversion.py::test_resnet50_of_torchvision_there_and_back': [
        'ser-mm export ser_mocov3_r50 work_dirs/ser_mocov3_r50/epoch_100.pth resnet50.pth '
        '--to torchvision',
    ],
    'tests/cli/test_cost.py::test_ser_costs_at_most_3_in_1000': [
        'ser-mm cost CONFIG',
        'ser-mm cost configs/ser_mocov3_vits16.py',
    ],
    'tests/experiments/test_pretrain.py::'
    'test_a_flat_folder_by_one_command_that_is_killed_and_repeated': [
        'ser-mm pretrain --data "my images" --out out',
        'ser-mm pretrain --data "my images" --out out --model vit_tiny_patch16 --image-size 64 '
        '--epochs 20',
    ],
    'tests/experiments/test_pretrain.py::test_folders_of_classes_going_on_from_weights': [
        'ser-mm pretrain --data "my images" --out out --method dino --weights dino_vits16.pth',
        'ser-mm pretrain --data "my images" --out out --model vit_small_patch16 '
        '--weights dino_vits16.pth',
    ],
    'tests/test_configs.py::test_trains': [
        'ser-mm train ser_mocov3_vits16 --auto-scale-lr',
        'ser-mm train equimod_mocov3_vits16',
        'ser-mm train equimod_mocov3_vits16_layer3',
        'ser-mm train equimod_mocov3_vits16 --cfg-options model.loss_weight=0',
    ],
    'tests/cli/test_train.py::test_killed_run_resumes_and_ends_as_the_uninterrupted_one': [
        'ser-mm train configs/ser_mocov3_vits16.py --resume CHECKPOINT',
        'tools/dist_train.sh configs/ser_mocov3_vits16.py 8 --resume',
    ],
    'tests/cli/test_detection.py::test_commands_train_and_test_a_detector': [
        'ser-mm test CONFIG CHECKPOINT',
        '{train,val,test}_dataloader.dataset.metainfo.classes=classes.txt '
        'model.roi_head.{bbox,mask}_head.num_classes=3',
    ],
    'tests/cli/test_detection.py::test_from_images_to_map_by_the_documented_commands': [
        'mkdir -p data',
        'mkdir -p data && ln -s /path/to/imagenet data/imagenet',
        'ln -s /path/to/imagenet data/imagenet',
        'ln -s /path/to/coco data/coco',
        'tools/dist_train.sh configs/ser_mocov3_vits16.py 8',
        'tools/dist_train.sh configs/coco/mask-rcnn_vits16.py 8 --cfg-options '
        'model.backbone.init_cfg.checkpoint=work_dirs/ser_mocov3_vits16/epoch_100.pth',
        'tools/dist_test.sh configs/coco/mask-rcnn_vits16.py '
        'work_dirs/mask-rcnn_vits16/epoch_12.pth 8',
    ],
    'tests/experiments/test_detection.py::'
    'test_a_comparison_that_is_killed_goes_on_and_keeps_what_is_done': [
        'ser-mm detect CONFIG --train JSON --val JSON --images FOLDER '
        '--backbones A=CHECKPOINT B=CHECKPOINT',
        'ser-mm detect coco/faster-rcnn_vits16 --train train.json --val val.json --images photos '
        '--backbones baseline=work_dirs/mocov3_vits16/epoch_100.pth '
        'SER=work_dirs/ser_mocov3_vits16/epoch_100.pth --scratch --shares 0.01 0.1 1 '
        '--seeds 0 1 2',
    ],
    'tests/cli/test_boxes.py::test_files_and_what_is_said_of_them': [
        'ser-mm boxes data/tiny-imagenet-200 data/tiny-imagenet-boxes --train 15 --val 5',
    ],
    'tests/experiments/test_comparison.py::test_whole_chain_goes_on_where_it_was': [
        'ser-mm compare',
        'ser-mm compare --jobs 2',
        'ser-mm compare --tables docs/results/tiny_imagenet/mocov3_tiny_imagenet_short.json',
        'ser-mm compare --tables '
        'docs/results/tiny_imagenet/quarter_of_the_weight/mocov3_tiny_imagenet_short.json',
        'ser-mm compare --tables '
        'docs/results/tiny_imagenet/batches_of_512/mocov3_tiny_imagenet_short.json',
    ],
    'tests/engine/test_compiling.py::test_train_compiled_and_resume_without': [
        'ser-mm train configs/ser_mocov3_vits16.py --compile',
    ],
    'tests/test_benchmarks.py::test_gradients': [
        'python benchmarks/gradients.py CONFIG --checkpoint CHECKPOINT',
    ],
    'tests/test_benchmarks.py::test_device_views': ['python benchmarks/device_views.py'],
    # What no test runs.
    HOURS + 'tests/experiments/test_demo.py::test_demo_from_training_to_pictures': [
        'make demo',
        'make demo ALGORITHM=dino',
        'make demo ALGORITHM=mocov3 DEMO_ARGS="--seeds 0 1 2"',
        'make demo DEMO_ARGS="--seeds 0 1 2"',
    ],
    HOURS + 'tests/test_coco_configs.py::test_config_trains_and_evaluates': [
        'make demo-detection',
        'make demo-detection DEMO_ARGS="--seeds 0 1 2"',
    ],
    HOURS + 'tests/experiments/test_comparison.py::test_whole_chain_goes_on_where_it_was': [
        'ser-mm compare --config demo/ser_mocov3 --arms untrained baseline late_cls views_only '
        'ser --seeds 0 --images 450 --measures accuracy corruptions equivariance dense cost '
        '--work-dir work_dirs/compare_demo',
        'ser-mm probe configs/demo/ser_mocov3.py '
        'work_dirs/compare_demo/mocov3/seed0/SER/epoch_8.pth --shots 1 5 10 --epochs 100',
    ],
    HOURS + 'tests/experiments/test_sweeps.py::test_a_sweep_goes_on_after_an_interruption': [
        'ser-mm ablate addons --seeds 0 --cfg-options train_cfg.max_epochs=4',
        'ser-mm ablate addons --seeds 0 1 2',
        'ser-mm ablate equi_ratio temperature loss_weight --jobs 2',
        'ser-mm ablate gradient --seeds 0 1 2 --jobs 2 --work-dir work_dirs/ablate_16 '
        '--cfg-options train_cfg.max_epochs=16 param_scheduler.1.end=16',
        'ser-mm ablate gradient --seeds 0 1 2 3 4 --jobs 2',
        'ser-mm ablate layer cls --seeds 0 1 2',
        'ser-mm ablate layer cls --seeds 0 1 2 --jobs 2',
    ],
    IMAGENET: [
        'ser-mm ablate addons --config ser_mocov3_vits16 --gpus 8',
        'ser-mm ablate layer cls --config configs/ser_mocov3_vits16.py --gpus 8 --num-workers 16 '
        '--seeds 0',
        'ser-mm probe configs/ser_mocov3_vits16.py work_dirs/ser_mocov3_vits16/epoch_100.pth',
        'SCRIPT=probe.py tools/dist_train.sh $config 8 $checkpoint --num-workers 8',
        'SCRIPT=robustness.py tools/dist_train.sh $config 8 $checkpoint --num-workers 8 '
        '--imagenet-c data/imagenet-c --imagenet-p data/imagenet-p',
        'ser-mm cost configs/ser_mocov3_vits16.py --measure',
    ],
    'is what tools/dist_train.sh does: '
    'tests/cli/test_train.py::test_killed_run_resumes_and_ends_as_the_uninterrupted_one': [
        'torchrun --nproc_per_node 8 -m ser_mm.cli.train CONFIG --launcher pytorch',
    ],
    'needs COCO, and GPUs': [
        'tools/dist_train.sh configs/coco/mask-rcnn_vits16.py 8 '
        '--work-dir work_dirs/mask-rcnn_vits16_baseline --cfg-options '
        'model.backbone.init_cfg.checkpoint=work_dirs/mocov3_vits16/epoch_100.pth '
        'model.backbone.cls_layer=0',
        'tools/dist_test.sh configs/coco/mask-rcnn_vits16.py CHECKPOINT 8 '
        '--cfg-options model.backbone.cls_layer=0',
    ],
    TINY: [
        'ser-mm train twenty.py --auto-scale-lr --cfg-options '
        'model.backbone.init_cfg.checkpoint=CHECKPOINT',
        'ser-mm probe twenty.py CHECKPOINT --epochs 10 --probe-batch 64 --lrs 3',
        'ser-mm probe twenty.py CHECKPOINT --epochs 10 --probe-batch 64',
        'ser-mm compare --config ser_mocov3_tiny_imagenet --jobs 4',
        'ser-mm compare --arms untrained baseline late_cls views_only ser supervised '
        '--seeds 0 1 2 --jobs 2 --train-images 25000 --images 500 --solver lbfgs',
        'ser-mm compare --arms ser_early_cls --seeds 0 --train-images 25000 --images 500 '
        '--solver lbfgs',
        'ser-mm compare --arms ser --seeds 0 1 2 --jobs 2 --train-images 25000 --images 500 '
        '--solver lbfgs --cfg-options model.loss_weight=0.25 --work-dir work_dirs/compare_quarter '
        '--out work_dirs/compare_quarter/results',
        'ser-mm compare --seeds 0 1 2 --jobs 12 --train-images 25000 --images 500 --solver lbfgs '
        '--measures accuracy equivariance dense cost boxes --work-dir work_dirs/compare_512 '
        '--out work_dirs/compare_512/results --cfg-options '
        'train_dataloader.batch_size=512 optim_wrapper.optimizer.lr=2e-3 '
        'param_scheduler.0.start_factor=1',
        'ser-mm train faster-rcnn_tiny --cfg-options model.backbone.init_cfg.checkpoint=CHECKPOINT',
        'ser-mm train faster-rcnn_tiny --work-dir work_dirs/faster-rcnn_tiny_128 --cfg-options '
        'model.backbone.init_cfg.checkpoint=CHECKPOINT '
        'train_dataloader.dataset.pipeline.3.scale="(128,128)" '
        '{val,test}_dataloader.dataset.pipeline.2.scale="(128,128)"',
    ],
    'needs weights of others, or a checkpoint that is not here': [
        'ser-mm pretrain --data "my images" --out out --model timm/vit_small_patch14_reg4_dinov2',
        'ser-mm pretrain --data "my images" --out out '
        '--model timm/vit_small_patch14_reg4_dinov2 --weights dinov2_vits14_reg4_pretrain.pth',
        'ser-mm pretrain --data "my images" --out out --model timm/local-dir:FOLDER '
        '--weights FOLDER/model.safetensors',
        'ser-mm pretrain --data ten --out out --model timm/local-dir:FOLDER '
        '--weights FOLDER/model.safetensors --image-size 48 --epochs 6',
        'ser-mm probe my_vit.py dino_deitsmall16_pretrain.pth',
    ],
    'needs a GPU': ['python benchmarks/gpu.py --release /path/to/SER'],
    'needs Slurm': ['tools/slurm_train.sh PARTITION JOB configs/ser_mocov3_vits16.py'],
    'needs an account': ['hf upload USER/NAME out/timm'],
    NETWORK: [
        'MMCV_WITH_OPS=1 FORCE_CUDA=1 pip install --no-build-isolation --no-cache-dir '
        '--force-reinstall --no-deps onedl-mmcv==2.3.6',
        "pip install 'setuptools==80.9.0' wheel ninja packaging",
        "pip install -e '.[openmmlab,robustness,timm]'",
        'pip install onedl-mmpretrain==1.3.6 onedl-mmdetection==3.5.1 && pip install -e .',
        "python -c 'from mmcv.ops import get_compiling_cuda_version as v; print(v())'",
        'make env-dev',
        'make env-operators',
        '.venv/bin/pre-commit install',
    ],
    'is what runs the tests, in .github/workflows': [
        'make lint',
        'make test',
        ".venv/bin/python -m pytest -n 2 -m 'not slow'",
    ],
}
