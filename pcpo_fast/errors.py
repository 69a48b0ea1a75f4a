"""The exception that users see as one sentence instead of a traceback, and the exit codes that go with it."""

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """An error that the user can fix; the message says what is wrong, where (file, key, line), and what is allowed.

    The command line prints the message after ``error:`` and exits with code 2.

    Attributes:
        shared: every rank of the run raises it, so one process per machine prints it for all.
    """

    shared = False

    def _render_traceback_(self) -> list[str]:
        """Shown by IPython and Jupyter instead of a traceback."""
        return [f"error: {self}"]


def reason_of(error: BaseException) -> str:
    """The first line of an exception's message, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shared(message: str) -> UserError:
    """An error that every rank of the run raises."""
    error = UserError(message)
    error.shared = True
    return error
