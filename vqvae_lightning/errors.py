"""Errors that a user can mend: the commands print them as one line, without a traceback."""


class InputError(ValueError):
    """A value, file or combination that the user gave cannot work.

    The message names the config key, the bad value and the accepted ones.
    """


class DivergenceError(RuntimeError):
    """A loss became NaN or infinite; the last good checkpoint is kept."""


class RankError(RuntimeError):
    """A further rank of a job, or a job in another process, failed."""


class Interrupted(BaseException):
    """The run was stopped from outside; a checkpoint was written.

    Not an Exception, or a sweep would take it for a failed job and start the next one.

    Attributes:
        status: Exit status of the command: 130 after Ctrl-C, 75 ("try again", sysexits.h) after the
            signal of a scheduler that takes the machine away.
    """

    def __init__(self, message: str, status: int = 130) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        """With the status, which pickling an exception would lose between processes."""
        return type(self), (str(self), self.status)


class Failed(BaseException):
    """Carries an error past Hydra, which would add a line of its own or make a warning of it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def check_positive(name: str, value: object) -> int:
    """Return `value` if it is an integer of at least 1.

    Raises:
        InputError: Otherwise, naming `name`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}={value} must be an integer of at least 1.")
    return value


def check_range(name: str, value: object, low: float, high: float = float("inf")) -> float:
    """Return `value` if it is a number in [low, high].

    Raises:
        InputError: Otherwise, naming `name`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        limits = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise InputError(f"{name}={value} must be a number {limits}.")
    return value
