"""Constructors are the schema: settings are checked against a signature before anything is built."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def construct(config: Any, where: str, allow: Iterable[str] = ("vlae.",), **sizes: Any) -> Any:
    """What `_target_` makes of the other settings and of `sizes`, which the program supplies and no user may set.

    `where` is the place of `config` in the whole (`model.prior`); nothing outside the packages of `allow` is imported.

    Raises:
        ValueError: a foreign or unknown target, an unknown or missing key, a wrong type, a value the target refuses.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"{where}={config!r}: must be a section with a _target_")
    function = resolve(config.get("_target_"), where, allow)
    settings = {key: value for key, value in config.items() if key != "_target_"}
    check(function, settings, where, supplied=sizes)
    for name, value in sizes.items():
        if not fits(value, kind := signature(function, eval_str=True).parameters[name].annotation):
            raise ValueError(f"{where}: {function.__qualname__} takes {name} of {describe(kind)}, not {name}={value!r}")
    try:
        return function(**settings, **sizes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def resolve(target: Any, where: str, allow: Iterable[str] = ("vlae.",)) -> Callable[..., Any]:
    """The class or function of that dotted name; ValueError for one outside `allow` or that is not there."""
    packages = tuple(package.rstrip(".") + "." for package in allow)
    if not isinstance(target, str) or not target.startswith(packages):
        raise ValueError(f"{where}._target_={target!r}: not allowed; it must start with {' or '.join(packages)}")
    module, name = target.rsplit(".", 1)
    try:
        function = getattr(import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"{where}._target_={target!r}: {error}") from error
    # what a module merely imports (Path, import_module) is as foreign as if it were named directly
    if not callable(function) or not f"{getattr(function, '__module__', '')}.".startswith(packages):
        raise ValueError(f"{where}._target_={target!r}: {module} defines no class or function {name!r}")
    return function


def check(
    function: Callable[..., Any],
    settings: Mapping[str, Any],
    where: str,
    supplied: Iterable[str] = (),
    elsewhere: Iterable[str] = (),
) -> None:
    """Refuse settings that `function` cannot take; the arguments named in `supplied` are the program's own, the keys
    `elsewhere` allowed beside its own.

    Raises:
        ValueError: names `where.key`, or the key alone, the value found, and the keys or the type allowed.
    """
    parameters = signature(function, eval_str=True).parameters
    named = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    for name in supplied:
        if not named.pop(name, None):
            raise ValueError(f"{where}: {function.__qualname__} has no argument {name!r}, which it is always given")
    prefix = f"{where}." if where else ""
    for key, value in settings.items():
        if key not in named:
            allowed = [*named, *elsewhere]
            guess = "".join(f", did you mean {near}?" for near in get_close_matches(key, allowed, n=1)) or ";"
            raise ValueError(f"{prefix}{key}={value!r}: unknown key{guess} allowed: {', '.join(allowed) or 'none'}")
        if not fits(value, named[key].annotation):
            raise ValueError(f"{prefix}{key}={value!r}: expected {describe(named[key].annotation)}")
    for key, parameter in named.items():
        if parameter.default is Parameter.empty and key not in settings:
            raise ValueError(f"{prefix}{key}: missing; expected {describe(parameter.annotation)}")


def fits(value: object, kind: Any) -> bool:
    """Whether a plain value is of the annotated type. A list may be a tuple and an int a float; a bool is no number."""
    origin, args = get_origin(kind), get_args(kind)
    if kind in (Any, Parameter.empty):
        return True
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if origin in (list, tuple, Sequence) and isinstance(value, (list, tuple)):
        kinds = args if origin is tuple and args[-1] is not ... else args[:1] * len(value)
        return len(value) == len(kinds) and all(map(fits, value, kinds))
    if origin in (dict, Mapping) and isinstance(value, dict):
        return all(all(map(fits, pair, args)) for pair in value.items())
    return isinstance(value, (list, tuple) if kind is tuple else origin or kind)


def describe(kind: Any) -> str:
    """A type as one would say it: `float or None`, `'hard' or 'soft'`."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(describe, get_args(kind)))
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if kind in (Any, Parameter.empty):
        return "a value"
    return "None" if kind is NoneType else str(kind) if get_args(kind) else kind.__name__
