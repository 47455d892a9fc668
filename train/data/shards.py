"""WebDataset shards: ``train/*.tar`` and ``val/*.tar``, read from beginning to end.

A sample is an image (``.jpg``, ``.jpeg`` or ``.png``) and its class number as text (``.cls``)
under the same key. The number of samples of every shard is counted from the tar headers, or read
from ``sizes.json`` beside the shards (``{"000.tar": 1000, ...}``; ``write_sizes`` makes it).

Order. The stream has a fixed number of lanes. In an epoch the shards, shuffled by seed and epoch,
are dealt to the lanes; a lane reads its shards one after the other and shuffles their samples
through a buffer. Every batch takes the same number of samples from each lane, and a lane goes on
into its next epoch by itself. Ranks share the lanes, and the workers of a rank share its lanes, so
with the same ``lanes`` and the same batch over all ranks any number of ranks and workers gives the
same batches. The state is therefore one number, the samples that each lane has given. To resume,
a lane computes its epoch and position from the sizes, repeats the shuffling on numbers alone, and
reads on from the first shard that the position still needs.
"""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.tariterators import (  # type: ignore[import-untyped]
    base_plus_ext,
    group_by_keys,
)

from dcconv.operator import checks
from dcconv.operator.checks import value_error
from train.data.augment import Transform
from train.data.images import (
    Chunk,
    Failure,
    Reports,
    collate,
    decode,
    image_failure,
    loader_options,
    to_device,
    transform_with_seed,
)
from train.data.stream import AUGMENT, ORDER, check_share, check_state, derive_seed
from train.engine.files import (
    MOST_IMAGE,
    TAR_ERRORS,
    ContentError,
    member_content,
    members,
    open_file,
    open_tar,
    read_json,
    reason_of,
)
from train.engine.folder import write_file
from train.engine.terminal import prepare

SIZES = "sizes.json"
IMAGE_KEYS = ("jpg", "jpeg", "png")
LABEL_KEY = "cls"
# Of a shard; an order of them is drawn at once.
MOST_SAMPLES = 10_000_000
# Passes over the data that a position may lie ahead: to find it, each is walked through.
MOST_EPOCHS = 100_000
# Of a shard, which is never in memory as a whole.
MOST_SHARD = 2**50

Sample = dict[str, Any]


class ShardSet(NamedTuple):
    """Shards with their numbers of samples, and what is wrong with shards that are to be kept."""

    paths: tuple[Path, ...]
    sizes: tuple[int, ...]
    failures: tuple[Failure, ...] = ()

    @property
    def images(self) -> int:
        return sum(self.sizes)


def find_shards(data: str | Path, split: str, *, skip_corrupt: bool = False) -> ShardSet:
    """List the shards of ``<data>/<split>/*.tar`` with their sizes.

    Args:
        data: the folder.
        split: ``train`` or ``val``.
        skip_corrupt: keep what a damaged shard still has; else such a shard is an error.

    Raises:
        ValueError: there are no shards, one is damaged, or ``sizes.json`` does not fit them.
    """
    folder = Path(data) / split
    paths = tuple(sorted(folder.glob("*.tar")))
    if not paths:
        rule = f"hold shards {split}/*.tar; nothing is downloaded"
        raise value_error("data", rule, f"'{data}' without any")
    listed = _listed_sizes(folder, paths)
    if listed is not None:
        return ShardSet(paths, listed)
    sizes, failures = [], []
    for path in paths:
        size, failure = count_samples(path)
        sizes.append(size)
        if failure is not None:
            if not skip_corrupt:
                raise ValueError(failure.sentence)
            failures.append(failure)
    return ShardSet(paths, tuple(sizes), tuple(failures))


def _listed_sizes(folder: Path, paths: Sequence[Path]) -> tuple[int, ...] | None:
    file = folder / SIZES
    if not file.exists():
        return None
    subject, rule = f"data file '{file}'", "give the number of samples of each shard"
    try:
        sizes = read_json(file)
    except (ContentError, OSError) as error:
        raise value_error(subject, f"be JSON and {rule}", reason_of(error)) from error
    names = [path.name for path in paths]
    if not isinstance(sizes, dict) or sorted(sizes) != names:
        other = sorted(set(names) ^ set(sizes)) if isinstance(sizes, dict) else [repr(sizes)]
        raise value_error(subject, f"{rule} and of no other file", f"a difference in {other[0]}")
    for name in names:
        checks.integer(f"data file '{file}': {name}", sizes[name], 1)
        if sizes[name] > MOST_SAMPLES:
            rule = f"be at most {MOST_SAMPLES}"
            raise value_error(f"data file '{file}': {name}", rule, sizes[name])
    return tuple(sizes[name] for name in names)


def count_samples(path: Path) -> tuple[int, Failure | None]:
    """Count a shard's samples by its headers; say what is wrong with a damaged one."""
    count, last = 0, None
    try:
        with open_file(path, MOST_SHARD) as file, open_tar(file) as tar:
            for member in members(tar):
                key = _member_key(member)
                if key is not None and key != last:
                    count, last = count + 1, key
            # Python takes an archive that breaks off between two members for a whole one.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end after the last file")
            if count == 0:
                raise tarfile.ReadError("no sample in it")
    except TAR_ERRORS as error:
        return count, shard_failure(path, error)
    return count, None


def _is_part(member: tarfile.TarInfo) -> bool:
    first = member.name.partition("/")[0]
    return member.isreg() and not (first.startswith("__") and first.endswith("__"))


def _member_key(member: tarfile.TarInfo) -> str | None:
    """Return the sample that a member belongs to, by WebDataset's rules; None if to no one."""
    if not _is_part(member):
        return None
    key: str | None = base_plus_ext(member.name)[0]
    return key


def shard_failure(path: Path, error: BaseException) -> Failure:
    """Return the sentence for a shard that cannot be read to its end."""
    rule = "be a whole tar archive"
    return Failure(str(path), str(value_error(f"shard '{path}'", rule, reason_of(error))))


def _files(path: Path) -> Iterator[Sample]:
    """Yield the files of a shard that make samples, by WebDataset's rules."""
    with open_file(path, MOST_SHARD) as file, open_tar(file) as tar:
        for member in members(tar):
            if _is_part(member):
                content = member_content(tar, member, MOST_IMAGE)
                yield {"fname": member.name, "data": content, "__url__": str(path)}


def write_sizes(folder: Path) -> dict[str, int]:
    """Count the samples of a folder's shards and keep the numbers in its ``sizes.json``."""
    sizes = {}
    for path in sorted(folder.glob("*.tar")):
        sizes[path.name], failure = count_samples(path)
        if failure is not None:
            raise ValueError(failure.sentence)
    write_file(folder / SIZES, (json.dumps(sizes, indent=2) + "\n").encode())
    return sizes


def read_shard(path: Path, size: int) -> Iterator[Sample | Failure]:
    """Yield a shard's samples, and a failure for each that lacks, ``size`` in all.

    What comes right before a damaged place may count as damaged too.
    """
    given, last = 0, None
    try:
        for sample in group_by_keys(_files(path)):
            if last is not None:
                if given + 1 == size:
                    raise tarfile.ReadError(f"more than {size} samples")
                yield last
                given += 1
            last = sample
        if last is None or given + 1 != size:
            raise tarfile.ReadError(f"fewer than {size} samples")
        yield last
    # group_by_keys refuses a name that is there twice by ValueError, with more arguments.
    except TAR_ERRORS as error:
        if not isinstance(error, OSError):
            error.args = error.args[:1]
        failure = shard_failure(path, error)
        for _ in range(size - given):
            yield failure


def decode_sample(sample: Sample | Failure, classes: int) -> tuple[Tensor, int] | Failure:
    """Return a sample's image [3, h, w] uint8 and its label."""
    if isinstance(sample, Failure):
        return sample
    name = f"{sample['__url__']}/{sample['__key__']}"
    subject = f"sample '{name}'"
    keys = [key for key in IMAGE_KEYS if key in sample]
    if not keys or LABEL_KEY not in sample:
        rule = f"have an image .{', .'.join(IMAGE_KEYS)} and a class number .{LABEL_KEY}"
        got = ", ".join(f".{key}" for key in sample if not key.startswith("__"))
        return Failure(name, str(value_error(subject, rule, got)))
    text = sample[LABEL_KEY].strip()
    label = int(text) if text.isdigit() and len(text) < 10 else classes
    if label >= classes:
        rule = f"have a .{LABEL_KEY} from 0 to {classes - 1}"
        return Failure(name, str(value_error(subject, rule, repr(text.decode("latin1")[:20]))))
    try:
        return decode(sample[keys[0]]), label
    except ValueError as error:
        return image_failure(f"{name}.{keys[0]}", error)


def shuffle_buffer(count: int, size: int, generator: torch.Generator) -> list[int]:
    """Return the order in which a buffer of ``size`` places hands out ``count`` samples.

    Samples come in as 0, 1, ...; once the buffer is full, every new one replaces one at random.
    """
    picks = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    buffer = list(range(min(count, size)))
    order = []
    for number in range(len(buffer), count):
        place = int(picks[number] * size)
        order.append(buffer[place])
        buffer[place] = number
    rest = torch.randperm(len(buffer), generator=generator).tolist()
    return order + [buffer[place] for place in rest]


class _Lanes(IterableDataset[Chunk]):
    """Chunks of this rank's lanes in turn, in one worker those of its share of the lanes."""

    def __init__(self, stream: ShardStream, transform: Transform) -> None:
        self.shards = stream.shards
        self.transform = transform
        self.lanes = stream.lanes
        own = stream.lanes // stream.world_size
        self.own = range(stream.rank * own, (stream.rank + 1) * own)
        self.chunk = stream.chunk
        self.classes = stream.classes
        self.seed = stream.seed
        self.buffer = stream.buffer
        self.skip_corrupt = stream.skip_corrupt
        self.position = stream.position

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        lanes = self.own if info is None else self.own[info.id :: info.num_workers]
        streams = [self._chunks(lane) for lane in lanes]
        while True:
            for chunks in streams:
                yield next(chunks)

    def _chunks(self, lane: int) -> Iterator[Chunk]:
        samples = self._samples(lane)
        while True:
            yield collate([next(samples) for _ in range(self.chunk)])

    def _shards(self, lane: int, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(ORDER, self.seed, epoch))
        order: list[int] = torch.randperm(len(self.shards.paths), generator=generator).tolist()
        return order[lane :: self.lanes]

    def _samples(self, lane: int) -> Iterator[tuple[Tensor | None, int, list[Failure]]]:
        """Yield a lane's transformed images from the position on.

        The place of one that is skipped is taken by the next, once more and changed otherwise.
        """
        seeds: list[int] = []
        failures: list[Failure] = []
        unread = 0
        for seed, sample in self._raw(lane):
            seeds.append(seed)
            decoded = decode_sample(sample, self.classes)
            if isinstance(decoded, Failure):
                failures.append(decoded)
                unread += 1
                # Give up where a whole round over the data finds nothing to show.
                if not self.skip_corrupt or unread > self.shards.images:
                    yield None, 0, failures
                continue
            image, label = decoded
            for one in seeds:
                yield transform_with_seed(self.transform, image, one), label, failures
                failures = []
            seeds, unread = [], 0

    def _raw(self, lane: int) -> Iterator[tuple[int, Sample | Failure]]:
        """Yield a lane's samples from the position on, each with the seed of its augmentation."""
        epoch, position = 0, self.position
        while True:
            shards = self._shards(lane, epoch)
            count = sum(self.shards.sizes[shard] for shard in shards)
            if position < count:
                generator = torch.Generator().manual_seed(
                    derive_seed(ORDER, self.seed, epoch, lane)
                )
                order = shuffle_buffer(count, self.buffer, generator)
                numbered = enumerate(self._reordered(shards, order[position:]), start=position)
                for place, sample in numbered:
                    yield derive_seed(AUGMENT, self.seed, epoch, lane, place), sample
            position = max(position - count, 0)
            epoch += 1

    def _reordered(self, shards: list[int], order: list[int]) -> Iterator[Sample | Failure]:
        """Yield samples of the shards, numbered one after the other, in the order given."""
        wanted = set(order)
        arrived = self._numbered(shards, min(order))
        held: dict[int, Sample | Failure] = {}
        for number in order:
            while number not in held:
                key, sample = next(arrived)
                if key in wanted:
                    held[key] = sample
            yield held.pop(number)

    def _numbered(self, shards: list[int], first: int) -> Iterator[tuple[int, Sample | Failure]]:
        start = 0
        for shard in shards:
            size = self.shards.sizes[shard]
            if first < start + size:
                yield from enumerate(read_shard(self.shards.paths[shard], size), start=start)
            start += size


class ShardStream:
    """Training batches from shards; the module's text says in which order.

    Args:
        shards: the training shards.
        transform: what happens to each image.
        classes: number of classes; labels are below it.
        batch_size: images of one rank per batch.
        seed: decides the order and the augmentation.
        device: where batches appear.
        rank: which lanes this process takes.
        world_size: number of ranks.
        workers: reading processes of this rank; 0 reads in this one.
        lanes: sequences that a batch is made of, at most one per shard. By default one per
            worker of every rank. A state is of its number of lanes: name one with many divisors
            to resume with other numbers of ranks and workers.
        buffer: places of each lane's shuffling buffer, in samples.
        skip_corrupt: put the next sample in the place of one that cannot be read, and list it
            in ``skipped``; else raise ValueError with its name.
    """

    def __init__(
        self,
        shards: ShardSet,
        transform: Transform,
        *,
        classes: int,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        lanes: int | None = None,
        buffer: int = 1000,
        skip_corrupt: bool = False,
    ) -> None:
        check_share(batch_size, rank, world_size)
        checks.integer("classes", classes, 1)
        checks.integer("seed", seed, 0)
        checks.integer("workers", workers, 0)
        checks.integer("buffer", buffer, 1)
        readers = world_size * max(workers, 1)
        lanes = readers if lanes is None else lanes
        checks.integer("lanes", lanes, 1)
        if lanes % readers:
            rule = f"be a multiple of ranks times workers, {readers}"
            raise value_error("lanes", rule, lanes)
        if lanes > len(shards.paths):
            rule = f"be at most the number of shards, {len(shards.paths)}"
            raise value_error("lanes", rule, lanes)
        if batch_size * world_size % lanes:
            rule = f"be, over {world_size} ranks, a multiple of lanes = {lanes}"
            raise value_error("batch_size", rule, batch_size)
        if shards.images == 0:
            raise value_error("data", "hold at least one sample", "empty shards")
        self.shards = shards
        self.images_per_epoch = shards.images
        self.classes = classes
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.lanes = lanes
        self.buffer = buffer
        self.skip_corrupt = skip_corrupt
        # Samples of each lane: in a batch, and given so far.
        self.chunk = batch_size * world_size // lanes
        self.position = 0
        self._transform = transform
        self._reports = Reports(skip_corrupt)
        self._reports.add(shards.failures)
        self._chunks: Iterator[Chunk] | None = None

    @property
    def skipped(self) -> dict[str, str]:
        """Shards and samples that could not be read, and why."""
        return self._reports.skipped

    def next(self) -> tuple[Tensor, Tensor]:
        """Return this rank's share of the next batch.

        Raises:
            ValueError: a sample cannot be read and is not to be skipped.
        """
        if self._chunks is None:
            lanes = _Lanes(self, self._transform)
            options = loader_options(self.workers, self.device)
            self._chunks = iter(DataLoader(lanes, batch_size=None, **options))
        parts = []
        for _ in range(self.lanes // self.world_size):
            chunk = next(self._chunks)
            self._reports.add(chunk.failures)
            # Joined on the device: what joins pinned tensors is not pinned.
            parts.append(to_device((chunk.images, chunk.labels), self.device))
        images = torch.cat([part for part, _ in parts])
        labels = torch.cat([part for _, part in parts])
        if len(labels) < self.batch_size:
            raise value_error("data", "hold a sample that can be read", "none")
        self.position += self.chunk
        return images, labels

    def _identity(self) -> dict[str, Any]:
        return {
            "kind": "shards",
            "images": self.images_per_epoch,
            "shards": len(self.shards.paths),
            "seed": self.seed,
            "lanes": self.lanes,
            "buffer": self.buffer,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position; it holds for any batch, ranks and workers that fit the lanes."""
        return self._identity() | {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            ValueError: the state is of other data or of another order.
        """
        identity = self._identity()
        del identity["lanes"]
        check_state(state, identity)
        for name, low in (("lanes", 1), ("position", 0)):
            checks.integer(f"saved stream's {name}", state.get(name), low)
        if state["lanes"] != self.lanes:
            # Another number of ranks or workers, where nobody named the lanes.
            rule = f"be {state['lanes']} as in the resumed run (not given: ranks times workers)"
            raise value_error("lanes", rule, self.lanes)
        most = MOST_EPOCHS * self.images_per_epoch
        if state["position"] > most:
            raise value_error("saved stream's position", f"be at most {most}", state["position"])
        self.position = state["position"]
        self.close()

    def close(self) -> None:
        """End the worker processes; ``next`` starts new ones."""
        self._chunks = None


class _Once(IterableDataset[Chunk]):
    """Batches of the shards, in one worker those of its share of the shards."""

    def __init__(
        self,
        shards: Sequence[tuple[Path, int]],
        transform: Transform,
        classes: int,
        batch_size: int,
    ) -> None:
        self.classes = classes
        self.shards = shards
        self.transform = transform
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        shards = self.shards if info is None else self.shards[info.id :: info.num_workers]
        samples: list[tuple[Tensor | None, int, list[Failure]]] = []
        for path, size in shards:
            for sample in read_shard(path, size):
                decoded = decode_sample(sample, self.classes)
                if isinstance(decoded, Failure):
                    samples.append((None, 0, [decoded]))
                else:
                    samples.append((self.transform(decoded[0]), decoded[1], []))
                if len(samples) == self.batch_size:
                    yield collate(samples)
                    samples = []
        if samples:
            yield collate(samples)


class ShardBatches:
    """Every sample once, for evaluation; what ``ImageBatches`` says holds.

    Ranks and workers share the shards, so the order and the sizes of batches depend on them; the
    samples do not.
    """

    def __init__(
        self,
        shards: ShardSet,
        transform: Transform,
        *,
        classes: int,
        batch_size: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        skip_corrupt: bool = False,
    ) -> None:
        check_share(batch_size, rank, world_size)
        checks.integer("classes", classes, 1)
        checks.integer("workers", workers, 0)
        own = list(zip(shards.paths, shards.sizes, strict=True))[rank::world_size]
        self._dataset = _Once(own, transform, classes, batch_size)
        self.device = torch.device(device)
        self.workers = workers
        self._reports = Reports(skip_corrupt)
        self._reports.add(shards.failures)

    @property
    def skipped(self) -> dict[str, str]:
        """Shards and samples that could not be read, and why."""
        return self._reports.skipped

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        options = loader_options(self.workers, self.device)
        for chunk in DataLoader(self._dataset, batch_size=None, **options):
            self._reports.add(chunk.failures)
            if len(chunk.labels):
                yield to_device((chunk.images, chunk.labels), self.device)


if __name__ == "__main__":
    prepare()
    for argument in sys.argv[1:]:
        for name, samples in write_sizes(Path(argument)).items():
            print(f"{samples:>8}  {name}")
