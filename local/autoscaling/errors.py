"""Application Auto Scaling's errors, beside those that it shares with SageMaker."""

from __future__ import annotations

from local.sagemaker.errors import SageMakerError


class ObjectNotFound(SageMakerError):
    """No scalable target or policy like that."""

    code, status = "ObjectNotFoundException", 400


class ResourceNotFound(SageMakerError):
    """No scalable target with that ARN."""

    code, status = "ResourceNotFoundException", 400


class TooManyTags(SageMakerError):
    """More than 50 tags on one scalable target."""

    code, status = "TooManyTagsException", 400


class LimitExceeded(SageMakerError):
    """A quota is used up."""

    code, status = "LimitExceededException", 400


class InvalidNextToken(SageMakerError):
    """The token was not returned by this action."""

    code, status = "InvalidNextTokenException", 400


class NotImplementedLocally(SageMakerError):
    """AWS does this, it is not done here: said by name, never silently accepted."""

    code, status = "NotImplemented", 501

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is not implemented by the local Application Auto Scaling.")
