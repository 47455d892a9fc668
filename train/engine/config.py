"""Configurations: a frozen dataclass, its command line, and its YAML file in and out.

A configuration is flat: every field is one flag and one key of the file. The later of these wins:
the fields' defaults, the preset, the configuration of the run that is resumed, ``--config``, flags.
jsonargparse would do the same, but its messages name Python's types and not the rule.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeVar, Union, get_args, get_origin
from typing import get_type_hints as type_hints

import yaml  # type: ignore[import-untyped]

from dcconv.operator import checks
from train.engine import distributed
from train.engine.files import ContentError, parse_yaml, read_text
from train.engine.folder import CONFIG
from train.engine.terminal import has_unicode, prepare

T = TypeVar("T")
AMP = ("none", "bf16", "fp16")


def option(default: Any, text: str) -> Any:
    """Return a dataclass field with a default and the help text of its flag."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What every training needs to know, whatever it trains; checked on construction.

    One step is one update of the weights: ``accumulate`` batches of the stream, on every process.
    Cadences count steps; 0 turns one off, and the last step is evaluated and saved anyway.

    ``free`` names the options that a run which goes on may be told anew: how long, how often, where
    and how fast. The others define the run.
    """

    free: ClassVar[frozenset[str]] = frozenset(
        {
            *("steps", "evaluate_every", "save_every", "keep_last", "log_every"),
            *("histogram_every", "channels_last", "compile", "deterministic", "device", "threads"),
            *("out", "name", "folder", "resume"),
        }
    )

    steps: int = option(1000, "updates of the weights")
    evaluate_every: int = option(500, "steps between evaluations; 0: only at the end")
    save_every: int = option(500, "steps between checkpoints; 0: only at the end")
    keep_last: int = option(3, "newest checkpoints that are kept, besides the best one")
    log_every: int = option(50, "steps between lines of the log")
    histogram_every: int = option(0, "steps between histograms of norms, cosines and radii; 0: off")
    accumulate: int = option(1, "batches of the stream whose gradients one step averages")
    amp: Literal["none", "bf16", "fp16"] = option("none", "automatic mixed precision")
    channels_last: bool = option(False, "channels-last memory format")
    compile: bool = option(False, "torch.compile the network")
    deterministic: bool = option(False, "only algorithms that repeat bit for bit")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to train")
    threads: int | None = option(None, "PyTorch's threads; not given: PyTorch's choice")
    seed: int = option(0, "of weights, order and augmentation")
    out: str = option("runs", "folder that receives the run's own folder <date>_<name>")
    name: str | None = option(None, "name of the run in its folder's name")
    folder: str | None = option(
        None,
        "the run's own folder: made if missing, resumed if it has a checkpoint; with torchrun's "
        "restarts, and on a disk that all machines see",
    )
    resume: str | None = option(None, "folder of a run to go on with, to the exact step")

    def __post_init__(self) -> None:
        for argument in ("steps", "keep_last", "log_every", "accumulate"):
            checks.integer(argument, getattr(self, argument), 1)
        for argument in ("evaluate_every", "save_every", "histogram_every", "seed"):
            checks.integer(argument, getattr(self, argument), 0)
        if self.seed >= 2**32:
            raise checks.value_error("seed", "be below 2**32", self.seed)
        if self.threads is not None:
            checks.integer("threads", self.threads, 1)
        checks.choice("amp", self.amp, AMP)
        checks.choice("device", self.device, distributed.DEVICES)
        for argument in ("channels_last", "compile", "deterministic"):
            checks.boolean(argument, getattr(self, argument))
        if self.name is not None and (not self.name or Path(self.name).name != self.name):
            raise checks.value_error("name", "be a name without folders", repr(self.name))
        if self.folder is not None and self.resume is not None:
            rule = "not be given together with folder, which also resumes"
            raise checks.value_error("resume", rule, repr(self.resume))
        if self.resume is not None and not Path(self.resume).is_dir():
            raise checks.value_error("resume", "be the folder of a run", repr(self.resume))


def close_match(value: object, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known name, or nothing."""
    close = difflib.get_close_matches(str(value), list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _alternatives(kind: Any) -> tuple[Any, bool]:
    """Return a type without None, and whether None was part of it."""
    if get_origin(kind) in (Union, types.UnionType):
        others = [part for part in get_args(kind) if part is not type(None)]
        if len(others) == 1:
            return others[0], True
    return kind, False


def _shown(value: object) -> str:
    """Return a value as a message shows it, of bounded length."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _convert(argument: str, value: Any, kind: Any) -> Any:
    """Return a value of the command line or of YAML as its field's type."""
    kind, optional = _alternatives(kind)
    if optional and (value is None or value == "null"):
        return None
    origin = get_origin(kind)
    if origin is Literal:
        known = [str(item) for item in get_args(kind)]
        if str(value) not in known:
            rule = f"be one of {', '.join(known)}"
            got = f"{_shown(value)}{close_match(_shown(value)[1:-1], known)}"
            raise checks.value_error(argument, rule, got)
        return get_args(kind)[known.index(str(value))]
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(argument, item, get_args(kind)[0]) for item in items)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        text = str(value)
        # What the system hands over of a name that is no text cannot be stored.
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise checks.value_error(argument, "be text in UTF-8", ascii(text))
        return text
    # YAML 1.1 reads 1e-3, without a dot, as text.
    numeric = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    if kind in (int, float) and numeric and not (kind is int and isinstance(value, float)):
        try:
            return kind(value)
        except ValueError:
            pass
    rules = {bool: "be true or false", int: "be an integer", float: "be a number", str: "be text"}
    raise checks.value_error(argument, rules.get(kind, f"be of type {kind}"), _shown(value))


def from_mapping(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return a configuration from the values of some of its fields.

    Raises:
        ValueError, TypeError: a key or a value is wrong; the message names it.
    """
    return kind(**_converted(kind, values, "keys"))


def _converted(kind: type[Any], values: Mapping[str, Any], source: str) -> dict[str, Any]:
    hints = type_hints(kind)
    known = [item.name for item in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            got = f"{_shown(key)}{close_match(_shown(key)[1:-1], known)}"
            raise checks.value_error(source, f"be options of {kind.__name__}", got)
    return {key: _convert(key, value, hints[key]) for key, value in values.items()}


def read_yaml(path: Path, argument: str = "config") -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ValueError: there is no such file, or it is no mapping in YAML.
    """
    try:
        text = read_text(path)
    except (ContentError, OSError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise checks.value_error(argument, "be a readable file", f"'{path}' ({reason})") from error
    try:
        data = parse_yaml(text)
    except ContentError as error:
        raise checks.value_error(argument, "be valid YAML", f"'{path}' ({error})") from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise checks.value_error(argument, "be a mapping of options", f"'{path}'")
    return data


def to_yaml(config: Any, *, ascii_only: bool = False) -> str:
    """Return a configuration as YAML, in the order of its fields; with ``ascii_only`` escaped."""
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    plain = {key: list(item) if isinstance(item, tuple) else item for key, item in values.items()}
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=not ascii_only)
    return text


def read_stored(path: Path, options: T) -> T:
    """Return the configuration that a run stored, of the same kind as the one it goes on with.

    What it does not know yet, as it is from an earlier version, is as in ``options``.

    Raises:
        TypeError, ValueError: the file or a value in it is wrong; the message names it.
    """
    values = {item.name: getattr(options, item.name) for item in dataclasses.fields(options)}  # type: ignore[arg-type]
    kind = type(options)
    values |= _converted(kind, read_yaml(path, "resume"), f"keys of '{path}'")
    return kind(**values | {"resume": None})


def as_stored(stored: T, options: T) -> T:
    """Return options of a run that goes on as they are kept: it was told its folder once."""
    told = {name: getattr(stored, name) for name in ("resume", "folder") if hasattr(stored, name)}
    return dataclasses.replace(options, **told)  # type: ignore[type-var]


def changes(stored: T, options: T, free: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """Return the options of a run that goes on which differ: former and new value by name.

    How it was told its folder is no difference.

    Args:
        stored: the run's configuration so far.
        options: those it shall go on with.
        free: names of the options that may differ.

    Raises:
        ValueError: one differs that defines the run.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for item in dataclasses.fields(options):  # type: ignore[arg-type]
        before, now = getattr(stored, item.name), getattr(options, item.name)
        if before == now or item.name in ("resume", "folder"):
            continue
        if item.name not in free:
            rule = f"stay {before} in a run that is resumed"
            raise checks.value_error(item.name, rule, now)
        found[item.name] = before, now
    return found


class _Parser(argparse.ArgumentParser):
    """argparse with the house's sentence for flags that it does not know."""

    def parse_known(self, arguments: Sequence[str] | None) -> dict[str, Any]:
        given, unknown = self.parse_known_args(arguments)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            first = unknown[0].partition("=")[0]
            close = close_match(first, flags) if first.startswith("-") else ""
            self.error(str(checks.value_error("flags", "be known", f"{first!r}{close}")))
        return vars(given)


def _add_flag(parser: _Parser, item: dataclasses.Field[Any], hint: Any, default: Any) -> None:
    kind, _ = _alternatives(hint)
    flag = "--" + item.name.replace("_", "-")
    text = str(item.metadata.get("help", ""))
    if default is not dataclasses.MISSING and default not in (None, ()):
        shown = default
        if isinstance(shown, tuple):
            shown = " ".join(map(str, shown))
        elif isinstance(shown, bool):
            shown = "yes" if shown else "no"
        text = f"{text} (default: {shown})"
    # argparse formats help texts with %.
    text = text.replace("%", "%%")
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif get_origin(kind) is tuple:
        parser.add_argument(flag, nargs="+", metavar="VALUE", help=text)
    elif get_origin(kind) is Literal:
        parser.add_argument(flag, metavar="|".join(map(str, get_args(kind))), help=text)
    else:
        names: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}
        parser.add_argument(flag, metavar=names.get(kind, "VALUE"), help=text)


def parse(
    kind: type[T],
    arguments: Sequence[str] | None = None,
    *,
    program: str,
    description: str,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    actions: Mapping[str, tuple[str, Callable[[], None]]] | None = None,
    describe: Callable[[T], str] | None = None,
) -> T:
    """Return the configuration that a command line asks for; a wrong one ends the process with 2.

    ``--config FILE`` reads YAML; ``--dry-run`` prints the whole configuration as YAML, with what
    would run as comments, and ends the process with 0. ``--help`` shows the defaults that are in
    force with the preset, the file and the resumed run that are named beside it.

    Args:
        kind: a dataclass; ``option`` gives its fields their help.
        arguments: of the command line, None for the process's own.
        program: as the help shows it, ``python -m train.x``.
        description: of the command, one sentence.
        presets: values by name; ``kind`` then has a field ``preset`` with the name of one.
        actions: flags such as ``list`` that do something else and end the process with 0: name to
            help text and function.
        describe: what a configuration would run, in lines, for ``--dry-run``.
    """
    prepare()
    parser = _Parser(
        prog=program,
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    given_arguments = sys.argv[1:] if arguments is None else list(arguments)
    in_force: Mapping[str, Any] = {}
    if presets is not None and {"-h", "--help"} & set(given_arguments):
        try:
            in_force = _in_force(kind, given_arguments, presets, program)
        except (TypeError, ValueError) as error:
            if not str(error).startswith("dcconv: "):
                raise
            _refuse(parser, str(error))
        name = in_force["preset"]
        parser.description = f"{description} Defaults are those of preset '{name}'."
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with options, as stored by runs"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the configuration as YAML and what would run"
    )
    for name, (text, _) in (actions or {}).items():
        parser.add_argument("--" + name, action="store_true", help=text)
    hints = type_hints(kind)
    items = dataclasses.fields(kind)  # type: ignore[arg-type]
    for item in items:
        _add_flag(parser, item, hints[item.name], in_force.get(item.name, item.default))
    given = parser.parse_known(given_arguments)
    for name, (_, act) in (actions or {}).items():
        if given.get(name.replace("-", "_")):
            act()
            raise SystemExit(0)
    dry_run = given.pop("dry_run", False)
    try:
        file = given.pop("config", None)
        values = _resolve(kind, given, file, presets)
        config = kind(**values)
    except (TypeError, ValueError) as error:
        if not str(error).startswith("dcconv: "):
            raise
        _refuse(parser, str(error))
    if dry_run:
        sys.stdout.write(to_yaml(config, ascii_only=not has_unicode(sys.stdout)))
        for line in describe(config).splitlines() if describe else ():
            sys.stdout.write(f"# {line}\n")
        sys.stdout.flush()
        raise SystemExit(0)
    return config


def _in_force(
    kind: type[Any],
    arguments: Sequence[str],
    presets: Mapping[str, Mapping[str, Any]],
    program: str,
) -> dict[str, Any]:
    """Return the values that fields have where no flag gives them, the preset among them."""
    sources = _Parser(
        prog=program, add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    for name in ("config", "preset", "resume", "folder"):
        sources.add_argument("--" + name)
    given = vars(sources.parse_known_args(arguments)[0])
    file = given.pop("config", None)
    known = {item.name for item in dataclasses.fields(kind)}
    given = {name: value for name, value in given.items() if name in known}
    defaults = {item.name: item.default for item in dataclasses.fields(kind)}
    return defaults | _resolve(kind, given, file, presets)


def _refuse(parser: _Parser, text: str) -> NoReturn:
    parser.error(text)


def _resolve(
    kind: type[Any],
    given: Mapping[str, Any],
    file: str | None,
    presets: Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """Return the values of fields that come from somewhere, the strongest source winning."""
    flags = _converted(kind, given, "flags")
    from_file: dict[str, Any] = {}
    if file is not None:
        path = Path(file)
        from_file = _converted(kind, read_yaml(path), f"keys of '{path}'")
    stored: dict[str, Any] = {}
    named = {**from_file, **flags}
    folder = named.get("resume") or named.get("folder")
    if folder is not None and (Path(folder) / CONFIG).exists():
        path = Path(folder) / CONFIG
        stored = _converted(kind, read_yaml(path, "resume"), f"keys of '{path}'")
        # How the earlier start found its folder is not this start's business.
        stored.pop("resume", None)
        stored.pop("folder", None)
    result = {**stored, **from_file, **flags}
    if presets is not None:
        defaults = {item.name: item.default for item in dataclasses.fields(kind)}
        name = result.get("preset", defaults["preset"])
        if name not in presets:
            got = f"{name!r}{close_match(name, presets)}"
            raise checks.value_error("preset", f"be one of {', '.join(presets)}", got)
        result = {**_converted(kind, presets[name], f"keys of preset '{name}'"), **result}
    missing = [
        item.name
        for item in dataclasses.fields(kind)
        if item.name not in result
        and item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise checks.value_error(missing[0], "be given", "nothing")
    return result
