"""The exceptions that end a script with one line instead of a traceback."""


class UserError(ValueError):
    """Wrong input: a file, a config, an argument.

    The message is one line that names the thing and the way out. Scripts print it as it is and
    exit with `exit_code`; a traceback would say less.
    """

    exit_code = 2


class LostConnectionError(UserError):
    """Another process of this run has ended: what is wrong is there, not here.

    The exit code (EX_TEMPFAIL of sysexits.h) tells the launcher that this process is not the one
    that failed first, whichever of them it sees end first.
    """

    exit_code = 75


def first_line(error: BaseException) -> str:
    """Of an exception's message, which may be long, the first line; else its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
