"""Arguments that go together inside kernels.

A kernel makes records of its own arguments and hands them to functions; PyTorch would take one that
is handed to a launch for a constant. Values and constants stay apart: a record of constants, in
capital letters, is one as a whole.
"""

from typing import Any, NamedTuple


class Filters(NamedTuple):
    """Pointers to what there is per filter, or once."""

    a: Any
    bias: Any
    radius: Any
    mean: Any
    k: Any


class Numbers(NamedTuple):
    """Numbers of h and g; ``floor`` is that of rho."""

    alpha: Any
    beta: Any
    power: Any
    floor: Any


class Functions(NamedTuple):
    """Constants of h and g. PER_POSITION: h depends on the position alone, up to a factor a."""

    MAGNITUDE: Any
    ANGULAR: Any
    TIMES_A: Any
    PER_POSITION: Any
    RADIUS: Any
    HAS_MEAN: Any
    CURVATURE: Any
    HAS_BIAS: Any


class Steps(NamedTuple):
    """Where windows begin, and how far apart their pixels are."""

    stride_rows: Any
    stride_columns: Any
    top: Any
    left: Any
    dilation_rows: Any
    dilation_columns: Any


class Picture(NamedTuple):
    """Rows and columns of an image."""

    height: Any
    width: Any


class Positions(NamedTuple):
    """The positions of a tile, [P]: image, pixel, row, column, and whether they exist."""

    image: Any
    pixel: Any
    row: Any
    column: Any
    inside: Any


class Group(NamedTuple):
    """A group's number and that of all, its channels in the sum, and its lanes in the result."""

    group: Any
    groups: Any
    channels: Any
    lanes: Any


class Window(NamedTuple):
    """Constants of windows."""

    ROWS: Any
    COLUMNS: Any
    MODE: Any


class Tile(NamedTuple):
    """Positions of a tile; its lanes are IN_GROUP channels of BY_GROUP groups."""

    P: Any
    IN_GROUP: Any
    BY_GROUP: Any


class Loop(NamedTuple):
    """Constants of the main loop of a matrix product; ``product`` says what they mean."""

    TRANSPOSED: Any
    DENSE: Any
    FLAT: Any
    SQUARES: Any
    LAST: Any
    PRECISION: Any
    UPCASTS: Any


class Block(NamedTuple):
    """Rows, columns and depth of a tile of a matrix product."""

    P: Any
    LANES: Any
    DEPTH: Any


class FilterNorms(NamedTuple):
    """Filters, their norms, their scaled copies, and the numbers of both."""

    weight: Any
    a: Any
    scaled: Any
    filters: Any
    size: Any
    alpha: Any
    eps: Any


class FilterTile(NamedTuple):
    """Whether filters are scaled, and over a; filters of a program, elements of a step."""

    SCALES: Any
    DIVIDES: Any
    FILTERS: Any
    BLOCK: Any
