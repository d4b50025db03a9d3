"""Every error netsurgery raises on purpose. Each message says what, where and what to do."""

__all__ = ["InputError", "NetsurgeryError", "PassError", "RewriteError", "TraceError"]


class NetsurgeryError(Exception):
    """Base of every error of netsurgery; the model it was given is as it was."""


class TraceError(NetsurgeryError):
    """The model could not be run on the example inputs."""


class InputError(NetsurgeryError):
    """An argument is out of range, of the wrong form, or matches nothing."""


class PassError(NetsurgeryError):
    """Passes that cannot run in the given order, or a pass that returned something impossible."""


class RewriteError(NetsurgeryError):
    """The edit does not fit the model."""
