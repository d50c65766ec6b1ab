"""The one exception for input that the user can put right."""


class UserError(ValueError):
    """Wrong input: a file, a config, an argument.

    The message is one line that names the thing and the way out. Scripts print it as it is and
    exit with code 2; a traceback would say less.
    """
