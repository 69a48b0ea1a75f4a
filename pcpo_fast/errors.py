"""The one exception that reaches a user as a sentence instead of a traceback."""


class UserError(Exception):
    """A mistake in what the user gave us: what is wrong, where (file, key, line), and what is allowed.

    The command line prints the message after ``error:`` and exits with code 2.
    """
