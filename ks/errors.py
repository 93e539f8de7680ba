"""The two kinds of error that a user is told about; every other exception is a fault of this program."""


class UsageError(ValueError):
    """Something that the user gave cannot be used: one line with the value, what is allowed, and the remedy."""


class InternalError(Exception):
    """A result that cannot be right, such as a loss below its floor."""
