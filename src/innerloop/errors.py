"""What can go wrong, by what the loop does about it.

InnerloopError
├── RetryError       the database or the broker is away: pause, keep polling, go on when it is back
├── DeadLetterError  this record is bad: to the dead-letter topic with its reason, the rest goes on
└── StopError        going on would be wrong: leave with one sentence that says what to do
    ├── SettingsError   a setting, a file or a release is wrong (exit code 2)
    ├── ServiceError    a broker, database, topic or table is missing at the start (exit code 3)
    ├── BreakerError    most records are bad, so it is not the records (exit code 1)
    └── FencedError     another process owns this partition now (exit code 4)
"""

from enum import StrEnum


class InnerloopError(Exception):
    """The message is the sentence an operator reads."""


class RetryError(InnerloopError):
    """The database or the broker is away; the same work is tried again when it is back."""


class Reason(StrEnum):
    """Why a record went to the dead-letter topic; the value is what operators group by."""

    TOO_LARGE = "too_large"
    UNDECODABLE = "undecodable"
    INVALID_FIELD = "invalid_field"


class DeadLetterError(InnerloopError):
    """This record can never be handled; `reason` groups it, the message names the field and why."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class StopError(InnerloopError):
    """Going on would be wrong; the process leaves with this sentence and `exit_code`."""

    exit_code = 1


class SettingsError(StopError):
    """A setting, a file or a release is wrong."""

    exit_code = 2


class ServiceError(StopError):
    """A broker, database, topic or table that must be there at the start is not."""

    exit_code = 3


class BreakerError(StopError):
    """Most records are bad: then the code is wrong, theirs or ours, and nothing more is dead-lettered."""


class FencedError(StopError):
    """Another process has claimed this partition; nothing of this batch was written."""

    exit_code = 4
