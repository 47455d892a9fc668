"""Augmentation of small images, a whole batch at once on its device, and ImageNet's transforms.

``Augment`` pads, crops, flips and normalises batches; its random numbers are drawn apart from
their use. The ImageNet transforms take one decoded image and draw from PyTorch's global generator,
which the loaders seed for every image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torchvision.transforms import v2  # type: ignore[import-untyped]

from dcconv.operator import checks

PADDINGS = ("symmetric", "reflect", "zeros")

# Takes a decoded image [3, h, w] uint8 and returns it [3, s, s] float32.
Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Augment:
    """Pad, crop at random to the old size, flip at random, normalise, cut a square out at random.

    ``padding`` is the number of pixels on each side; ``mode`` mirrors with the edge pixel
    repeated (``symmetric``), without (``reflect``), or adds zeros. ``mean`` and ``std`` have one
    number per channel, or one for all, in the units of the stored images. ``cutout`` is the side
    of the square that becomes 0 after normalisation; its centre lies anywhere in the image.
    """

    padding: int = 4
    mode: str = "symmetric"
    flip: bool = True
    mean: tuple[float, ...] = (127.5,)
    std: tuple[float, ...] = (128.0,)
    cutout: int = 0

    def __post_init__(self) -> None:
        checks.integer("padding", self.padding, 0)
        checks.integer("cutout", self.cutout, 0)
        checks.choice("mode", self.mode, PADDINGS)
        for std in self.std:
            checks.number("std", std, "be a finite number above 0", 0.0)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Return [n, 5] int64 on the generator's device: top, left, flip, and cutout's centre.

        The centre is uniform over 2**31 steps of the image's height and width.
        """
        device = generator.device
        offsets = torch.randint(2 * self.padding + 1, (n, 2), generator=generator, device=device)
        flips = torch.randint(2, (n, 1), generator=generator, device=device)
        centres = torch.randint(2**31, (n, 2), generator=generator, device=device)
        return torch.cat((offsets, flips, centres), dim=1)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the images [n, c, h, w] augmented, float32, on their device."""
        return self.apply(images, self.draw(len(images), generator).to(images.device))

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return the images [n, c, h, w] changed as the draws [n, 5] say, float32."""
        n, c, h, w = images.shape
        top, left, flip, centre_row, centre_column = draws.unbind(dim=1)
        rows = top[:, None] + torch.arange(h, device=images.device) - self.padding
        columns = torch.arange(w, device=images.device).expand(n, w)
        if self.flip:
            columns = torch.where(flip[:, None] == 1, w - 1 - columns, columns)
        columns = left[:, None] + columns - self.padding
        # One gather does the padding, the crop and the flip: pixel numbers [n, h * w].
        places = self._source(rows, h)[:, :, None] * w + self._source(columns, w)[:, None, :]
        output = images.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, c, -1))
        output = output.view(n, c, h, w)
        if self.mode == "zeros" and self.padding:
            inside = _within(rows, 0, h)[:, None, :, None] & _within(columns, 0, w)[:, None, None]
            output = output * inside
        output = self.normalise(output)
        if self.cutout:
            cut = self._square(centre_row, h)[:, None, :, None]
            cut = cut & self._square(centre_column, w)[:, None, None]
            output = output.masked_fill(cut, 0.0)
        return output

    def normalise(self, images: Tensor) -> Tensor:
        """Return (images - mean) / std, float32."""
        mean, std = _channels(self.mean, images.device), _channels(self.std, images.device)
        return (images.float() - mean) / std

    def _source(self, places: Tensor, size: int) -> Tensor:
        """Return which pixels fill places from -padding to size + padding - 1."""
        if self.mode == "zeros":
            return places.clamp(0, size - 1)
        # Both mirrors repeat with a period; symmetric ones contain the edge pixel twice.
        edge = 1 if self.mode == "symmetric" else 0
        period = max(2 * size - 2 + 2 * edge, 1)
        phase = places.remainder(period)
        return torch.minimum(phase, period - edge - phase)

    def _square(self, centre: Tensor, size: int) -> Tensor:
        start = (centre * size).bitwise_right_shift(31) - self.cutout // 2
        places = torch.arange(size, device=centre.device)
        return _within(places - start[:, None], 0, self.cutout)


@lru_cache(maxsize=32)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept, because moving it to the device for every batch would wait for the device.
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def _within(values: Tensor, low: int, high: int) -> Tensor:
    return (values >= low) & (values < high)


def resize_corner(image: Tensor, height: int, width: int) -> Tensor:
    """Resize an image [c, h, w] bilinearly with sampling points that start at the corner.

    Output pixel i reads at i * h / height: no half-pixel centres, no antialiasing, as TensorFlow 1
    did; ``torch.nn.functional.interpolate`` has no such mode.
    """
    # Rows of pixels [h, w, c], as decoded images lie in memory.
    pixels = image.permute(1, 2, 0).float().contiguous()
    upper, lower, down = _corner_points(pixels.shape[0], height)
    before, after, right = _corner_points(pixels.shape[1], width)
    wide = torch.lerp(pixels.index_select(1, before), pixels.index_select(1, after), right[:, None])
    tall = torch.lerp(wide.index_select(0, upper), wide.index_select(0, lower), down[:, None, None])
    return tall.permute(2, 0, 1)


def _corner_points(size: int, output: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each output place the pixels before and after it, and its way between them."""
    places = torch.arange(output, dtype=torch.float32) * (size / output)
    before = places.floor().long().clamp(max=size - 1)
    return before, (before + 1).clamp(max=size - 1), places - before


@dataclass(frozen=True)
class OfficialTransform:
    """The official ImageNet pipeline: subtract the mean, resize to a square, crop, perhaps flip.

    The aspect ratio is ignored. Training crops and flips at random; evaluation takes the centre.
    """

    train: bool
    size: int = 224
    resize: int = 256
    mean: tuple[float, float, float] = (121.6, 116.6, 102.7)

    def __post_init__(self) -> None:
        checks.integer("size", self.size, 1)
        checks.integer("resize", self.resize, self.size)

    def __call__(self, image: Tensor) -> Tensor:
        """Return the image [3, h, w] uint8 as [3, size, size] float32."""
        resized = resize_corner(image, self.resize, self.resize)
        room = self.resize - self.size
        top = left = room // 2
        if self.train:
            top, left = torch.randint(room + 1, (2,)).tolist()
        cropped = resized[:, top : top + self.size, left : left + self.size]
        if self.train and int(torch.randint(2, ())):
            cropped = cropped.flip(2)
        # The mean commutes with the linear resize, and costs less on fewer pixels.
        return cropped - torch.tensor(self.mean)[:, None, None]


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def modern_transform(
    train: bool, *, size: int = 224, resize: int = 256, trivial: bool = False, erase: float = 0.0
) -> Transform:
    """Return today's usual ImageNet pipeline, of torchvision's parts.

    Args:
        train: random resized crop and flip; else the centre of the resized image.
        size: side of the result.
        resize: shorter side before the centre crop.
        trivial: add TrivialAugment in training.
        erase: probability of erasing a random part in training.
    """
    checks.integer("size", size, 1)
    checks.integer("resize", resize, size)
    checks.number("erase", erase, "be from 0 to 1", 0.0, closed=True)
    if erase > 1:
        raise checks.value_error("erase", "be from 0 to 1", erase)
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    if not train:
        steps = [v2.Resize(resize, antialias=True), v2.CenterCrop(size), *last]
    else:
        steps = [
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            *(
                [v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)]
                if trivial
                else []
            ),
            *last,
            *([v2.RandomErasing(erase)] if erase else []),
        ]
    transform: Transform = v2.Compose(steps)
    return transform
