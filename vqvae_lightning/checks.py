"""Checks of config values against the annotations of the constructors that take them."""

import inspect
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vqvae_lightning.errors import InputError, Key

NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


def check_types(config: Any, place: str = "") -> None:
    """Check the types of values against the constructor named by `_target_`.

    An argument is checked only if the constructor takes nothing but numbers, strings, booleans and
    null.

    Args:
        config: Config node or plain dictionary, whose `_target_`s have been checked.
        place: Key of the node.

    Raises:
        InputError: If a type does not fit, with the key and the accepted types.
    """
    from hydra.utils import get_object
    from omegaconf import DictConfig, ListConfig, OmegaConf

    if isinstance(config, DictConfig):
        place = str(config._get_full_key(None))
        config = {k: config[k] for k in config if not OmegaConf.is_missing(config, k)}
    if not isinstance(config, dict):
        return
    target = config.get("_target_")
    hints: dict[str, Any] = {}
    if isinstance(target, str):
        with suppress(Exception):  # building the object reports what is wrong with the target
            hints = _collect_hints(get_object(target))
    for name, value in config.items():
        key = f"{place}.{name}" if place else str(name)
        if isinstance(value, DictConfig | ListConfig | dict | list):
            check_types(value, key)
        elif name in hints and not name.startswith("_"):
            _check_type(key, value, hints[name])


def _check_type(key: str, value: Any, hint: Any) -> None:
    choices = _list_choices(hint)
    known = (*NAMES, NoneType)
    if any(get_origin(choice) is not Literal and choice not in known for choice in choices):
        return
    if any(_fits(value, choice) for choice in choices):
        return
    listed = [arg for choice in choices for arg in get_args(choice)]
    texts = [f"one of {', '.join(map(str, listed))}"] if listed else []
    texts += [text for kind, text in NAMES.items() if kind in choices]
    texts += ["null"] if NoneType in choices else []
    raise InputError(Key(key), f"={value} must be {' or '.join(texts)}.")


def _list_choices(hint: Any) -> list[Any]:
    """List the types of a union, or the single type of any other annotation."""
    if get_origin(hint) in (Union, UnionType):
        return [choice for part in get_args(hint) for choice in _list_choices(part)]
    return [hint]


def _fits(value: Any, choice: Any) -> bool:
    if get_origin(choice) is Literal:
        return value in get_args(choice)
    if choice is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if choice is int:  # 4e3 in a config is a float
        whole = isinstance(value, float) and value.is_integer()
        return whole or (isinstance(value, int) and not isinstance(value, bool))
    if choice is str:  # 2026 in a config is an integer
        return value is not None and not isinstance(value, bool)
    return isinstance(value, choice)


def _collect_hints(made: Any) -> dict[str, Any]:
    """Collect the types of the arguments of a function or a class.

    The arguments of a class include those that `**options` passes to its parents. The result is
    empty if the annotations cannot be resolved.
    """
    if not isinstance(made, type):
        return _read_annotations(made)
    hints: dict[str, Any] = {}
    for parent in made.__mro__:
        if "__init__" in vars(parent):
            hints = {**_read_annotations(parent.__init__), **hints}  # type: ignore[misc]
            parameters = inspect.signature(parent.__init__).parameters.values()  # type: ignore[misc]
            if not any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters):
                break
    return hints


def _read_annotations(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        return {}
