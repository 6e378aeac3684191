"""The one exception that is meant for the person at the keyboard."""


class UserError(ValueError):
    """Something the user gave is wrong.

    The message is one sentence that names the field or file and says what would be right. Commands print it on
    stderr, without a traceback, and exit with code 2.
    """
