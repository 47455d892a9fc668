"""Tables 1 to 3 of the paper: every cell as a recipe, with the error that the paper reports.

The paper's own training details are not all known. All cells take the official CIFAR-100 recipe;
Table 1 takes ResNet-32, which its level of error fits, and the tables of CNN-9 its wide form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from train.recipes.official import official_cifar
from train.recipes.recipe import CifarRecipe, for_operator


@dataclass(frozen=True)
class Cell:
    """One result of the paper.

    ``error`` is the CIFAR-100 test error in %, None where the paper's training did not converge.
    """

    recipe: CifarRecipe
    table: int
    method: str
    error: float | None

    @property
    def name(self) -> str:
        """What ``--preset`` calls it."""
        return self.recipe.name


MAGNITUDES = {
    "sphere": "sphere",
    "ball": "ball",
    "tanh": "tanh",
    "linear": "linear",
    "seg": "segmented",
    "log": "log",
    "mix": "mix",
}
TITLES = {
    "sphere": "SphereConv",
    "ball": "BallConv",
    "tanh": "TanhConv",
    "linear": "LinearConv",
    "seg": "SegConv",
    "log": "LogConv",
    "mix": "MixConv",
}
ANGLES = {"linear": "linear", "cos": "cosine", "sqcos": "square_cosine"}
ANGLE_TITLES = {"linear": "linear", "cos": "cosine", "sqcos": "square cosine"}

# Table 1: TanhConv, cosine. Name: method, operator, projected, weighted gradients, error.
_TABLE1 = {
    "linear_weighting": (
        "linearly weighted",
        "tanh_cosine_linear_weighting",
        False,
        False,
        22.95,
    ),
    "product_weighting": (
        "nonlinearly weighted (Eq. 15)",
        "tanh_cosine_product_weighting",
        False,
        False,
        23.03,
    ),
    "separate_weighting": (
        "nonlinearly weighted (Eq. 16)",
        "tanh_cosine_separate_weighting",
        False,
        False,
        23.38,
    ),
    "standard_gradients": ("standard gradients", "tanh_cosine", False, False, 23.09),
    "weight_projection": ("weight projection", "tanh_cosine", True, False, 21.17),
    "weighted_gradients": ("weighted gradients", "tanh_cosine", False, True, 21.45),
}

# Table 2: CNN-9 without batch normalisation. Errors by angle: linear, cos, sqcos.
_TABLE2: dict[str, tuple[float | None, float | None, float | None]] = {
    "linear": (33.39, 31.76, None),
    "tanh": (32.88, 31.88, 34.26),
    "seg": (34.69, 30.34, None),
}
_TABLE2_BASELINE = 35.30

# Table 3: CNN-9 with batch normalisation. Errors: cos and sqcos without ReLU, then with.
_TABLE3 = {
    "sphere": (33.31, 25.90, 26.00, 26.97),
    "ball": (31.81, 25.43, 25.18, 26.48),
    "tanh": (32.27, 25.27, 25.15, 26.94),
    "linear": (36.49, 24.36, 24.81, 25.14),
    "seg": (33.57, 24.29, 24.96, 25.04),
    "log": (33.62, 24.91, 25.17, 25.85),
    "mix": (33.46, 24.93, 25.27, 25.77),
}
_TABLE3_BASELINE = (58.24, 26.01)


def _cnn9(name: str, operator: str, norm: bool) -> CifarRecipe:
    decoupled = official_cifar(name, "tanh_cosine", network="cnn9", norm=norm)
    return for_operator(decoupled, operator)


def _table1() -> Iterator[Cell]:
    for name, (method, operator, projected, weighted, error) in _TABLE1.items():
        recipe = for_operator(official_cifar(f"table1/{name}", "tanh_cosine"), operator)
        recipe = replace(recipe, project_every=100 if projected else 0, weighted_gradients=weighted)
        yield Cell(recipe, 1, f"TanhConv, {method}", error)


def _table2() -> Iterator[Cell]:
    baseline = _cnn9("table2/baseline", "conv", norm=False)
    yield Cell(baseline, 2, "CNN without BN", _TABLE2_BASELINE)
    for magnitude, errors in _TABLE2.items():
        for angle, error in zip(("linear", "cos", "sqcos"), errors, strict=True):
            operator = f"{MAGNITUDES[magnitude]}_{ANGLES[angle]}"
            recipe = _cnn9(f"table2/{magnitude}_{angle}", operator, norm=False)
            method = f"{TITLES[magnitude]}, {ANGLE_TITLES[angle]}, without BN"
            yield Cell(recipe, 2, method, error)


def _table3() -> Iterator[Cell]:
    for suffix, note, error in zip(
        ("_no_relu", ""), (", without ReLU", ""), _TABLE3_BASELINE, strict=True
    ):
        operator = "conv_no_activation" if suffix else "conv"
        recipe = _cnn9(f"table3/baseline{suffix}", operator, norm=True)
        yield Cell(recipe, 3, f"CNN{note}", error)
    for magnitude, errors in _TABLE3.items():
        columns = [(angle, bare) for bare in (True, False) for angle in ("cos", "sqcos")]
        for (angle, bare), error in zip(columns, errors, strict=True):
            operator = f"{MAGNITUDES[magnitude]}_{ANGLES[angle]}" + "_no_activation" * bare
            name = f"table3/{magnitude}_{angle}" + "_no_relu" * bare
            method = f"{TITLES[magnitude]}, {ANGLE_TITLES[angle]}" + ", without ReLU" * bare
            yield Cell(_cnn9(name, operator, norm=True), 3, method, error)


#: Every cell of Tables 1 to 3 by its preset's name.
paper_cells: dict[str, Cell] = {cell.name: cell for cell in (*_table1(), *_table2(), *_table3())}
