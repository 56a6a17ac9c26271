"""The strict reader of config.yaml and `key=value`: every mistake at once, each with its place."""

import difflib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from config import NO_SECRETS, Config, UserError, without_secrets


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a flat YAML file and `key=value` overrides into a `Config`.

    Raises:
        UserError: one line for every unknown key, wrong type or value out of range, each with its place.
    """
    hints = get_type_hints(Config)
    values: dict[str, Any] = {}
    problems: list[str] = []
    overrides = list(overrides)
    for place, key, node in [*_file_entries(Path(path)), *_override_entries(overrides, hints)]:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            advice = f"; did you mean {near[0]}?" if near else f"; {NO_SECRETS}" if "token" in key else ""
            problems.append(f"{place}: unknown key {key!r}{advice}")
            continue
        try:
            values[key] = _convert(node, hints[key])
            _check_range(values[key], Config.__dataclass_fields__[key].metadata)
        except ValueError as error:
            problems.append(f"{place}: {key} {error}")
    if problems:
        raise UserError("\n".join(problems))
    try:
        return Config(**values)
    except UserError as error:
        place = f"{path} and command line" if overrides else f"{path}"
        raise UserError("\n".join(f"{place}: {line}" for line in str(error).split("\n"))) from None


def dump_config(config: Config) -> str:
    """The resolved settings as YAML that `load_config` reads back to an equal `Config`."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(config).items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000)


Entry = tuple[str, str, yaml.Node]  # place for messages, key, value


def _file_entries(path: Path) -> Iterator[Entry]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; copy config.yaml or name yours with --config") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path}: {reason}") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or "it cannot be parsed"
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {reason}") from None
    if tree is None:
        return
    if not isinstance(tree, yaml.MappingNode):
        raise UserError(f"{path}:1: expected lines of `key: value`")
    seen: dict[str, int] = {}
    for key, value in tree.value:
        line, name = key.start_mark.line + 1, without_secrets(str(key.value))[:60]
        if name in seen:
            raise UserError(f"{path}:{line}: {name} is set twice, here and in line {seen[name]}")
        seen[name] = line
        yield f"{path}:{line}", name, value


def _override_entries(overrides: Iterable[str], hints: dict[str, Any]) -> Iterator[Entry]:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"command line: {override!r} is not of the form key=value")
        wants_list = tuple in (get_origin(hints.get(key)), *map(get_origin, get_args(hints.get(key))))
        if wants_list and text.lstrip().startswith("["):
            try:
                node = yaml.compose(text, Loader=yaml.SafeLoader) or yaml.ScalarNode("", text)
            except (yaml.YAMLError, RecursionError):
                raise UserError(f"command line: {key} is not a list like [a, b]") from None
        else:
            # The text as it stands: `prompt=lace: white` is a prompt, not a mapping.
            node = yaml.ScalarNode(yaml.resolver.Resolver().resolve(yaml.ScalarNode, text, (True, False)), text)
        yield "command line", key, node


def _convert(node: yaml.Node, hint: Any) -> Any:
    """A YAML node as a value of the type `hint`; ValueError says what was expected instead."""
    options = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
        if NoneType in options:
            return None
        raise ValueError("is empty and needs a value")
    wanted = next(option for option in options if option is not NoneType)
    if get_origin(wanted) is tuple:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return tuple(_scalar(item, str) for item in items)
    return _scalar(node, wanted)


# What YAML makes of words by itself; any other tag was written by hand.
_KINDS = ("null", "bool", "int", "float", "str", "timestamp", "merge", "value")
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in _KINDS}


def _scalar(node: yaml.Node, wanted: Any) -> Any:
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _PLAIN_TAGS:
        raise ValueError(f"is not {_name(wanted)}")
    text, tag = node.value, node.tag.rpartition(":")[2]
    shown = without_secrets(text)  # before it is cut, which could hide what it is
    shown = shown if len(shown) <= 40 else shown[:40] + "…"
    if wanted is str:
        return os.path.expanduser(text) if text.startswith("~/") else text  # no prompt begins so
    if get_origin(wanted) is Literal:
        if text in get_args(wanted):
            return text
        # YAML reads a bare no as false; mixed_precision: no means the word.
        raise ValueError(f"is {shown!r}; choose one of {', '.join(get_args(wanted))}")
    try:
        if wanted is bool and tag == "bool":
            return yaml.SafeLoader.bool_values[text.lower()]
        if wanted is int and tag == "int":
            return int(text.replace("_", ""))
        if wanted is float and tag in ("int", "float", "str") and math.isfinite(float(text)):
            return float(text)
    except (ValueError, KeyError):
        pass
    raise ValueError(f"is {shown!r}, not {_name(wanted)}")


def _name(wanted: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return names.get(wanted, "one of " + ", ".join(map(str, get_args(wanted))))


def _check_range(value: Any, rules: Any) -> None:
    if value is None:
        return
    if "least" in rules and value < rules["least"]:
        raise ValueError(f"is {value}; it must be at least {rules['least']}")
    if "most" in rules and value > rules["most"]:
        raise ValueError(f"is {value}; it must be at most {rules['most']}")
    if "above" in rules and value <= rules["above"]:
        raise ValueError(f"is {value}; it must be above {rules['above']}")
    if "multiple_of" in rules and value % rules["multiple_of"]:
        raise ValueError(f"is {value}; it must be a multiple of {rules['multiple_of']}")
    if "each_of" in rules and not (value and {item.lower() for item in value} <= set(rules["each_of"])):
        raise ValueError(f"is [{', '.join(value)}]; choose from {', '.join(rules['each_of'])}")
