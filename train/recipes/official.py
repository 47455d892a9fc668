"""The official recipes: five for CIFAR-100 (spec 2.7) and one for ImageNet (spec 2.8)."""

from __future__ import annotations

from train.recipes.losses import Loss
from train.recipes.recipe import CifarAugment, CifarRecipe, ImageNetAugment, ImageNetRecipe
from train.recipes.schedules import Optimizer, Schedule


def official_cifar(
    name: str, operator: str, *, network: str = "resnet32", norm: bool = True
) -> CifarRecipe:
    """Return the official CIFAR-100 recipe with a decoupled operator."""
    return CifarRecipe(
        name=name,
        network=network,
        operator=operator,
        classes=100,
        norm=norm,
        official=True,
        optimizer=Optimizer(kind="adam", lr=1e-3, tensorflow_eps=True),
        schedule=Schedule(kind="steps", drops=(20_000, 30_000, 37_500), factor=0.1),
        loss=Loss(smoothing=0.01, offset=1e-4, l2=5e-4, orthogonality=1e-5),
        project_every=100,
        steps=42_500,
        batch_size=128,
        evaluate_every=500,
        evaluation_batch=100,
        save_every=10_000,
        log_every=100,
        augment=CifarAugment(padding=4, mode="symmetric", flip=True, mean=(127.5,), std=(128.0,)),
    )


#: The five experiments of the official CIFAR-100 code.
official_cifar_recipes: dict[str, CifarRecipe] = {
    recipe.name: recipe
    for recipe in (
        official_cifar("tanh_cos", "tanh_cosine"),
        official_cifar("ball_cos", "ball_cosine"),
        official_cifar("seg_cos", "segmented_cosine"),
        official_cifar("linear_cos", "linear_cosine"),
        official_cifar("linear_sqcos_wo_bn", "linear_square_cosine", norm=False),
    )
}

#: The official ImageNet code's experiment.
official_imagenet = ImageNetRecipe(
    name="official",
    network="modified_resnet18",
    operator="tanh_cosine",
    classes=1000,
    official=True,
    block4=True,
    optimizer=Optimizer(kind="sgd", lr=0.1, momentum=0.9),
    schedule=Schedule(kind="steps", drops=(200_000, 375_000, 550_000), factor=0.1),
    loss=Loss(smoothing=0.01, offset=1e-4, l2=1e-4, orthogonality=1e-5),
    project_every=100,
    steps=700_001,
    batch_size=40,
    evaluate_every=4_000,
    evaluation_batch=40,
    save_every=100_000,
    log_every=500,
    augment=ImageNetAugment(official=True, size=224, resize=256),
)
