"""Errors that a user can fix, which commands print as one line without a traceback."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Self


class Key(str):
    """A config key in a `Message` or a `KeyedError`, relative to the code that makes it."""

    __slots__ = ()


class Message(str):
    """Text with config keys, such as a warning.

    Args:
        *parts: Text and `Key`s, joined without separators.
    """

    parts: tuple[str, ...]

    def __new__(cls, *parts: str) -> "Message":
        """Join the parts."""
        message = super().__new__(cls, "".join(parts))
        message.parts = parts
        return message

    def rename_keys(self, rename: Callable[[str], str]) -> "Message":
        """Return the same message with `rename` applied to each of its keys."""
        return Message(*_rename(self.parts, rename))


def _rename(parts: Iterable[str], rename: Callable[[str], str]) -> Iterator[str]:
    return (Key(rename(part)) if isinstance(part, Key) else part for part in parts)


class KeyedError(Exception):
    """An error whose message has config keys.

    Args:
        *parts: Text and `Key`s, joined without separators.
    """

    def __init__(self, *parts: str) -> None:
        super().__init__(*parts)

    def __str__(self) -> str:
        return "".join(self.args)

    def rename_keys(self, rename: Callable[[str], str]) -> Self:
        """Return the same error with `rename` applied to each of its keys."""
        return type(self)(*_rename(self.args, rename))


class InputError(KeyedError, ValueError):
    """A value, file or combination that the user gave cannot work.

    The message names the config key, the bad value and the accepted ones. A constructor knows only
    the names of its own arguments, such as `num_codes`, and passes them as `Key`s. Its callers know
    its place in the config and complete the keys with `prefix_keys` and `rename_keys`, here to
    `model.net.quantizer.num_codes`.
    """


class DivergenceError(KeyedError, RuntimeError):
    """A loss became NaN or infinite. The last good checkpoint is kept."""


@contextmanager
def rename_keys(rename: Callable[[str], str]) -> Iterator[None]:
    """Apply `rename` to the keys of a `KeyedError` that the block raises."""
    try:
        yield
    except KeyedError as error:
        raise error.rename_keys(rename) from error


def prefix_keys(place: str) -> AbstractContextManager[None]:
    """Put `place.` before the keys of a `KeyedError` that the block raises."""
    return rename_keys(lambda key: f"{place}.{key}")


class RankError(RuntimeError):
    """Another rank of a job, or a job in another process, failed."""


class Interrupted(BaseException):
    """The run was stopped from outside after writing a checkpoint.

    It is not an Exception, because a sweep would treat that as a failed job and start the next one.

    Attributes:
        status: Exit status of the command. It is 130 after Ctrl-C, and 75 ("try again", sysexits.h)
            after the signal of a scheduler that takes the machine away.
        agreed: Whether all ranks of the job stop here. If not, a signal has stopped only this rank,
            and others may wait for it in a collective.
    """

    def __init__(self, message: str, status: int = 130, agreed: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.agreed = agreed

    def __reduce__(self) -> tuple[type, tuple[str, int, bool]]:
        """Pickle the attributes too, which an exception would lose between processes."""
        return type(self), (str(self), self.status, self.agreed)


class Failed(BaseException):
    """Carries an error past Hydra, which would add its own line or turn it into a warning."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def join_lines(text: object) -> str:
    """The text of `text`, such as an error, in one line: all white space becomes single spaces."""
    return " ".join(str(text).split())


def check_positive(name: str, value: object) -> int:
    """Return `value` if it is an integer of at least 1.

    Raises:
        InputError: Otherwise, with the key `name`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(Key(name), f"={value} must be an integer of at least 1.")
    return value


def check_range(name: str, value: object, low: float, high: float = float("inf")) -> float:
    """Return `value` if it is a number in [low, high].

    Raises:
        InputError: Otherwise, with the key `name`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        limits = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise InputError(Key(name), f"={value} must be a number {limits}.")
    return value
