"""The features of the digits in the plane: what is drawn, from which layer, and by which run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from train import features
from train.data.digits import load_split
from train.engine.config import parse
from train.networks import Features2d, find_operator


@pytest.fixture(autouse=True)
def same_threads():
    """A run sets the number of threads of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Arguments of a run of one epoch of a few images."""
    few = ["--epochs", "1", "--test-share", "0.9", "--widths", "4", "4"]
    return [*few, "--out", str(tmp_path), "--backend", "reference"]


def only_run(parent: Path) -> Path:
    (folder,) = parent.iterdir()
    return folder


def pixels(png: bytes) -> np.ndarray:
    """Return [h, w, 3] from 0 to 1."""
    return matplotlib.image.imread(io.BytesIO(png))[..., :3]


def make_plane(bound: float | None = None, seed: int = 0) -> features.Plane:
    generator = np.random.default_rng(seed)
    angles = 2 * np.pi * np.arange(10) / 10
    weights = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    classes = np.arange(200) % 10
    points = 0.6 * weights[classes] + 0.02 * generator.normal(size=(200, 2))
    operator = "conv" if bound is None else "sphere_cosine"
    return features.Plane(operator, 0, points, classes, weights, 97.5, bound)


def test_run_stores_a_figure_per_training_and_the_panel(tmp_path, tiny, capsys):
    arguments = [*tiny, "--operators", "conv", "tanh_cosine", "--seeds", "0", "7"]
    assert features.main(arguments) == 0
    folder = only_run(tmp_path)
    assert folder.name.endswith("_features")
    names = {f"{operator}_seed{seed}" for operator in ("conv", "tanh_cosine") for seed in (0, 7)}
    assert {file.name for file in folder.iterdir()} == {
        "config.yaml",
        "curves.png",
        "environment.json",
        "epochs.jsonl",
        "features.png",
        "results.json",
        "source",
        "trainings",
        *(f"{name}.png" for name in names),
    }
    assert {file.name for file in (folder / "trainings").iterdir()} == names
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["seeds"] == [0, 7] and config["classifier_lr"] == 0.1
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "finished" and results["finished_trainings"] == 4
    single = pixels((folder / "conv_seed0.png").read_bytes())
    panel = pixels((folder / "features.png").read_bytes())
    assert panel.shape[0] > 1.7 * single.shape[0] and panel.shape[1] > 1.7 * single.shape[1]
    assert str(folder) in capsys.readouterr().out


def test_plane_is_that_of_the_trained_network(tmp_path, tiny):
    arguments = [*tiny, "--operators", "conv", "sphere_cosine"]
    config = parse(features.FeatureConfig, arguments, program="test", description="")
    run = features.FeatureRun(config, Console(quiet=True))
    assert run.start() == 0
    for operator in ("conv", "sphere_cosine"):
        plane = run.plane(operator, 0)
        assert plane.accuracy == pytest.approx(run.rows[operator].accuracies[0])
        split = load_split(0, 0.9)
        assert plane.features.shape == (len(split.test_images), 2)
        assert np.array_equal(plane.classes, split.test_classes.numpy())
        # The classifier sees these features and nothing else.
        named = (plane.features @ plane.weights.T).argmax(axis=1)
        assert 100 * (named == plane.classes).mean() == pytest.approx(plane.accuracy)
        untrained = run.network(operator)
        assert not np.allclose(plane.weights, untrained.classifier.weight.detach().numpy())
    assert plane.bound == 1.0 and np.abs(plane.features).max() <= 1.0
    assert run.plane("conv", 0).bound is None


def test_features_are_what_the_classifier_reads():
    torch.manual_seed(0)
    network = Features2d(find_operator("ball_cosine"), 8, 10, (4, 4))
    images, classes = torch.rand(30, 1, 8, 8), torch.arange(30) % 10
    read: list[torch.Tensor] = []
    network.classifier.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    plane = features.plane_of(network, "ball_cosine", 0, images, classes)
    assert not network.training
    assert np.array_equal(plane.features, read[0].numpy())
    right = (network(images).argmax(dim=1) == classes).double().mean()
    assert plane.accuracy == pytest.approx(100 * float(right))


@pytest.mark.parametrize(
    ("operator", "bound"),
    [
        ("conv", None),
        ("linear_cosine", None),
        ("log_cosine", None),
        ("sphere_sigmoid", 1.0),
        ("ball_cosine", 1.0),
        ("tanh_square_cosine", 1.0),
        ("tanh_cosine_linear_weighting", None),
    ],
)
def test_bound_holds_where_it_is_drawn(operator, bound):
    torch.manual_seed(0)
    layer = find_operator(operator).conv2d(3, 2, kernel=5, padding=0)
    assert features.bound_of(layer) == bound
    with torch.no_grad():
        if getattr(layer, "norm_mean", None) is not None:
            layer.norm_mean.fill_(1e-3)
        layer.weight.mul_(100.0)
        y = layer.eval()(1e3 * torch.randn(64, 3, 5, 5))
    assert (float(y.abs().max()) <= 1.0 + 1e-5) == (bound is not None)


def test_classifier_has_its_own_learning_rate(tmp_path, tiny):
    arguments = [*tiny, "--classifier-lr", "0.7", "--lr", "0.02"]
    config = parse(features.FeatureConfig, arguments, program="test", description="")
    run = features.FeatureRun(config, Console(quiet=True))
    task = run.task("tanh_cosine", 0)
    assert task.schedule.base_lrs == pytest.approx([0.02 / 25, 0.7 / 25])
    rest, classifier = (group["params"] for group in task.optimizer.param_groups)
    assert [id(p) for p in classifier] == [id(task.network.classifier.weight)]
    assert {id(p) for p in (*rest, *classifier)} == {id(p) for p in task.network.parameters()}


def test_same_seed_draws_the_same(tmp_path, tiny):
    figures = []
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        arguments = [*tiny, "--operators", "sphere_cosine", "--seeds", seed, "--threads", "1"]
        assert features.main([*arguments, "--out", str(tmp_path / out)]) == 0
        figures.append((only_run(tmp_path / out) / "features.png").read_bytes())
    assert figures[0] == figures[1] != figures[2]


def test_figure_shows_every_class_and_its_weights():
    plane = make_plane()
    (axes,) = features.figure_of([plane], 1).axes
    assert axes.get_aspect() == 1.0 and axes.get_xlim() == axes.get_ylim()
    assert axes.get_title() == "nn.Conv2d: 97.5 % of test images right"
    assert len(axes.collections) == len(axes.lines) == len(axes.texts) == 10
    colours = set()
    drawn = zip(axes.collections, axes.lines, axes.texts, strict=True)
    for kind, (points, line, text) in enumerate(drawn):
        mine = plane.features[plane.classes == kind]
        assert np.array_equal(np.asarray(points.get_offsets()), mine)
        assert points.get_label() == text.get_text() == str(kind)
        (start_x, end_x), (start_y, end_y) = line.get_data()
        assert start_x == start_y == 0.0
        length = np.hypot(end_x, end_y)
        assert np.array((end_x, end_y)) == pytest.approx(length * plane.weights[kind])
        assert length > np.hypot(*mine.T).max()
        assert line.get_color() == text.get_color()
        colours.add(line.get_color())
        limit = axes.get_xlim()[1]
        assert np.abs(text.xy).max() < limit and np.abs(mine).max() < limit
    assert len(colours) == 10


def test_figure_draws_the_bound_only_where_there_is_one():
    free, bounded = features.figure_of([make_plane(), make_plane(0.9)], 2).axes
    assert not free.patches
    (box,) = bounded.patches
    assert box.get_bbox().extents.tolist() == pytest.approx([-0.9, -0.9, 0.9, 0.9])
    assert bounded.get_xlim()[1] > 0.9


def test_picture_is_not_blank_and_small():
    png = features.draw([make_plane()], 1)
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) < 200_000
    image = pixels(png)
    assert image.shape[0] > 300 and image.shape[1] > 300
    # Colour, besides black and grey, in the middle, where the axes are.
    middle = image[image.shape[0] // 5 : image.shape[0] // 2]
    assert (middle.max(axis=-1) - middle.min(axis=-1) > 0.3).sum() > 200


def test_figure_takes_features_and_weights_of_zero():
    plane = make_plane()
    nothing = plane._replace(features=np.zeros((200, 2)), weights=np.zeros((10, 2)))
    (axes,) = features.figure_of([nothing], 1).axes
    assert axes.get_xlim()[1] > 0
    assert features.draw([nothing], 1).startswith(b"\x89PNG\r\n\x1a\n")


def test_odd_number_of_planes_leaves_a_gap():
    axes = features.figure_of([make_plane()] * 3, 2).axes
    assert [a.axison for a in axes] == [True, True, True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operators", "tahn_cosine"], "(did you mean 'tanh_cosine'?)"),
        (["--operators", "sphere"], "dcconv: operators must be conv or <magnitude>_<angular>"),
        (["--classifier-lr", "0"], "dcconv: classifier_lr must be a finite number above 0, got 0"),
        (["--epochs", "0"], "dcconv: epochs must be an integer of at least 1, got 0"),
        (["--seed", "0"], "dcconv: flags must be known, got '--seed' (did you mean '--seeds'?)"),
    ],
)
def test_wrong_argument_ends_with_the_house_sentence(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        features.main([*arguments, "--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_run_of_the_digits_command_is_not_resumed(tmp_path, tiny, capsys):
    assert features.main([*tiny, "--operators", "conv"]) == 0
    folder = only_run(tmp_path)
    figure = folder / "features.png"
    before = figure.read_bytes()
    figure.unlink()
    # A finished run is drawn anew, without training.
    assert features.main(["--resume", str(folder)]) == 0
    assert figure.read_bytes() == before
    path = folder / "environment.json"
    environment = json.loads(path.read_text()) | {"command": "python -m train.digits"}
    path.write_text(json.dumps(environment))
    assert features.main(["--resume", str(folder)]) == 2
    assert "be the folder of a run of python -m train.features" in capsys.readouterr().err
