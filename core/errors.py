"""Every error that rlx raises on purpose.

    RlxError
    ├── ConfigError (ValueError)         the YAML or an override is wrong
    ├── UserCodeError (RuntimeError)     a reward, transform or rollout function is wrong
    ├── DatasetError (ValueError)        a data set is missing, empty or malformed
    ├── ModelError (RuntimeError)        a model cannot be found or loaded
    ├── ServiceError (RuntimeError)      the rollout service refused or failed
    │   ├── ServiceUnavailable           nobody answers, or a worker is down
    │   ├── WireError (ValueError)       bytes or JSON that are not of the form that was expected
    │   ├── RequestRefused               a request that cannot be carried out as things are
    │   ├── RequestTooLong               a request beyond the model's context length
    │   ├── GroupCancelled               the learner took a group back
    │   ├── SessionReplaced              another learner took the service over
    │   └── WeightSyncError              a worker did not take the weights that were sent
    │       ├── WeightBaseMismatch       the service does not hold the weights that a difference was made from
    │       └── ParityError              a worker's log-probabilities are not the learner's
    └── DeadlineExceeded (TimeoutError)  someone did not answer in time

Each message says what was wrong, where, and what to write instead. All of them survive pickling, so that
they cross process boundaries within one machine with their text.
"""

from __future__ import annotations


class RlxError(Exception):
    """Base class. `str(error)` is the message shown to the user; `exit_code` is the process's."""

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(message)


class ConfigError(RlxError, ValueError):
    """The configuration cannot be used; the message names the key, file and line where they are known."""

    exit_code = 2


class UserCodeError(RlxError, RuntimeError):
    """Code that the user named is missing, does not import, or broke its contract."""


class DatasetError(RlxError, ValueError):
    """A data set is missing, empty, or has rows that cannot be used."""


class ModelError(RlxError, RuntimeError):
    """A model or tokenizer cannot be found or loaded."""


class ServiceError(RlxError, RuntimeError):
    """The rollout service refused a request or failed."""


class ServiceUnavailable(ServiceError):
    """Nobody answers at the service's address, or one of its workers is down."""


class WireError(ServiceError, ValueError):
    """Bytes or JSON that are not of the form that was expected."""


class RequestRefused(ServiceError):
    """A request that is well-formed and cannot be carried out as things are; the message says why."""


class RequestTooLong(ServiceError):
    """Prompt and completion together are longer than the model's context; asking again gives the same answer."""


class GroupCancelled(ServiceError):
    """The learner took this group back."""


class SessionReplaced(ServiceError):
    """Another learner took the service over; this one's groups and weights are refused."""


class WeightSyncError(ServiceError):
    """A worker did not take the weights that were sent, or took others."""


class WeightBaseMismatch(WeightSyncError):
    """The service does not hold the weights that a difference was made from; send everything."""


class ParityError(WeightSyncError):
    """A worker's log-probabilities on the probe are too far from the learner's."""


class DeadlineExceeded(RlxError, TimeoutError):
    """Someone did not answer in time; the message names who and how long was waited."""
