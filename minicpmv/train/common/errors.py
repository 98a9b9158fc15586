"""The two errors of training that a user can mend; `minicpmv.data` has those of rows and sources."""

from minicpmv.errors import MiniCPMVError


class ArgumentsError(MiniCPMVError):
    """An option is unknown, wrong, or contradicts another one."""


class TrainingError(MiniCPMVError):
    """A run cannot go on, or what it was given cannot be trained or judged: the message says why and what to do."""
