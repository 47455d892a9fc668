"""What a robustness run is made of: options, and the attacks that they describe."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

from dcconv.operator import checks
from train.engine.config import EngineOptions, close_match, option
from train.networks import find_operator
from train.recipes import Optimizer, Schedule
from train.robustness import attacks
from train.robustness.attacks import Attack

DATASETS: dict[str, tuple[str, ...]] = {
    "digits": ("small",),
    "cifar10": ("cnn9", "resnet32"),
}
#: How networks are trained, with what it is called in a table; all but the first are adversarial.
TRAININGS = {"natural": "natural", "fgsm": "FGSM", "pgd": "PGD"}

#: What ``--preset`` sets.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "dataset": "digits",
        "network": "small",
        "epsilon": "0.15",
        "steps": 224,
        "batch_size": 64,
        "optimizer": "adamw",
        "lr": 3e-3,
        "weight_decay": 1e-2,
        "warmup": 56,
        # Images of 8 x 8 pixels hardly gain from a second thread, and lose much beside other work.
        "threads": 1,
    },
    "cifar10": {
        "dataset": "cifar10",
        "network": "cnn9",
        "epsilon": "8/255",
        "steps": 40 * 390,
        "batch_size": 128,
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 5e-4,
        "warmup": 390,
        "save_every": 5 * 390,
        "evaluate_every": 5 * 390,
    },
}


def fraction(argument: str, text: str) -> float:
    """Return a share of the range of pixels, written as a number or as a fraction.

    Raises:
        ValueError: it is neither, or not from 0 to 1.

    Example:
        >>> fraction("epsilon", "51/255")
        0.2
    """
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(-1)
    if not 0 <= value <= 1:
        rule = "be a number from 0 to 1 or a fraction such as 8/255"
        raise checks.value_error(argument, rule, repr(text))
    return float(value)


def _several(argument: str, values: tuple[str, ...]) -> None:
    if not values or len(set(values)) != len(values):
        got = " ".join(values) or "none"
        raise checks.value_error(argument, "be one or more, each once", got)


def _known(argument: str, value: str, known: Any) -> None:
    if value not in known:
        rule = f"be one of {', '.join(known)}"
        raise checks.value_error(argument, rule, repr(value) + close_match(value, known))


@dataclass(frozen=True, kw_only=True)
class RobustnessRun(EngineOptions):
    """Everything a robustness run is made of; a preset gives what is not named.

    Bounds and step sizes are shares of the range of pixels. The networks see pixels from 0 to 1
    and normalise them themselves.
    """

    # They add networks, or change none.
    free: ClassVar[frozenset[str]] = frozenset(
        {
            *("operators", "trainings", "repeats", "attacks", "black_box", "device", "threads"),
            *("data", "verify", "attack_batch", "out", "name", "folder", "resume", "log_every"),
            *("keep_last", "save_every", "evaluate_every", "histogram_every"),
        }
    )

    preset: str = option("digits", f"base of the options: {', '.join(PRESETS)}")
    dataset: Literal["digits", "cifar10"] = option("digits", "images: digits or cifar10")
    data: str = option("data", "folder with the official CIFAR-10 archive; digits need none")
    verify: bool = option(True, "require the official files, by checksum")
    network: str = option("small", "small for digits; cnn9 or resnet32 for cifar10")
    operators: tuple[str, ...] = option(
        ("conv", "sphere_cosine", "ball_cosine", "tanh_cosine"), "columns of the tables"
    )
    trainings: tuple[str, ...] = option(
        ("natural", "fgsm"), f"blocks of the tables: {', '.join(TRAININGS)}"
    )
    repeats: int = option(3, "trainings of every network, with seeds from --seed on")
    attacks: tuple[str, ...] = option(("fgsm", "bim", "pgd"), "rows of the tables")
    epsilon: str = option("0.15", "largest change of a pixel, such as 8/255 or 0.15")
    step_size: str | None = option(
        None, "change of a pixel in a step of BIM and PGD (default: a quarter of epsilon)"
    )
    bim_steps: int = option(10, "steps of BIM")
    pgd_steps: int = option(20, "steps of PGD")
    restarts: int = option(5, "random starts of PGD; the worst counts")
    training_steps: int = option(7, "steps of PGD in adversarial training, from one start")
    adversarial_share: float = option(
        0.5, "weight of adversarial images in the loss of adversarial training"
    )
    black_box: bool = option(True, "also attack with images made on a substitute network")
    substitute: str = option("conv", "operator of the substitute, trained naturally")
    images: int = option(0, "test images that are attacked; 0: all")
    attack_batch: int = option(500, "test images at a time")
    batch_size: int = option(64, "training images of a step")
    shift: int = option(1, "largest random shift of a training image of digits, pixels")
    test_share: float = option(0.5, "share of the digits held out, drawn anew for every seed")
    optimizer: Literal["adam", "adamw", "sgd"] = option("adamw", "adam, adamw or sgd (Nesterov)")
    lr: float = option(3e-3, "largest learning rate, of a cosine schedule")
    weight_decay: float = option(1e-2, "of plain filters")
    warmup: int = option(0, "steps in which the learning rate rises")
    evaluate_every: int = option(0, "steps between evaluations; 0: only at the end")
    save_every: int = option(0, "steps between checkpoints; 0: only at the end")
    keep_last: int = option(1, "newest checkpoints that are kept, besides the best one")

    def __post_init__(self) -> None:
        super().__post_init__()
        _known("dataset", self.dataset, DATASETS)
        _known("network", self.network, DATASETS[self.dataset])
        for name in (*self.operators, self.substitute):
            find_operator(name)
        for argument, known in (("trainings", TRAININGS), ("attacks", attacks.labels)):
            for name in getattr(self, argument):
                _known(argument, name, known)
        for argument in ("operators", "trainings", "attacks"):
            _several(argument, getattr(self, argument))
        for argument in ("repeats", "bim_steps", "pgd_steps", "restarts", "training_steps"):
            checks.integer(argument, getattr(self, argument), 1)
        if self.seed + self.repeats > 2**32:
            raise checks.value_error("seed", "be below 2**32 with all repeats", self.seed)
        for argument, low in (("images", 0), ("attack_batch", 1), ("shift", 0), ("batch_size", 2)):
            checks.integer(argument, getattr(self, argument), low)
        for argument in ("black_box", "verify"):
            checks.boolean(argument, getattr(self, argument))
        rule = "be above 0 and at most 1"
        checks.number("adversarial_share", self.adversarial_share, rule, 0.0)
        if self.adversarial_share > 1:
            raise checks.value_error("adversarial_share", rule, self.adversarial_share)
        rule = "be above 0 and below 1"
        checks.number("test_share", self.test_share, rule, 0.0)
        if self.test_share >= 1:
            raise checks.value_error("test_share", rule, self.test_share)
        fraction("epsilon", self.epsilon)
        if self.step_size is not None:
            fraction("step_size", self.step_size)
        self.recipe()

    def recipe(self) -> tuple[Optimizer, Schedule]:
        """Return the optimiser and its schedule."""
        momentum = 0.9 if self.optimizer == "sgd" else 0.0
        optimizer = Optimizer(
            kind=self.optimizer,
            lr=self.lr,
            momentum=momentum,
            nesterov=momentum > 0,
            weight_decay=self.weight_decay,
        )
        return optimizer, Schedule(kind="cosine", warmup=self.warmup)

    @property
    def bound(self) -> float:
        """The largest change of a pixel."""
        return fraction("epsilon", self.epsilon)

    @property
    def step(self) -> float:
        """The change of a pixel in a step of an attack with many."""
        return self.bound / 4 if self.step_size is None else fraction("step_size", self.step_size)

    def attack(self, name: str) -> Attack:
        """Return the attack of a name."""
        return {
            "fgsm": attacks.fgsm(self.bound),
            "bim": Attack(self.bound, self.step, self.bim_steps),
            "pgd": Attack(self.bound, self.step, self.pgd_steps, self.restarts),
        }[name]

    def training_attack(self, training: str) -> Attack | None:
        """Return the attack of an adversarial training, None for the natural one."""
        return {
            "natural": None,
            "fgsm": attacks.fgsm(self.bound),
            "pgd": Attack(self.bound, self.step, self.training_steps, 1),
        }[training]

    def seeds(self) -> range:
        """Return the seeds of the trainings."""
        return range(self.seed, self.seed + self.repeats)

    def describe(self) -> str:
        """Return what a run would do, in a few lines."""
        substitutes = self.repeats if self.black_box else 0
        count = len(self.operators) * len(self.trainings) * self.repeats
        return (
            f"{count} trainings of {self.network} on {self.dataset} and {substitutes} substitutes, "
            f"{self.steps} steps of {self.batch_size} images each\n{self.settings()}"
        )

    def settings(self) -> str:
        """Return the attacks' numbers in a sentence."""
        size = f"{self.step:.4g}" if self.step_size is None else self.step_size
        starts = "start" if self.restarts == 1 else "starts"
        texts = {
            "fgsm": "FGSM",
            "bim": f"BIM ({self.bim_steps} steps of {size})",
            "pgd": f"PGD ({self.pgd_steps} steps of {size}, worst of {self.restarts} random "
            f"{starts})",
        }
        named = ", ".join(texts[name] for name in self.attacks)
        return f"l-infinity bound {self.epsilon} of pixels from 0 to 1: {named}"
