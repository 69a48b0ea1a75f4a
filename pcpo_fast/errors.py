"""The one exception that reaches a user as a sentence instead of a traceback, and what it says of another one."""


class UserError(Exception):
    """A mistake in what the user gave us: what is wrong, where (file, key, line), and what is allowed.

    The command line prints the message after ``error:`` and exits with code 2.

    Attributes:
        shared: every rank of the run has it, so that one process of a machine may say it for all.
    """

    shared = False

    def _render_traceback_(self) -> list[str]:
        """What IPython and Jupyter show instead of a traceback."""
        return [f"error: {self}"]


def reason_of(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none: for the end of a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shared(message: str) -> UserError:
    """An error that every rank of the run raises."""
    error = UserError(message)
    error.shared = True
    return error
