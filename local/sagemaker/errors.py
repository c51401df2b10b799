"""The errors a caller sees, with AWS's codes and HTTP statuses."""

from __future__ import annotations


class SageMakerError(Exception):
    """An answer other than success: AWS's error code, the HTTP status, and further members of the body."""

    code = "InternalFailure"
    status = 500

    def __init__(self, message: str = "", **extra: object) -> None:
        super().__init__(message)
        self.message = message
        self.extra = extra


class ValidationException(SageMakerError):
    """The request is malformed, or names a thing that does not exist or is in the wrong state."""

    code, status = "ValidationException", 400


class ResourceInUse(SageMakerError):
    """The name is taken."""

    code, status = "ResourceInUse", 400


class ResourceNotFound(SageMakerError):
    """No resource of that name (the newer actions say it so; the older ones say ValidationException)."""

    code, status = "ResourceNotFound", 400


class ResourceLimitExceeded(SageMakerError):
    """More than a quota allows."""

    code, status = "ResourceLimitExceeded", 400


class ConflictException(SageMakerError):
    """The change contradicts what is there."""

    code, status = "ConflictException", 400


class SerializationException(SageMakerError):
    """The body is no JSON object (AWS then says no more than that), or a value in it has the wrong type."""

    code, status = "SerializationException", 400


class UnknownOperation(SageMakerError):
    """SageMaker has no such action. AWS says it without a message."""

    code, status = "UnknownOperationException", 400


class NotImplementedLocally(SageMakerError):
    """AWS does this, the local SageMaker does not: said by name, never silently accepted."""

    code, status = "NotImplemented", 501

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is not implemented by the local SageMaker.")


class ValidationError(SageMakerError):
    """The runtime API's word for a request that cannot be served, an unknown endpoint included."""

    code, status = "ValidationError", 400


class ModelError(SageMakerError):
    """The container answered with something other than 2xx."""

    code, status = "ModelError", 424


class ServiceUnavailable(SageMakerError):
    """No instance can take the request."""

    code, status = "ServiceUnavailable", 503


class ThrottlingException(SageMakerError):
    """A serverless endpoint is at its MaxConcurrency."""

    code, status = "ThrottlingException", 400


class RequestEntityTooLarge(SageMakerError):
    """The invocation's body is over the limit; AWS gives only the number as the code."""

    code, status = "413", 413
