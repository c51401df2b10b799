"""Reading and writing objects in S3."""

from botocore.exceptions import ClientError

from common import aws
from common.events import ObjectEvent

GONE = {"NoSuchKey", "NoSuchVersion", "404", "MethodNotAllowed"}  # the last is S3's answer about a delete marker


def version_of(event: ObjectEvent) -> dict[str, str]:
    """The argument that names the version of an event; none where the bucket keeps no versions."""
    return {"VersionId": event.version_id} if event.version_id else {}


def fetch(event: ObjectEvent) -> bytes | None:
    """The bytes of the version that the event speaks of; None when it was deleted meanwhile."""
    try:
        return aws.client("s3").get_object(Bucket=event.bucket, Key=event.key, **version_of(event))["Body"].read()
    except ClientError as error:
        if aws.code(error) in GONE:
            return None
        raise


def put_if_absent(bucket: str, key: str, data: bytes) -> None:
    """Write an object whose key follows from its content: what is there already is the same."""
    try:
        aws.client("s3").put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    except ClientError as error:
        if aws.code(error) != "PreconditionFailed":
            raise
