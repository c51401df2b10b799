"""Reading and writing objects in S3."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any
from urllib.parse import quote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import BotoCoreError, ClientError
from botocore.httpsession import URLLib3Session
from urllib3.exceptions import HTTPError

from common import aws
from common.errors import OutOfTime
from common.events import ObjectEvent

GONE = {"NoSuchKey", "NoSuchVersion", "404", "MethodNotAllowed"}  # the last is S3's answer about a delete marker
PIECE = 1 << 20


def version_of(event: ObjectEvent) -> dict[str, str]:
    """The argument that names the version of an event; none where the bucket keeps no versions."""
    return {"VersionId": event.version_id} if event.version_id else {}


def fetch(event: ObjectEvent, until: float | None = None) -> bytes | None:
    """The bytes of the version that the event speaks of; None when it was deleted meanwhile.

    `until` (time.monotonic): a download that is not done by then raises OutOfTime, however steadily it trickles.
    """
    with suppress(HTTPError):  # broken off in the middle
        if (response := _quickly(event)) is not None:
            data = _read(response.raw.stream(PIECE), response.raw.close, event, until)
            # urllib3 1, which Lambda may bring, takes what came before the connection closed for the whole.
            if len(data) == int(response.headers.get("Content-Length", -1)):
                return data
    try:
        body = aws.client("s3").get_object(Bucket=event.bucket, Key=event.key, **version_of(event))["Body"]
        return _read(body.iter_chunks(PIECE), body.close, event, until)
    except ClientError as error:
        if aws.code(error) in GONE:
            return None
        raise


def _read(pieces: Iterator[bytes], close: Callable[[], None], event: ObjectEvent, until: float | None) -> bytes:
    got: list[bytes] = []
    for piece in pieces:
        got.append(piece)
        if until is not None and time.monotonic() > until:
            close()
            raise OutOfTime(f"its download was at {sum(map(len, got)):,} of {event.size:,} bytes when time was up")
    return b"".join(got)


def _quickly(event: ObjectEvent) -> Any:
    """The answer to GetObject without what the SDK adds to it, which costs as much as decoding a small picture.

    None for anything but plain success: then the SDK is asked, with its retries and its words for what is wrong.
    """
    s3 = aws.client("s3").meta
    request = AWSRequest("GET", f"{s3.endpoint_url}/{event.bucket}/{quote(event.key, safe='/~')}", stream_output=True)
    if event.version_id:
        request.params = {"versionId": event.version_id}
    try:
        S3SigV4Auth(_credentials().get_frozen_credentials(), "s3", s3.region_name).add_auth(request)
        response = _http().send(request.prepare())
    except (BotoCoreError, HTTPError):
        return None
    if response.status_code == 200:
        return response
    response.raw.drain_conn()
    return None


@cache
def _http() -> URLLib3Session:
    config: Any = aws.CONFIG
    timeout: Any = (config.connect_timeout, config.read_timeout)  # the stubs know one number only
    return URLLib3Session(timeout=timeout, max_pool_connections=config.max_pool_connections)


@cache
def _credentials() -> Any:
    return aws.sdk.Session().get_credentials()


def newest_version(bucket: str, key: str) -> str | None:
    """The id of the newest version, also of one that a delete marker hides; None where there is none."""
    s3 = aws.client("s3")
    try:
        return s3.head_object(Bucket=bucket, Key=key).get("VersionId", "")
    except ClientError as error:
        if aws.code(error) not in GONE:
            raise
    for page in s3.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=key):
        for version in page.get("Versions", []):  # newest first, and no key that begins so comes before this one
            return version["VersionId"] if version["Key"] == key else None
    return None


def as_it_is_now(event: ObjectEvent) -> ObjectEvent:
    """After a version was deleted for good: the event that tells what S3 shows under the key now, in this one's place.

    That may be an older version, or the newest as before, if it was an old one that its lifecycle ended.
    """
    try:
        head = aws.client("s3").head_object(Bucket=event.bucket, Key=event.key)
    except ClientError as error:
        if aws.code(error) not in GONE:
            raise
        return replace(event, deleted=True, erased=False)
    version = head.get("VersionId", "")
    return replace(event, deleted=False, erased=False, version_id=version, size=head["ContentLength"])


def put_if_absent(bucket: str, key: str, data: bytes) -> None:
    """Write an object whose key follows from its content: what is there already is the same."""
    for attempt in range(4):
        try:
            aws.client("s3").put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            return
        except ClientError as error:
            if aws.code(error) == "PreconditionFailed":
                return
            # Another writes the same at this moment; whether that succeeds is not known yet.
            if aws.code(error) != "ConditionalRequestConflict" or attempt == 3:
                raise
            time.sleep(0.1 * 2**attempt)
