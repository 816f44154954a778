"""Every error that a user can meet, in one tree.

A message has three parts: the value, the rule it broke, the remedy. Commands print it as one sentence and exit with
status 2; the server wraps it in an OpenAI error object. Anything outside this tree is a defect of ours.
"""


class DaedalError(ValueError):
    """Something the user gave cannot be used as it is."""


class ConfigError(DaedalError):
    """A field of a model's configuration is missing, contradictory or out of range."""


class CheckpointError(DaedalError):
    """A directory is not a checkpoint, or its files are damaged or incomplete."""


class SourceError(DaedalError):
    """A model could not be fetched, or what arrived is not what was asked for."""


class TemplateError(DaedalError):
    """A chat template is missing, refuses the messages, or exceeds its limits."""


class DataError(DaedalError):
    """A file of text or a tokenised dataset cannot be used as it is, or does not fit what it is used with."""


class BackendError(DaedalError):
    """An op has no implementation for these tensors, or the one that was asked for is unable or broken."""


class RequestError(DaedalError):
    """A generation request breaks a rule; `param` names the field at fault where there is one."""

    def __init__(self, message: str, *, param: str | None = None):
        super().__init__(message)
        self.param = param


class CapacityError(RequestError):
    """A request needs more than this engine could hold even when it is idle."""


class OverloadError(DaedalError):
    """The engine's queue is full; the same request may succeed later."""


class DeadlineError(OverloadError):
    """A request cannot be answered in the time that it has; `wait` seconds later, or with more time, it may."""

    def __init__(self, message: str, *, wait: float):
        super().__init__(message)
        self.wait = wait
