"""The networks: sizes to the unit, where they convolve, pad, normalise and activate, and starts.

Parameter counts are those of spec 2.7 and 2.8.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from dcconv import DecoupledConv2d, backends, patch_norm
from dcconv.optim import decoupled_layers
from train.networks import (
    Features2d,
    build_network,
    estimate_statistics,
    find_operator,
    networks,
    small_network,
)
from train.networks.layers import OfficialBatchNorm2d, SameConv2d, SameMaxPool2d
from train.networks.pretrained import load_plain, start_from_plain
from train.networks.resnet18 import ResidualUnit
from train.networks.resnet32 import Unit


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this narrow lose more by a second thread than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


NARROW = {"resnet32": (4, 6, 8), "cnn9": (4, 6, 8), "modified_resnet18": (4, 6, 8, 8)}
NARROW["resnet18"] = (4, 6, 8, 8)


def meta(*arguments, **options) -> nn.Module:
    """Build a network without memory."""
    with torch.device("meta"):
        return build_network(*arguments, **options)


def narrow(name: str, operator: str, **options) -> nn.Module:
    return build_network(name, operator, 10, widths=NARROW[name], **options)


def size(network: nn.Module) -> tuple[int, int]:
    """Return the number of trainable parameters and tensors."""
    parameters = list(network.parameters())
    return sum(p.numel() for p in parameters), len(parameters)


def plain_convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}


@pytest.mark.parametrize(
    ("operator", "norm", "expected"),
    [
        ("linear_cosine", True, (16_736_736, 100)),
        ("linear_square_cosine", False, (16_721_952, 34)),
        ("ball_cosine", True, (16_743_552, 131)),
        ("segmented_cosine", True, (16_743_552, 131)),
        ("tanh_cosine", True, (16_743_552, 131)),
        ("conv", True, (16_736_736, 100)),
    ],
)
def test_resnet32_has_the_official_size(operator, norm, expected):
    assert size(meta("resnet32", operator, 100, norm=norm, official=True)) == expected


def test_resnet32_decouples_all_but_shortcuts_and_classifier():
    network = meta("resnet32", "tanh_cosine", 100)
    layers = list(decoupled_layers(network))
    assert len(layers) == 31
    assert {layer.kernel_size for layer in layers} == {(3, 3)}
    assert [layer.stride[0] for layer in layers].count(2) == 2
    widths = [layer.out_channels for layer in layers]
    assert widths == [96] * 11 + [192] * 10 + [384] * 10
    plain = plain_convolutions(network)
    assert list(plain) == ["blocks.1.0.shortcut.0", "blocks.2.0.shortcut.0", "classifier"]
    assert [layer.stride[0] for layer in plain.values()] == [2, 2, 1]
    assert not list(decoupled_layers(meta("resnet32", "conv", 100)))
    assert len(plain_convolutions(meta("resnet32", "conv", 100))) == 34


@pytest.mark.parametrize(
    ("block4", "expected", "decoupled"),
    [(True, (42_950_400, 84), 18), (False, (24_068_864, 75), 16)],
)
def test_modified_resnet18_has_the_official_size(block4, expected, decoupled):
    network = meta("modified_resnet18", "tanh_cosine", 1000, block4=block4)
    assert size(network) == expected
    layers = list(decoupled_layers(network))
    assert len(layers) == decoupled
    assert layers[0].kernel_size == (7, 7)
    assert [layer.stride[0] for layer in layers].count(2) == 4
    assert list(plain_convolutions(network)) == ["classifier"]


def test_standard_resnet18_is_the_usual_one():
    models = pytest.importorskip("torchvision.models")
    plain = build_network("resnet18", "conv", 10).eval()
    usual = models.resnet18(num_classes=10).eval()
    plain.load_state_dict(usual.state_dict(), strict=True)
    x = torch.randn(2, 3, 65, 64)
    torch.testing.assert_close(plain(x), usual(x))
    network = meta("resnet18", "tanh_cosine", 1000)
    assert len(list(decoupled_layers(network))) == 17
    assert len(plain_convolutions(network)) == 3
    # 11,689,512 is the usual network's; every decoupled filter adds its radius.
    filters = sum(layer.out_channels for layer in decoupled_layers(network))
    assert size(network)[0] == 11_689_512 + filters


def test_cnn9_has_ten_convolutions():
    network = meta("cnn9", "segmented_square_cosine_no_activation", 100)
    layers = list(decoupled_layers(network))
    assert [layer.out_channels for layer in layers] == [128] * 3 + [192] * 3 + [256] * 4
    assert [layer.kernel_size[0] for layer in layers] == [3] * 9 + [4]
    channels = [3, 128, 128, 128, 192, 192, 192, 256, 256]
    filters = [128] * 3 + [192] * 3 + [256] * 3
    weights = 9 * sum(c * k for c, k in zip(channels, filters, strict=True))
    weights += 16 * 256 * 256 + 256 * 100
    radii = sum(filters) + 256
    assert size(network)[0] == weights + 2 * sum(filters) + radii
    assert size(meta("cnn9", "conv", 100, norm=False))[0] == weights
    assert list(plain_convolutions(network)) == ["classifier"]


@pytest.mark.parametrize("name", networks)
@pytest.mark.parametrize("operator", ["conv", "tanh_cosine", "linear_square_cosine_no_activation"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "bare"])
def test_networks_have_exactly_the_layers_asked_for(name, operator, norm):
    network = narrow(name, operator, norm=norm)
    kinds = [type(module) for module in network.modules()]
    assert (nn.BatchNorm2d in kinds) == norm
    activations = kinds.count(nn.ReLU) + kinds.count(nn.PReLU)
    assert (activations > 0) == (not operator.endswith("_no_activation"))
    assert bool(list(decoupled_layers(network))) == (operator != "conv")
    images = torch.rand(2, 3, 32, 32)
    # Evaluation before training is finite, and every parameter takes part.
    assert bool(network.eval()(images).isfinite().all())
    network.train()(images).square().sum().backward()
    for parameter in network.parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())


@pytest.mark.parametrize("name", networks)
def test_plain_and_decoupled_networks_share_their_names(name):
    plain, network = narrow(name, "conv"), narrow(name, "tanh_cosine")
    own = ("radius_raw", "norm_mean", "norm_mean_steps")
    shared = {key: t.shape for key, t in network.state_dict().items() if not key.endswith(own)}
    assert shared == {key: t.shape for key, t in plain.state_dict().items()}
    network.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize("name", networks)
def test_official_statistics_are_slow_and_start_at_zero(name):
    network = narrow(name, "tanh_cosine", official=True, sync_norm=True)
    for layer in decoupled_layers(network):
        assert (layer.norm_init, layer.norm_momentum) == ("zero", 1e-3)
        assert layer.sync_norm and float(layer.norm_mean) == 0.0
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {type(norm) for norm in norms} == {OfficialBatchNorm2d}
    usual = narrow(name, "tanh_cosine")
    for layer in decoupled_layers(usual):
        assert (layer.norm_init, layer.norm_momentum) == ("first", 0.1)
        assert not layer.sync_norm
    norms = [m for m in usual.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(type(norm), norm.momentum, norm.eps) for norm in norms} == {
        (nn.BatchNorm2d, 0.1, 1e-5)
    }


def test_official_batch_normalisation_averages_the_biased_variance_from_zero():
    layer, usual = OfficialBatchNorm2d(3), nn.BatchNorm2d(3, eps=1e-3)
    assert float(layer.running_var.sum()) == 0.0
    x = torch.randn(2, 3, 2, 2) * 3 + 1
    torch.testing.assert_close(layer(x), usual(x))
    values = x.transpose(0, 1).flatten(1).double()
    mean, variance = values.mean(dim=1), values.var(dim=1, unbiased=False)
    torch.testing.assert_close(layer.running_mean.double(), 0.001 * mean)
    torch.testing.assert_close(layer.running_var.double(), 0.001 * variance)
    layer(x)
    torch.testing.assert_close(layer.running_var.double(), 0.001 * 1.999 * variance)
    assert int(layer.num_batches_tracked) == 2
    # Evaluation uses the averages.
    scale = (0.001 * 1.999 * variance + 1e-3).rsqrt().float()[:, None, None]
    offset = (0.001 * 1.999 * mean).float()[:, None, None]
    torch.testing.assert_close(layer.eval()(x), (x - offset) * scale)


@pytest.mark.parametrize(
    ("kernel", "size", "edges"),
    [(3, 8, (0, 1)), (3, 9, (1, 1)), (7, 16, (2, 3)), (1, 8, (0, 0))],
)
def test_plain_layers_pad_as_tensorflow_at_stride_two(kernel, size, edges):
    x = torch.randn(2, 3, size, size)
    layer = SameConv2d(3, 4, kernel, 2)
    padded = F.pad(x, (*edges, *edges))
    torch.testing.assert_close(layer(x), F.conv2d(padded, layer.weight, stride=2))
    # The decoupled layer pads alike: linear x cosine is a convolution with unit filters.
    decoupled = DecoupledConv2d(3, 4, kernel, 2, "same", magnitude="linear")
    unit = decoupled.weight / (decoupled.weight.square().sum((1, 2, 3), True) + 1e-4).sqrt()
    torch.testing.assert_close(decoupled(x), F.conv2d(padded, unit, stride=2))


def test_plain_layers_keep_no_padded_copy_at_stride_one():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    layer = SameConv2d(3, 4, 3)
    y = layer(x)
    torch.testing.assert_close(y, F.conv2d(x, layer.weight, padding=1))
    assert y.grad_fn._saved_input.data_ptr() == x.data_ptr()


def test_pool_pads_at_the_end_and_padding_never_wins():
    x = -torch.rand(1, 2, 8, 8) - 1
    y = SameMaxPool2d(3, 2)(x)
    assert y.shape == (1, 2, 4, 4)
    for row in range(4):
        for column in range(4):
            window = x[:, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            assert torch.equal(y[:, :, row, column], window.amax(dim=(2, 3)))


def seen(layer: nn.Module, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a layer receives and gives when the network runs."""
    found: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda _, given, y: found.append((given[0], y)))
    network(x)
    handle.remove()
    return found[0]


def test_resnet32_activates_inside_units_and_after_sums_but_not_after_the_root():
    network = narrow("resnet32", "conv").eval().requires_grad_(False)
    x = torch.randn(2, 3, 16, 16)
    assert float(seen(network.root, network, x)[1].min()) < 0
    units = [unit for unit in network.modules() if isinstance(unit, Unit)]
    assert len(units) == 15
    unit = units[5]
    given, y = seen(unit, network, x)
    inner = F.relu(unit.norm1(unit.conv1(given)))
    expected = F.relu(unit.norm2(unit.conv2(inner)) + unit.shortcut(given))
    torch.testing.assert_close(y, expected)
    assert y.shape == (2, 6, 8, 8)
    last = units[-1]
    features = seen(last, network, x)[1].mean(dim=(2, 3))
    expected = features @ network.classifier.weight.flatten(1).T
    torch.testing.assert_close(network(x), expected)


def test_modified_resnet18_adds_without_activation():
    network = narrow("modified_resnet18", "conv").eval().requires_grad_(False)
    x = torch.randn(2, 3, 64, 64)
    units = [unit for unit in network.modules() if isinstance(unit, ResidualUnit)]
    assert len(units) == 7
    units[0].activation.weight.fill_(0.25)
    given, y = seen(units[0], network, x)
    assert given.shape == (2, 4, 16, 16)
    inner = F.leaky_relu(units[0].norm1(units[0].conv1(given)), 0.25)
    torch.testing.assert_close(y, given + units[0].norm2(units[0].conv2(inner)))
    slopes = [module for module in network.modules() if isinstance(module, nn.PReLU)]
    assert len(slopes) == 11
    assert all(float(module.weight.abs().sum()) == 0 for module in slopes[2:])


def test_initialisers_are_the_official_ones():
    wide = build_network("resnet32", "tanh_cosine", 100, widths=(32, 64, 128))
    wide.requires_grad_(False)
    for layer in (*decoupled_layers(wide), *plain_convolutions(wide).values()):
        fan_in = layer.weight[0].numel()
        expected = (2.0 / fan_in) ** 0.5
        spread = 5 * expected / (2 * layer.weight.numel()) ** 0.5
        assert abs(float(layer.weight.std()) - expected) < spread
    modified = build_network("modified_resnet18", "tanh_cosine", 100, widths=(32, 32, 64, 64))
    modified.requires_grad_(False)
    inside = {
        id(layer)
        for unit in modified.modules()
        if isinstance(unit, ResidualUnit)
        for layer in decoupled_layers(unit)
    }
    assert len(inside) == 14
    for layer in (*decoupled_layers(modified), *plain_convolutions(modified).values()):
        weight = layer.weight
        if id(layer) in inside:
            spread = 5 * 0.01 / (2 * weight.numel()) ** 0.5
            assert abs(float(weight.std()) - 0.01) < spread
            continue
        area = weight[0, 0].numel()
        bound = (6.0 / (area * (weight.shape[0] + weight.shape[1]))) ** 0.5
        assert 0.98 * bound < float(weight.abs().max()) <= bound


def test_features_are_two_and_bounded_for_bounded_operators():
    x = torch.randn(16, 1, 8, 8)
    for operator in ("conv", "sphere_cosine", "ball_cosine", "tanh_cosine", "linear_cosine"):
        network = Features2d(find_operator(operator), 8, 10)
        with torch.no_grad():
            for layer in decoupled_layers(network):
                layer.weight.mul_(20)
        plane = network.features(x)
        assert plane.shape == (16, 2)
        bounded = operator in ("sphere_cosine", "ball_cosine", "tanh_cosine")
        if bounded:
            assert float(plane.detach().abs().max()) <= 1.0
        torch.testing.assert_close(network(x), plane @ network.classifier.weight.T)
        assert len(list(decoupled_layers(network))) == (0 if operator == "conv" else 4)


def test_images_of_another_size_are_refused():
    network = narrow("cnn9", "conv")
    message = r"^dcconv: images must have 32 x 32 pixels, got 40 x 32$"
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(1, 3, 40, 32))
    assert narrow("cnn9", "tanh_cosine", image_size=20)(torch.zeros(2, 3, 20, 20)).shape == (2, 10)
    features = Features2d(find_operator("conv"), 8, 10)
    with pytest.raises(ValueError, match=r"^dcconv: images must have 8 x 8 pixels, got 9 x 9$"):
        features(torch.zeros(1, 1, 9, 9))


def test_mix_adds_equal_shares():
    for operator, beta in (("mix_cosine", 1.0), ("segmented_cosine", 0.5)):
        assert find_operator(operator).conv2d(3, 4).beta == beta


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet33"}, "network must be one of resnet32, cnn9, .*, got 'resnet33'"),
        ({"operator": "tanh"}, r"operators must be conv or .*, got 'tanh'"),
        ({"classes": 0}, "classes must be an integer of at least 1, got 0"),
        ({"widths": (4, 4)}, r"widths must be 3 numbers for network 'resnet32', got \(4, 4\)"),
        ({"widths": (4, 4, 0)}, "widths must be an integer of at least 1, got 0"),
        ({"block4": False}, "block4 must be left out for network 'resnet32', got False"),
        ({"image_size": 32}, "image_size must be left out for network 'resnet32', got 32"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    arguments = {"name": "resnet32", "operator": "conv", "classes": 10} | options
    with pytest.raises(ValueError, match=f"^dcconv: {message}"):
        build_network(**arguments)


def test_statistics_are_means_over_the_batches():
    network = small_network(find_operator("tanh_cosine"), 8, 10, widths=(4, 4, 4))
    network.train()
    network(torch.rand(4, 1, 8, 8) * 100)
    network.eval()
    network[1].train()
    batches = [torch.rand(n, 1, 8, 8) for n in (8, 16, 4)]
    assert estimate_statistics(network, batches) == 3
    assert network[1].training and not network.training and not network[0].training
    assert network[0].norm_momentum == 0.1 and network[1].momentum == 0.1
    norms = [patch_norm(x, 3, padding=1).mean() for x in batches]
    torch.testing.assert_close(network[0].norm_mean, torch.stack(norms).mean())
    network[0].train()
    outputs = [network[0](x).transpose(0, 1).flatten(1) for x in batches]
    means = torch.stack([y.mean(dim=1) for y in outputs]).mean(dim=0)
    variances = torch.stack([y.var(dim=1) for y in outputs]).mean(dim=0)
    torch.testing.assert_close(network[1].running_mean, means)
    torch.testing.assert_close(network[1].running_var, variances)
    with pytest.raises(ValueError, match="batches must hold at least one batch of images"):
        estimate_statistics(network, [])


def test_failure_while_estimating_restores_momenta_and_modes():
    network = narrow("cnn9", "tanh_cosine").eval()
    with pytest.raises(ValueError, match="weight"):
        estimate_statistics(network, [torch.rand(2, 3, 32, 32), torch.rand(2, 4, 32, 32)])
    assert not any(module.training for module in network.modules())
    assert {layer.norm_momentum for layer in decoupled_layers(network)} == {0.1}
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.1}


def trained_plain(name: str = "cnn9") -> nn.Module:
    """Return a plain network with affine parameters and statistics unlike their start."""
    plain = narrow(name, "conv")
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.fill_(7.0)
    return plain


@pytest.mark.parametrize("official", [False, True], ids=["usual", "official"])
def test_converted_network_has_projected_filters_and_new_statistics(official):
    plain = trained_plain()
    network = narrow("cnn9", "tanh_cosine", official=official)
    batches = [torch.rand(n, 3, 32, 32) for n in (8, 4)]
    with torch.no_grad():
        next(decoupled_layers(network)).radius_raw.fill_(3.0)
    assert start_from_plain(network, plain.state_dict(), batches) == 2
    tensors = plain.state_dict()
    names = {layer: name for name, layer in network.named_modules()}
    for layer in decoupled_layers(network):
        w = tensors[f"{names[layer]}.weight"]
        torch.testing.assert_close(
            layer.weight.detach(), w / (w.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-4).sqrt()
        )
        assert float(layer.norm_mean_steps) > 0
        assert torch.equal(layer.radius_raw.detach(), torch.ones(layer.out_channels))
    assert torch.equal(network.classifier.weight, plain.classifier.weight)
    first, norm = network.stages[0][0], network.stages[0][1]
    assert torch.equal(norm.weight, plain.stages[0][1].weight)
    assert torch.equal(norm.bias, plain.stages[0][1].bias)
    means = torch.stack([patch_norm(x, 3, padding=1).mean() for x in batches])
    torch.testing.assert_close(first.norm_mean, means.mean())
    outputs = [first.train()(x).transpose(0, 1).flatten(1) for x in batches]
    expected = torch.stack([y.mean(dim=1) for y in outputs]).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, expected)
    unbiased = [y.var(dim=1, unbiased=not official) for y in outputs]
    torch.testing.assert_close(norm.running_var, torch.stack(unbiased).mean(dim=0))


def test_conversion_leaves_weighted_filters_and_what_it_is_told_to_leave():
    plain = trained_plain()
    network = build_network("cnn9", "tanh_cosine_linear_weighting", 7, widths=NARROW["cnn9"])
    classifier = network.classifier.weight.detach().clone()
    start_from_plain(
        network, plain.state_dict(), [torch.rand(4, 3, 32, 32)], leave=("classifier.",)
    )
    assert torch.equal(network.classifier.weight, classifier)
    assert torch.equal(network.features.weight, plain.features.weight)


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


def test_conversion_refuses_what_does_not_fit_and_changes_nothing():
    network = narrow("cnn9", "tanh_cosine")
    state = trained_plain().state_dict()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images = [torch.rand(2, 3, 32, 32)]
    other = build_network("cnn9", "conv", 10, widths=(5, 6, 8)).state_dict()
    name = "stages.0.0.weight"
    for wrong, message in (
        (other, f"hold '{name}' of shape [4, 3, 3, 3], got [5, 3, 3, 3]"),
        (without(state, name), f"hold '{name}' of shape [4, 3, 3, 3], got none"),
        (
            state | {"extra": torch.zeros(1)},
            "hold tensors that the network has, and no other, got 'extra'",
        ),
    ):
        with pytest.raises(ValueError, match="pretrained must") as caught:
            start_from_plain(network, wrong, images)
        assert str(caught.value) == f"dcconv: pretrained must {message}"
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        start_from_plain(network, state, [])
    with pytest.raises(ValueError, match="network must have a DecoupledConv2d layer"):
        start_from_plain(narrow("cnn9", "conv"), state, images)
    with pytest.raises(TypeError, match="leave must be a tuple of names' beginnings, got str"):
        start_from_plain(network, state, images, leave="classifier")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_checkpoints_are_read_in_every_form(tmp_path):
    state = trained_plain().state_dict()
    save_file(state, tmp_path / "plain.safetensors")
    forms = {
        "state.pt": state,
        "nested.pt": {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
        "run.pt": {"step": 3, "task": {"network": {f"_orig_mod.{k}": v for k, v in state.items()}}},
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
    for name in ("plain.safetensors", *forms):
        read = load_plain(tmp_path / name)
        assert read.keys() == state.keys(), name
        assert all(torch.equal(read[key], state[key]) for key in state), name


REBUILT: list[str] = []


def rebuild() -> None:
    REBUILT.append("rebuilt")


class Foreign:
    """Something whose file asks for a function to be called."""

    def __reduce__(self):
        return rebuild, ()


@pytest.mark.parametrize(
    "name", ["missing.pt", "cut.pt", "cut.safetensors", "empty.pt", "foreign.pt", "list.pt", "n.pt"]
)
def test_unreadable_checkpoints_give_one_sentence(name, tmp_path):
    path = tmp_path / name
    if name == "cut.pt":
        torch.save({"a": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:1500])
    elif name == "cut.safetensors":
        save_file({"a": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:1500])
    elif name == "empty.pt":
        path.write_bytes(b"")
    elif name == "foreign.pt":
        torch.save({"a": Foreign()}, path)
        torch.load(path, weights_only=False)
        assert REBUILT.pop() == "rebuilt"
    elif name == "list.pt":
        torch.save([torch.zeros(1)], path)
    elif name == "n.pt":
        torch.save({"a": 3}, path)
    with pytest.raises(ValueError, match="pretrained must be a file of a network's tensors") as e:
        load_plain(path)
    assert str(e.value).startswith("dcconv: ") and "\n" not in str(e.value)
    assert str(path) in str(e.value)
    assert not REBUILT


@pytest.mark.parametrize("name", networks)
def test_backends_agree_on_a_whole_network(name):
    """The compiled kernels give what the plain PyTorch specification gives."""
    network = narrow(name, "segmented_square_cosine").double()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with backends.use_backend("reference"):
        expected = network(x)
    torch.testing.assert_close(network(x), expected)
