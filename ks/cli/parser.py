"""Parse a command line into a frozen dataclass whose typed fields are the flags, and write one out again."""

import argparse
import dataclasses
import difflib
import functools
import inspect
import itertools
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from ks.cli.console import EXIT_USAGE
from ks.errors import one_line
from ks.files.columns import METRIC

Config = TypeVar("Config")


def _checked(convert: Callable[[str], Any], accept: Callable[[Any], Any], message: str) -> Callable[[str], Any]:
    """Return a converter that refuses values; {} in the message stands for the text."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(message.format(repr(one_line(text, 60))))
        return value

    return parse


def integer(low: int, high: int = 2**31 - 1) -> Callable[[str], Any]:
    """Return a converter for whole numbers from low to high."""
    return _checked(int, lambda value: low <= value <= high, f"{{}} is not a whole number from {low} to {high}")


def _real(accept: Callable[[float], bool], allowed: str) -> Callable[[str], Any]:
    return _checked(float, accept, f"{{}} is not {allowed}")


positive_int, non_negative_int, seed_number = integer(1), integer(0), integer(0, 2**63 - 1)
positive_float = _real(lambda value: 1e-100 <= value <= 1e100, "a number from 1e-100 to 1e+100")
non_negative_float = _real(lambda value: value == 0 or 1e-100 <= value <= 1e100, "0 or a number from 1e-100 to 1e+100")
open_fraction = _real(lambda value: 0 < value < 1, "a number between 0 and 1, both excluded")
fraction = _real(lambda value: 0 < value <= 1, "a number above 0, at most 1")
# A shell leaves ~ alone in --flag=~/x.
path = _checked(os.path.expanduser, bool, "a path must not be empty; . is the current folder")
key = _checked(str, bool, "a key must not be empty; leave the flag out if the file holds one tensor")
metric_name = _checked(str, METRIC.fullmatch, "{} cannot be the name of a metric")
file_prefix = _checked(
    str,
    re.compile(r"[^./\\][^/\\]*").fullmatch,
    "{} is not a file name prefix; it must not be empty or hold a path",
)
setting = _checked(
    str,
    re.compile(r"[a-z][a-z_-]*(=[ -~]+)?").fullmatch,
    "{} is not KEY=VALUE, nor a KEY without a value",
)


def _entries(flag: "Flag") -> Callable[[str], Any]:
    """Return a converter of an argument to entries of a list; commas separate all but paths, keys and settings."""

    def parse(text: str) -> list:
        texts = [] if flag.convert in (path, key, setting) else filter(None, map(str.strip, text.split(",")))
        values = [flag.convert(entry) for entry in [*texts] or [text]]
        for value in values:
            if flag.choices and value not in flag.choices:
                raise argparse.ArgumentTypeError(f"invalid choice: {value!r} (choose from {', '.join(flag.choices)})")
        return values

    return parse


def auto_or(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a converter that also accepts 'auto'."""
    return lambda text: text if text == "auto" else convert(text)


@dataclasses.dataclass(frozen=True)
class Flag:
    """Everything about a flag but its name and default, which are those of its field.

    help: without the default. convert: text to value. choices, nargs, const, metavar: as argparse has them. required:
    no default. aliases: other spellings. shown_default: text for a default that is not a plain value.
    """

    help: str
    convert: Callable[[str], Any] = str
    choices: tuple[str, ...] | None = None
    nargs: str | None = None
    const: Any = None
    metavar: str | None = None
    required: bool = False
    aliases: tuple[str, ...] = ()
    shown_default: str | None = None

    def default_text(self, default: Any) -> str:
        """Return the default as a reader sees it; empty if there is none."""
        if self.shown_default is not None:
            return self.shown_default
        if self.required:
            return "required"
        if default is None or default is False:
            return ""
        return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def flag(default: Any, help: str, **options: Any) -> Any:
    """Return a dataclass field for a flag; a default of False makes a flag without a value."""
    return dataclasses.field(default=default, metadata={"flag": Flag(help, **options)})


def redefault(group: type, name: str, default: Any, **changes: Any) -> Any:
    """Return the field `name` of another group of flags with a default of its own."""
    inherited = {field.name: field.metadata["flag"] for field in dataclasses.fields(group)}[name]
    return dataclasses.field(default=default, metadata={"flag": dataclasses.replace(inherited, **changes)})


def groups(config: type) -> Iterator[tuple[str, list[dataclasses.Field]]]:
    """Yield (title, fields) of every group of flags in a configuration: its own flags first, then the inherited ones.

    A flag whose default a configuration redefines stays in its group.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    group_of = {name: group for group in config.__mro__ for name in inspect.get_annotations(group) if name in fields}
    for group in config.__mro__:
        own = [field for name, field in fields.items() if group_of[name] is group]
        if own:
            yield vars(group)["TITLE"], own


class _PrintAllFlags(argparse.Action):
    """--help_all."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help_all(), end="")
        parser.exit()


class Parser(argparse.ArgumentParser, Generic[Config]):
    """Parses a command line into a configuration. No abbreviations; an error is one line; lists take commas too.

    Args:
        config: a dataclass made of groups of flags; with a `MAIN`, --help shows these flags alone.
        doc: the docstring of the script; --help shows its first paragraph and the commands below it.
    """

    def __init__(self, config: type[Config], doc: str | None):
        required = [field for field in dataclasses.fields(config) if field.metadata["flag"].required]  # type: ignore[arg-type]
        super().__init__(
            usage=" ".join(["%(prog)s", *(f"--{field.name} {_metavar(field)}" for field in required), "[flags]"]),
            description=doc,
            formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=32),
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,  # the defaults are those of the configuration
        )
        self.config = config
        self._main: tuple[str, ...] = getattr(config, "MAIN", ())
        if self._main:
            self.add_argument("--help_all", action=_PrintAllFlags, nargs=0, help="show all flags, by group, and exit")
        for title, fields in groups(config):
            group = self.add_argument_group(title)
            for field in fields:
                _add(group, field)

    def error(self, message: str):
        self.exit(EXIT_USAGE, f"{self.prog}: error: {one_line(message)} (--help lists the flags)\n")

    def format_help(self) -> str:
        """Return the help with the main flags alone, which fits on a screen."""
        if not self._main:
            return self.format_help_all()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text("\n\n".join((self.description or "").split("\n\n")[:2]))
        formatter.start_section("main flags")
        action_of = {action.dest: action for action in self._actions}
        formatter.add_arguments([action_of[name] for name in (*self._main, "help", "help_all")])
        formatter.end_section()
        return formatter.format_help()

    def format_help_all(self) -> str:
        """Return the help with the whole docstring and all flags by group."""
        return super().format_help()

    def parse(self, argv: list[str] | None = None) -> Config:
        """Return the configuration that a command line gives."""
        return self.parse_given(argv)[0]

    def parse_given(self, argv: list[str] | None = None) -> tuple[Config, set[str]]:
        """Return the configuration that a command line gives, and the names of the flags that are in it."""
        arguments = sys.argv[1:] if argv is None else argv
        if unknown := self._unknown(arguments):
            self.error("; ".join(map(self._did_you_mean, unknown)))
        values = self.parse_args(arguments)
        return self._frozen(values), {*vars(values)}

    def parse_known(self, argv: list[str] | None = None) -> tuple[Config, list[str]]:
        """Return the configuration and the arguments that are no flags of it."""
        values, others = self.parse_known_args(argv)
        return self._frozen(values), others

    def _unknown(self, arguments: Sequence[str]) -> list[str]:
        """Return the names that are no flags; argparse would report them only after missing ones."""
        known = self._option_string_actions
        names = [argument.partition("=")[0] for argument in arguments if " " not in argument]  # else a value
        return [name for name in names if name not in known and (name.startswith("--") or f"-{name}" in known)]

    def _did_you_mean(self, name: str) -> str:
        for group in self.config.__mro__:
            if instead := vars(group).get("RETIRED", {}).get(name.removeprefix("--")):
                return f"{name} no longer exists: {instead}"
        known = self._option_string_actions
        found = [f"-{name}"] if f"-{name}" in known else difflib.get_close_matches(name, known, cutoff=0.7)
        return f"unknown flag {one_line(name, 60)}" + (f": did you mean {' or '.join(found)}?" if found else "")

    def _frozen(self, values: argparse.Namespace) -> Config:
        flat = itertools.chain.from_iterable
        found = {name: tuple(flat(value)) if isinstance(value, list) else value for name, value in vars(values).items()}
        return self.config(**found)


def _add(group, field: dataclasses.Field) -> None:
    described: Flag = field.metadata["flag"]
    default = described.default_text(field.default)
    help_text = described.help + ("; one of " + ", ".join(described.choices) if described.choices else "")
    help_text += f" (default: {default})" if default and not described.required else ""
    options: dict[str, Any] = {"dest": field.name, "help": help_text.replace("%", "%%")}
    if field.default is False:
        options["action"] = "store_true"
    else:
        options |= {name: getattr(described, name) for name in ("choices", "nargs", "const", "required")}
        options |= {"type": described.convert, "metavar": _metavar(field)}
        if described.nargs == "+":
            options |= {"type": _entries(described), "choices": None}
    group.add_argument(f"--{field.name}", *described.aliases, **options)


def _metavar(field: dataclasses.Field) -> str:
    return field.metadata["flag"].metavar or field.name.rpartition("_")[2].upper()


def to_arguments(settings: dict[str, Any]) -> list[str]:
    """Return a command line that parses to these settings: True as a bare flag, None and False left out."""
    arguments = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        if value is True:
            arguments.append(f"--{name}")
        else:
            texts = [str(entry) for entry in (value if isinstance(value, tuple | list) else (value,))]
            odd = len(texts) == 1 and texts[0].startswith("-")
            arguments += [f"--{name}={texts[0]}"] if odd else [f"--{name}", *texts]
    return arguments


def command_line(script: str, config: Any) -> str:
    """Return a command that gives this configuration; flags at their defaults are left out."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    changed = {name: value for name, value in vars(config).items() if value != defaults[name]}
    return shlex.join(["python", script, *to_arguments(changed)])
