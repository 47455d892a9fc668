"""Recipes: loss terms, schedules, optimisers, projection, and the official and paper constants."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, fields, replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dcconv
from dcconv.optim import decoupled_layers
from train.recipes import (
    CifarAugment,
    ImageNetAugment,
    Loss,
    Optimizer,
    Schedule,
    after_step,
    average_of,
    before_step,
    build,
    cifar_recipes,
    cross_entropy,
    find_recipe,
    for_operator,
    imagenet_recipes,
    l2_tensors,
    loss_terms,
    paper_cells,
    start,
    total,
    with_steps,
)
from train.recipes.flat import CifarOptions, ImageNetOptions, flat, unflat
from train.recipes.schedules import make_optimizer, parameter_groups

PRESETS = ("tanh_cos", "ball_cos", "seg_cos", "linear_cos", "linear_sqcos_wo_bn")
OFFICIAL = imagenet_recipes["official"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this narrow lose more by a second thread than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def narrow(recipe):
    """Return the recipe with a network of few channels."""
    widths = (4, 6, 8, 8) if "resnet18" in recipe.network else (4, 6, 8)
    return replace(recipe, widths=widths, classes=10)


def terms_at_start(recipe) -> dict[str, float]:
    network = build(recipe)
    logits = torch.zeros(2, recipe.classes)
    terms = loss_terms(network, logits, torch.tensor([0, 1]), recipe.loss)
    return {name: term.item() for name, term in terms.items()}


# The loss.


def test_cross_entropy_has_the_official_values():
    logits = (3 * torch.sin(torch.arange(40, dtype=torch.float64))).reshape(4, 10)
    logits.requires_grad_(True)
    loss = cross_entropy(logits, torch.tensor([1, 3, 5, 7]), smoothing=0.01, offset=1e-4)
    assert abs(loss.item() - 3.532910) < 1e-6
    (gradient,) = torch.autograd.grad(loss, logits)
    row = [0.0038486, -0.1964827, 0.0624381, 0.0060076, 0.0001870]
    row += [5.16e-06, 0.0015253, 0.0291573, 0.0794567, 0.0138569]
    torch.testing.assert_close(
        gradient[0], torch.tensor(row, dtype=torch.float64), rtol=0, atol=6e-8
    )


def test_orthogonality_has_the_official_value():
    w = torch.cos(1.3 * torch.arange(108, dtype=torch.float64) + 0.2).reshape(3, 3, 3, 4)
    layer = dcconv.DecoupledConv2d(3, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(w.permute(3, 2, 0, 1))
    terms = loss_terms(
        layer, torch.zeros(1, 10), torch.tensor([0]), Loss(orthogonality=1e-5, offset=1e-4)
    )
    assert abs(terms["orthogonality"].item() - 2.22376e-05) < 1e-10


def test_cross_entropy_without_offset_is_the_usual_one():
    logits, labels = torch.randn(5, 7), torch.tensor([0, 6, 2, 2, 3])
    for smoothing in (0.0, 0.3):
        usual = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        torch.testing.assert_close(cross_entropy(logits, labels, smoothing), usual)
        tiny = cross_entropy(logits.double(), labels, smoothing, 1e-12)
        torch.testing.assert_close(tiny.float(), usual)
    # A confident mistake costs -log(offset) and has hardly any gradient.
    wrong = torch.tensor([[100.0, 0.0]], requires_grad=True)
    loss = cross_entropy(wrong, torch.tensor([1]), offset=1e-4)
    assert abs(loss.item() - -math.log(1e-4)) < 1e-5
    assert float(torch.autograd.grad(loss, wrong)[0].abs().max()) < 1e-30


@pytest.mark.parametrize("preset", PRESETS)
def test_cifar_loss_terms_at_initialisation(preset):
    recipe = cifar_recipes[preset]
    terms = terms_at_start(recipe)
    assert list(terms) == ["fit", "l2", "orthogonality"]
    # The squares of plain filters are 2 / fan_in in the mean, 1,352 in all; batch normalisation
    # adds 7,392 scales of 1. The term deviates by 0.0015 between seeds.
    expected = 0.5 * 5e-4 * (1352 + (7392 if recipe.norm else 0))
    assert abs(terms["l2"] - expected) < 0.005
    if recipe.norm:
        assert 2.181 < terms["l2"] < 2.189
    # 0.00573 in the mean; the 27-dimensional root filters alone spread it by 4e-5.
    assert 0.0056 < terms["orthogonality"] < 0.0059
    # Uniform probabilities: -log(1 / 100 + 1e-4).
    assert abs(terms["fit"] - -math.log(0.0101)) < 1e-5


def test_imagenet_loss_terms_at_initialisation():
    terms = terms_at_start(OFFICIAL)
    assert abs(terms["l2"] - 0.4666) < 5e-4
    assert abs(terms["orthogonality"] - 0.00606) < 1e-4
    assert abs(terms["fit"] - -math.log(1e-3 + 1e-4)) < 1e-5
    smaller = terms_at_start(replace(OFFICIAL, block4=False))
    assert abs(smaller["l2"] - 0.364) < 5e-4


@pytest.mark.parametrize(
    ("recipe", "count"),
    [
        (cifar_recipes["tanh_cos"], 69),
        (cifar_recipes["linear_cos"], 69),
        (cifar_recipes["linear_sqcos_wo_bn"], 3),
        (OFFICIAL, 37),
    ],
    ids=["tanh_cos", "linear_cos", "wo_bn", "imagenet"],
)
def test_decay_takes_plain_filters_scales_and_offsets(recipe, count):
    with torch.device("meta"):
        network = build(recipe)
    decayed = {id(tensor) for tensor in l2_tensors(network)}
    assert len(decayed) == len(l2_tensors(network)) == count
    for layer in decoupled_layers(network):
        assert not decayed & {id(parameter) for parameter in layer.parameters()}
    for module in network.modules():
        if isinstance(module, nn.PReLU):
            assert id(module.weight) not in decayed


def test_terms_keep_float32_under_autocast_and_absent_ones_are_left_out():
    network = build(narrow(cifar_recipes["tanh_cos"]))
    labels = torch.tensor([1, 2])
    loss = cifar_recipes["tanh_cos"].loss
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.rand(2, 3, 32, 32))
        terms = loss_terms(network, logits, labels, loss)
    assert logits.dtype == torch.bfloat16
    plain = loss_terms(network, logits.float(), labels, loss)
    for name, term in terms.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, plain[name])
    torch.testing.assert_close(total(terms), terms["fit"] + terms["l2"] + terms["orthogonality"])
    assert list(loss_terms(network, logits, labels, Loss())) == ["fit"]


# Schedules and optimisers.


def test_official_learning_rates_fall_at_the_start_of_their_iterations():
    recipe = cifar_recipes["ball_cos"]
    for step, lr in (
        (0, 1e-3),
        (19_999, 1e-3),
        (20_000, 1e-4),
        (29_999, 1e-4),
        (30_000, 1e-5),
        (37_499, 1e-5),
        (37_500, 1e-6),
        (42_499, 1e-6),
    ):
        assert math.isclose(recipe.lr_at(step), lr, rel_tol=1e-12), step
    drops = ((199_999, 0.1), (200_000, 0.01), (375_000, 1e-3), (550_000, 1e-4), (700_000, 1e-4))
    for step, lr in drops:
        assert math.isclose(OFFICIAL.lr_at(step), lr, rel_tol=1e-12), step


def test_cosine_rises_then_falls_to_its_floor():
    schedule = Schedule(kind="cosine", warmup=4, floor=0.1)
    values = [schedule.at(step, 105) for step in range(105)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[4] == 1.0 and math.isclose(values[-1], 0.1)
    assert math.isclose(values[54], 0.55)
    assert all(a > b for a, b in pairwise(values[4:]))
    recipe = cifar_recipes["modern"]
    assert recipe.lr_at(recipe.steps - 1) < 1e-9 < recipe.lr_at(0) < recipe.lr_at(1)


def test_shorter_trainings_keep_the_shape():
    recipe = with_steps(cifar_recipes["tanh_cos"], 425)
    assert recipe.steps == 425 and recipe.schedule.drops == (200, 300, 375)
    modern = with_steps(cifar_recipes["modern"], 780)
    assert modern.schedule.warmup == round(780 / 40)
    assert modern.lr_at(779) < 1e-9
    # Drops that fall together count once, and none before iteration 1.
    assert with_steps(cifar_recipes["tanh_cos"], 1).schedule.drops == (1,)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, got 0"):
        with_steps(recipe, 0)


def test_official_adam_is_tensorflows():
    recipe = cifar_recipes["tanh_cos"]
    # Gradients around eps show where it is added.
    gradients = [torch.tensor([3e-8, -2e-9, 1.0], dtype=torch.float64) * k for k in (1, 2, -1, 5)]
    layer = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    w = layer.weight.detach().clone().flatten()
    optimizer = make_optimizer(layer, recipe.optimizer)
    m = v = torch.zeros(3, dtype=torch.float64)
    for step, gradient in enumerate(gradients):
        assert before_step(optimizer, recipe, step) == 1e-3
        layer.weight.grad = gradient[None].clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        lr = 1e-3 * (1 - 0.999 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1))
        w = w - lr * m / (v.sqrt() + 1e-8)
        torch.testing.assert_close(layer.weight.detach().flatten(), w, rtol=1e-12, atol=0)


def test_rate_reaches_every_group():
    recipe = with_steps(narrow(cifar_recipes["modern"]), 10)
    network = build(recipe)
    optimizer = start(network, recipe)
    assert len(optimizer.param_groups) == 2
    for step in (0, 5, 9):
        lr = before_step(optimizer, recipe, step)
        assert lr == recipe.lr_at(step)
        assert [group["lr"] for group in optimizer.param_groups] == [lr, lr]
        assert {group["eps"] for group in optimizer.param_groups if "eps" in group} == set()


@pytest.mark.parametrize("operator", ["tanh_cosine", "conv"])
def test_groups_decay_plain_filters_alone(operator):
    network = build(for_operator(narrow(cifar_recipes["modern"]), operator))
    decayed, rest = parameter_groups(network, 0.3)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    names = {parameter: name for name, parameter in network.named_parameters()}
    found = [names[p] for p in decayed["params"]]
    assert len(found) == (3 if operator == "tanh_cosine" else 34)
    assert all(p.dim() == 4 for p in decayed["params"])
    assert len(found) + len(rest["params"]) == len(names)


@pytest.mark.parametrize(
    ("kind", "cls"),
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)],
)
def test_optimisers_get_their_constants(kind, cls):
    settings = Optimizer(kind=kind, lr=0.2, betas=(0.8, 0.9), eps=1e-5, momentum=0.7, nesterov=True)
    built = make_optimizer(nn.Linear(2, 2), settings)
    assert type(built) is cls
    group = built.param_groups[0]
    assert group["lr"] == 0.2
    if kind == "sgd":
        assert group["momentum"] == 0.7 and group["nesterov"]
    else:
        assert group["betas"] == (0.8, 0.9) and group["eps"] == 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optimizer(kind="lion", lr=0.1), "optimizer must be one of adam, adamw, sgd"),
        (lambda: Optimizer(kind="sgd", lr=0.0), "lr must be a finite number above 0, got 0.0"),
        (lambda: Optimizer(kind="sgd", lr=1, momentum=1.0), r"betas and momentum must be in \["),
        (lambda: Optimizer(kind="sgd", lr=1, nesterov=True), "momentum must be above 0 with nes"),
        (lambda: Optimizer(kind="adam", lr=1, eps=-1.0), "eps must be a finite number of at"),
        (lambda: Schedule(kind="line"), "schedule must be one of steps, cosine, got 'line'"),
        (lambda: Schedule(drops=(5, 3)), r"drops must rise, got \(5, 3\)"),
        (lambda: Schedule(drops=(0,)), "drops must be an integer of at least 1, got 0"),
        (lambda: Schedule(warmup=-1), "warmup must be an integer of at least 0, got -1"),
        (lambda: Schedule(floor=-0.1), "floor must be a finite number of at least 0, got -0.1"),
        (lambda: Schedule(factor=0.0), "factor must be a finite number above 0, got 0.0"),
        (lambda: Loss(smoothing=1.0), "smoothing must be below 1, got 1.0"),
        (lambda: Loss(l2=-1.0), "l2 must be a finite number of at least 0, got -1.0"),
        (lambda: replace(OFFICIAL, steps=0), "steps must be an integer of at least 1, got 0"),
        (lambda: replace(OFFICIAL, log_every=0), "log_every must be an integer of at least 1"),
        (lambda: replace(OFFICIAL, save_every=-1), "save_every must be an integer of at least 0"),
        (lambda: replace(OFFICIAL, ema=1.0), r"ema must be in \[0, 1\), got 1.0"),
        (lambda: replace(OFFICIAL, amp="fp8"), "amp must be one of none, bf16, fp16, got 'fp8'"),
        (lambda: replace(OFFICIAL, network="vgg"), "network must be one of resnet32"),
        (lambda: replace(OFFICIAL, operator="tanh"), "operators must be conv or"),
        (
            lambda: replace(OFFICIAL, operator="tanh_cosine_linear_weighting"),
            "project_every must be 0 for operator 'tanh_cosine_linear_weighting', got 100",
        ),
        (
            lambda: replace(OFFICIAL, operator="conv", project_every=0),
            "orthogonality must be 0 for operator 'conv', got 1e-05",
        ),
        (
            lambda: replace(
                OFFICIAL, operator="conv", project_every=0, loss=Loss(), weighted_gradients=True
            ),
            "weighted_gradients must be False for operator 'conv', got True",
        ),
        (lambda: find_recipe(imagenet_recipes, "tanh_cos"), "preset must be one of official, mod"),
        (
            lambda: find_recipe(cifar_recipes, "table3/seg_sqcos_norelu"),
            r"preset must .* which --list shows, got .*did you mean 'table3/seg_sqcos_no_relu'",
        ),
    ],
)
def test_wrong_recipes_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^dcconv: {message}"):
        make()


def test_evaluations_and_checkpoints_may_be_left_to_the_end():
    recipe = replace(OFFICIAL, evaluate_every=0, save_every=0)
    assert (recipe.evaluate_every, recipe.save_every) == (0, 0)


def test_preset_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"preset must be one of .*, got int"):
        find_recipe(cifar_recipes, 3)


# What happens around steps.


def filter_norms(network) -> float:
    return max(
        float(x.weight.detach().square().sum((1, 2, 3)).max()) for x in decoupled_layers(network)
    )


def test_filters_are_projected_after_every_hundredth_iteration_but_the_first():
    recipe = narrow(cifar_recipes["tanh_cos"])
    network = build(recipe)
    for step in (0, 1, 99, 101, 150):
        after_step(network, recipe, step)
        assert filter_norms(network) > 1.1, step
    classifier = network.classifier.weight.detach().clone()
    expected = [
        x.weight.detach() / (x.weight.detach().square().sum((1, 2, 3), True) + 1e-4).sqrt()
        for x in decoupled_layers(network)
    ]
    after_step(network, recipe, 300)
    for layer, weight in zip(decoupled_layers(network), expected, strict=True):
        torch.testing.assert_close(layer.weight.detach(), weight)
    assert torch.equal(network.classifier.weight, classifier)


def test_weighted_operators_and_plain_convolution_are_never_projected():
    recipe = narrow(cifar_recipes["tanh_cos"])
    weighted = for_operator(recipe, "tanh_cosine_separate_weighting")
    assert weighted.project_every == 0 and weighted.loss == recipe.loss
    network = build(weighted)
    after_step(network, weighted, 100)
    assert filter_norms(network) > 1.1
    plain = for_operator(recipe, "conv")
    network = build(plain)
    after_step(network, plain, 100)
    terms = loss_terms(network, torch.zeros(1, 10), torch.tensor([0]), plain.loss)
    assert list(terms) == ["fit", "l2"]
    assert for_operator(recipe, "ball_linear").project_every == 100


def test_weighted_gradients_are_weighed_by_the_filters_norms():
    cell = paper_cells["table1/weighted_gradients"].recipe
    gradients = []
    for weighted in (False, True):
        recipe = replace(narrow(cell), weighted_gradients=weighted)
        torch.manual_seed(0)
        network = build(recipe)
        start(network, recipe)
        network(torch.rand(2, 3, 32, 32)).square().sum().backward()
        gradients.append([layer.weight.grad for layer in decoupled_layers(network)])
    for layer, plain, weighted in zip(decoupled_layers(network), *gradients, strict=True):
        norm = (layer.weight.detach().square().sum((1, 2, 3), True) + 1e-4).sqrt()
        torch.testing.assert_close(weighted, plain * norm)


def test_averaged_weights_follow_the_network():
    recipe = replace(narrow(cifar_recipes["modern"]), ema=0.75)
    network = build(recipe)
    average = average_of(network, recipe)
    assert average is not None
    weight = network.classifier.weight
    expected = None
    for step in range(3):
        with torch.no_grad():
            weight.add_(1.0)
            network.root[1].running_mean.fill_(step)
        after_step(network, recipe, step, average)
        new = weight.detach().clone()
        expected = new if expected is None else 0.75 * expected + 0.25 * new
    torch.testing.assert_close(average.classifier.weight, expected)
    # Moving statistics are averaged as well: 0, then a quarter of 1, then a quarter of 2.
    mean = average.root[1].running_mean
    torch.testing.assert_close(mean, torch.full_like(mean, 0.75 * 0.25 + 0.25 * 2))
    assert int(average.root[0].norm_mean_steps) == int(network.root[0].norm_mean_steps)
    assert average_of(network, replace(recipe, ema=0.0)) is None


@pytest.mark.parametrize("preset", [*PRESETS, "modern", "modern_adamw"])
def test_presets_train(preset):
    recipe = with_steps(narrow(cifar_recipes[preset]), 12)
    recipe = replace(recipe, project_every=5)
    network = build(recipe)
    optimizer = start(network, recipe)
    average = average_of(network, recipe)
    images, labels = torch.randn(20, 3, 16, 16), torch.arange(20) % 10
    fits = []
    for step in range(recipe.steps):
        before_step(optimizer, recipe, step)
        terms = loss_terms(network, network(images), labels, recipe.loss)
        optimizer.zero_grad()
        total(terms).backward()
        optimizer.step()
        after_step(network, recipe, step, average)
        fits.append(terms["fit"].item())
    assert fits[-1] < fits[0], fits


# The constants.


def test_official_cifar_constants():
    common = {
        "network": "resnet32",
        "classes": 100,
        "official": True,
        "project_every": 100,
        "weighted_gradients": False,
        "steps": 42_500,
        "batch_size": 128,
        "evaluate_every": 500,
        "evaluation_batch": 100,
        "save_every": 10_000,
        "log_every": 100,
        "ema": 0.0,
        "amp": "none",
        "channels_last": False,
        "compile": False,
        "widths": None,
    }
    operators = {
        "tanh_cos": ("tanh_cosine", True),
        "ball_cos": ("ball_cosine", True),
        "seg_cos": ("segmented_cosine", True),
        "linear_cos": ("linear_cosine", True),
        "linear_sqcos_wo_bn": ("linear_square_cosine", False),
    }
    for name, (operator, norm) in operators.items():
        recipe = cifar_recipes[name]
        assert recipe.name == name
        assert (recipe.operator, recipe.norm) == (operator, norm)
        assert {key: getattr(recipe, key) for key in common} == common
        assert recipe.loss == Loss(smoothing=0.01, offset=1e-4, l2=5e-4, orthogonality=1e-5)
        assert recipe.optimizer == Optimizer(
            kind="adam", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, tensorflow_eps=True
        )
        assert recipe.augment == CifarAugment(
            padding=4, mode="symmetric", flip=True, mean=(127.5,), std=(128.0,), cutout=0
        )


def test_official_imagenet_constants():
    assert OFFICIAL.network == "modified_resnet18" and OFFICIAL.block4
    assert (OFFICIAL.operator, OFFICIAL.norm, OFFICIAL.official) == ("tanh_cosine", True, True)
    assert OFFICIAL.loss == Loss(smoothing=0.01, offset=1e-4, l2=1e-4, orthogonality=1e-5)
    assert OFFICIAL.optimizer == Optimizer(kind="sgd", lr=0.1, momentum=0.9)
    assert (OFFICIAL.steps, OFFICIAL.batch_size, OFFICIAL.classes) == (700_001, 40, 1000)
    assert (OFFICIAL.evaluate_every, OFFICIAL.save_every) == (4_000, 100_000)
    assert (OFFICIAL.project_every, OFFICIAL.log_every) == (100, 500)
    assert OFFICIAL.augment == ImageNetAugment(official=True, size=224, resize=256)


def test_augmentation_settings_fit_the_data_pipeline():
    augment = pytest.importorskip("train.data.augment")
    for recipe in cifar_recipes.values():
        augment.Augment(**asdict(recipe.augment))


def test_modern_recipes_are_modern():
    for recipe in (cifar_recipes["modern"], imagenet_recipes["modern"]):
        assert recipe.optimizer.kind == "sgd" and recipe.optimizer.nesterov
        assert recipe.schedule.kind == "cosine" and recipe.schedule.warmup > 0
        assert recipe.amp == "bf16" and recipe.channels_last and recipe.compile
        assert recipe.ema > 0 and not recipe.official and not recipe.loss.l2
    assert cifar_recipes["modern_adamw"].optimizer.kind == "adamw"
    assert imagenet_recipes["modern_resnet18"].network == "resnet18"


@pytest.mark.parametrize(
    ("recipes", "options"), [(cifar_recipes, CifarOptions), (imagenet_recipes, ImageNetOptions)]
)
def test_recipes_survive_being_flat(recipes, options):
    for name, recipe in recipes.items():
        values = flat(recipe)
        again = unflat(type(recipe), values, name=name, classes=recipe.classes)
        assert again == recipe
        # The engine's options are the rest.
        names = {item.name for item in fields(options)}
        engine = {"steps", "evaluate_every", "save_every", "log_every", "amp"}
        assert values.keys() - names == engine | {"channels_last", "compile"}
        assert names <= values.keys()
        options(**{key: values[key] for key in names})


def test_flat_options_reach_their_place():
    values = flat(cifar_recipes["tanh_cos"]) | {
        "operator": "conv",
        "optimizer": "sgd",
        "schedule": "cosine",
        "lr_floor": 0.5,
        "log_offset": 0.25,
        "padding_mode": "zeros",
        "unrelated": 1,
    }
    recipe = unflat(type(cifar_recipes["tanh_cos"]), values, name="mine", classes=10)
    assert (recipe.name, recipe.classes, recipe.operator) == ("mine", 10, "conv")
    assert recipe.project_every == 0 and recipe.loss.orthogonality == 0.0
    assert recipe.optimizer.kind == "sgd" and recipe.schedule.kind == "cosine"
    assert recipe.schedule.floor == 0.5 and recipe.loss.offset == 0.25
    assert recipe.augment.mode == "zeros"
    with pytest.raises(ValueError, match=r"operators must be conv or .*, got 'cosine'"):
        unflat(type(recipe), values | {"operator": "cosine"}, name="mine", classes=10)


# The paper's tables.


def test_every_cell_of_the_tables_is_there():
    assert Counter(cell.table for cell in paper_cells.values()) == {1: 6, 2: 10, 3: 30}
    assert all(name == cell.name == cell.recipe.name for name, cell in paper_cells.items())
    assert all(name.startswith(f"table{cell.table}/") for name, cell in paper_cells.items())
    assert paper_cells.keys() <= cifar_recipes.keys()
    unconverged = [name for name, cell in paper_cells.items() if cell.error is None]
    assert unconverged == ["table2/linear_sqcos", "table2/seg_sqcos"]


@pytest.mark.parametrize(
    ("name", "operator", "norm", "error"),
    [
        ("table1/weight_projection", "tanh_cosine", True, "21.17"),
        ("table1/product_weighting", "tanh_cosine_product_weighting", True, "23.03"),
        ("table2/baseline", "conv", False, "35.30"),
        ("table2/tanh_linear", "tanh_linear", False, "32.88"),
        ("table2/seg_cos", "segmented_cosine", False, "30.34"),
        ("table3/baseline", "conv", True, "26.01"),
        ("table3/baseline_no_relu", "conv_no_activation", True, "58.24"),
        ("table3/ball_cos_no_relu", "ball_cosine_no_activation", True, "31.81"),
        ("table3/sphere_cos", "sphere_cosine", True, "26.00"),
        ("table3/linear_cos", "linear_cosine", True, "24.81"),
        (
            "table3/seg_sqcos_no_relu",
            "segmented_square_cosine_no_activation",
            True,
            "24.29",
        ),
        ("table3/mix_sqcos", "mix_square_cosine", True, "25.77"),
    ],
)
def test_cells_are_the_papers(name, operator, norm, error):
    cell = paper_cells[name]
    found = (cell.recipe.operator, cell.recipe.norm, f"{cell.error:.2f}")
    assert found == (operator, norm, error)
    assert find_recipe(cifar_recipes, name) is cell.recipe
    assert cell.recipe.network == ("resnet32" if cell.table == 1 else "cnn9")


def test_table1_differs_in_what_it_compares():
    rows = {name: cell.recipe for name, cell in paper_cells.items() if cell.table == 1}
    projected = [name for name, recipe in rows.items() if recipe.project_every]
    weighted = [name for name, recipe in rows.items() if recipe.weighted_gradients]
    assert projected == ["table1/weight_projection"]
    assert weighted == ["table1/weighted_gradients"]
    assert rows["table1/weight_projection"].project_every == 100


def test_every_recipe_builds_its_network():
    for recipe in (*cifar_recipes.values(), *imagenet_recipes.values()):
        with torch.device("meta"):
            network = build(recipe, sync_norm=True)
        layers = list(decoupled_layers(network))
        operator = recipe.convolution
        assert bool(layers) == (operator.magnitude is not None), recipe.name
        assert all(layer.sync_norm for layer in layers)
        assert {layer.weighting for layer in layers} <= {operator.weighting}
        starts = {layer.norm_init for layer in layers}
        assert starts <= {"zero" if recipe.official else "first"}, recipe.name
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        assert bool(norms) == recipe.norm, recipe.name
