"""Checkpoints as other code writes them, around a ViT of timm."""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn


def modules(**parts):
    return nn.ModuleDict(parts)


def trained(network, **beside):
    """What scripts save: optimizer, epoch, options of the command line."""
    optimizer = torch.optim.AdamW(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    args = argparse.Namespace(lr=1e-3, output_dir=Path('out'), betas=(0.9, 0.95), clip=None)
    return dict(optimizer=optimizer.state_dict(), epoch=3, args=args, loss=np.float32(1), **beside)


def mae(vit):
    vit.mask_token = nn.Parameter(torch.ones(1, 1, 8))
    vit.decoder_pos_embed = nn.Parameter(torch.ones(1, 17, 8))
    vit.decoder_blocks = nn.ModuleList([nn.Linear(8, 8)])
    return trained(vit, model=vit.state_dict())


def dino(vit):
    head = modules(mlp=nn.Linear(48, 8))
    student = nn.DataParallel(modules(backbone=copy.deepcopy(vit).requires_grad_(), head=head))
    teacher = modules(backbone=vit, head=head)
    nn.init.zeros_(student.module['backbone'].cls_token)
    return trained(teacher, student=student.state_dict(), teacher=teacher.state_dict())


def mocov3(vit):
    vit.head = nn.Sequential(nn.Linear(48, 8), nn.BatchNorm1d(8))
    other = copy.deepcopy(vit)
    nn.init.zeros_(other.cls_token)
    moco = nn.DataParallel(modules(base_encoder=vit, momentum_encoder=other))
    return trained(moco, arch='vit_small', state_dict=moco.state_dict())


def lightning(vit):
    return dict(
        {'pytorch-lightning_version': '2.5.0'},
        epoch=1,
        state_dict=modules(model=vit).state_dict(),
        callbacks={"ModelCheckpoint{'monitor': None}": dict(best_model_score=torch.ones(1))},
        hparams_name='kwargs',
        hyper_parameters=dict(lr=1e-3, data=Path('data'), args=argparse.Namespace(seed=1)),
    )


def dinov2(vit):
    """As trained; what is published is the backbone alone, by the same names."""
    vit.mask_token = nn.Parameter(torch.ones(1, vit.embed_dim))
    teacher = modules(backbone=vit, dino_head=modules(mlp=nn.Linear(8, 8)))
    return trained(teacher, teacher=teacher.state_dict())


FOREIGN = {
    'timm': lambda vit: vit.state_dict(),
    'DeiT': lambda vit: trained(vit, model=vit.state_dict()),
    'DDP': lambda vit: nn.DataParallel(vit).state_dict(),
    'compiled': lambda vit: modules(_orig_mod=vit).state_dict(),
    'MAE': mae,
    'DINO': dino,
    'DINOv2': dinov2,
    'MoCo v3': mocov3,
    'Lightning': lightning,
    'holder of another name': lambda vit: dict(encoder=nn.DataParallel(vit).state_dict(), step=1),
}
