"""Every error persona raises on purpose, in one tree.

    PersonaError
    ├── ConfigurationError   a setting, file or environment that the owner has to mend before a start
    │   ├── ModelError       the base model is missing, corrupt or of an untested architecture
    │   └── SchemaError      the database was written by a newer persona, or is damaged
    ├── RequestError         the caller asked for something impossible: 400
    │   ├── Unauthorized     no key or a wrong one: 401
    │   ├── NotFound         unknown, or not the caller's own (same words): 404
    │   ├── TooSlow          the body did not arrive within its deadline: 408
    │   ├── TooLarge         body, prompt or count above its limit: 413
    │   └── Unprocessable    well-formed, but its content cannot be used: 422
    ├── Busy                 full, or too many requests: 429 or 503, try again after `retry_after`
    │   └── EngineDown       the engine process is gone or hangs; it is being restarted
    ├── AdapterError         an adapter file that is corrupt, foreign or of an unsupported kind
    ├── TrainingFailed       a run that ended without a candidate: NaN, interruption, out of memory
    └── StorageFull          the disk is full: nothing was written

Each carries one sentence that says what to do. User text never stands in a message.
"""


class PersonaError(Exception):
    """Root of the tree. `code` is the machine-readable name in API error bodies."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class ConfigurationError(PersonaError):
    """The owner has to mend something before persona can start."""

    code = "configuration_error"


class ModelError(ConfigurationError):
    """The base model is missing, corrupt or not of a tested family."""

    code = "model_error"


class SchemaError(ConfigurationError):
    """The database is newer than this program, or damaged."""

    code = "schema_error"


class RequestError(PersonaError):
    """The request cannot be met as it stands."""

    status = 400
    code = "invalid_request"


class Unauthorized(RequestError):
    """No key, or one that is unknown or revoked."""

    status = 401
    code = "invalid_api_key"


class NotFound(RequestError):
    """Unknown, or another user's: the answer is the same."""

    status = 404
    code = "not_found"


class TooSlow(RequestError):
    """The body did not arrive within its deadline."""

    status = 408
    code = "request_timeout"


class TooLarge(RequestError):
    """More bytes, tokens or items than the limit."""

    status = 413
    code = "too_large"


class Unprocessable(RequestError):
    """Well-formed, but its content cannot be used."""

    status = 422
    code = "unprocessable"


class Busy(PersonaError):
    """Full for the moment; `retry_after` in seconds."""

    status = 503
    code = "busy"

    def __init__(self, message: str, *, retry_after: int = 1, status: int = 503, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after
        self.status = status


class EngineDown(Busy):
    """The engine process died, hangs or is still loading."""

    code = "engine_unavailable"


class AdapterError(PersonaError):
    """An adapter that is corrupt, foreign or of a kind that persona does not take."""

    status = 422
    code = "adapter_error"


class TrainingFailed(PersonaError):
    """A training run that ended without a candidate; the message is the recorded reason."""

    code = "training_failed"


class StorageFull(PersonaError):
    """No space left: nothing was written, nothing acknowledged."""

    status = 503
    code = "storage_full"


def named(kind: str) -> type[PersonaError]:
    """The class of that name, as it came over a socket; PersonaError for any other name."""
    found = globals().get(kind)
    return found if isinstance(found, type) and issubclass(found, PersonaError) else PersonaError
