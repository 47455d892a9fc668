"""Current recipes: cosine schedules, averaged weights, mixed precision, compiled."""

from __future__ import annotations

from dataclasses import replace

from train.recipes.losses import Loss
from train.recipes.recipe import CifarAugment, CifarRecipe, ImageNetAugment, ImageNetRecipe
from train.recipes.schedules import Optimizer, Schedule

_SGD = Optimizer(kind="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)

# 390 full batches of 128 in 50,000 images: 200 epochs, 5 of them warmup.
_CIFAR = CifarRecipe(
    name="modern",
    network="resnet32",
    operator="tanh_cosine",
    classes=100,
    optimizer=_SGD,
    schedule=Schedule(kind="cosine", warmup=5 * 390),
    loss=Loss(smoothing=0.1, orthogonality=1e-5),
    project_every=100,
    ema=0.999,
    amp="bf16",
    channels_last=True,
    compile=True,
    steps=200 * 390,
    batch_size=128,
    evaluate_every=2 * 390,
    evaluation_batch=500,
    save_every=10 * 390,
    augment=CifarAugment(padding=4, mode="reflect", mean=(127.5,), std=(64.0,), cutout=8),
)

#: Current recipes for CIFAR-10 and CIFAR-100.
modern_cifar_recipes: dict[str, CifarRecipe] = {
    recipe.name: recipe
    for recipe in (
        _CIFAR,
        replace(
            _CIFAR,
            name="modern_adamw",
            optimizer=Optimizer(kind="adamw", lr=1e-3, weight_decay=0.05),
        ),
    )
}

# 5,004 full batches of 256 in 1,281,167 images: 100 epochs, 5 of them warmup.
_IMAGENET = ImageNetRecipe(
    name="modern",
    network="modified_resnet18",
    operator="tanh_cosine",
    classes=1000,
    optimizer=replace(_SGD, weight_decay=5e-5),
    schedule=Schedule(kind="cosine", warmup=5 * 5_004),
    loss=Loss(smoothing=0.1, orthogonality=1e-5),
    project_every=100,
    ema=0.9999,
    amp="bf16",
    channels_last=True,
    compile=True,
    steps=100 * 5_004,
    batch_size=256,
    evaluate_every=5_004,
    evaluation_batch=250,
    save_every=5_004,
    augment=ImageNetAugment(),
)

#: Current recipes for ImageNet.
modern_imagenet_recipes: dict[str, ImageNetRecipe] = {
    recipe.name: recipe
    for recipe in (
        _IMAGENET,
        replace(_IMAGENET, name="modern_resnet18", network="resnet18"),
        replace(
            _IMAGENET,
            name="modern_adamw",
            optimizer=Optimizer(kind="adamw", lr=1e-3, weight_decay=0.05),
        ),
    )
}
