"""Between S3 and a job's folder, with the job's own role: channels in, archives and folders out.

Blocking; called off the event loop, because the S3 it talks to is served by that loop.
"""

from __future__ import annotations

import contextlib
import functools
import json
import lzma
import stat
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

PARALLEL = 4  # requests at once per transfer
_session_lock = threading.Lock()


@functools.cache
def _session() -> boto3.session.Session:
    """One session for all: each new one parses S3's model again, which stalls every endpoint for half a second."""
    return boto3.session.Session()


class TransferError(Exception):
    """The transfer failed, in the words of the job's FailureReason."""


class NothingThere(TransferError):
    """The prefix covers no object."""


class Cancelled(Exception):
    """The job was stopped during the transfer."""


def split(uri: str) -> tuple[str, str]:
    """`s3://bucket/key` as (bucket, key)."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise TransferError(f"ClientError: {uri!r} is not an S3 URI of the form s3://bucket/key.")
    return bucket, key


class Transfers:
    """S3 as one role."""

    def __init__(self, environment: dict[str, str], role: str, cancelled: Callable[[], bool] = lambda: False) -> None:
        """`environment` is what `host.role_environment` gives; downloads raise Cancelled once `cancelled()` is true."""
        self.role = role
        self.cancelled = cancelled
        self.region = environment["AWS_REGION"]
        self._environment = environment

    @functools.cached_property
    def s3(self) -> Any:
        """The client, made on first use: it costs tens of milliseconds, and not on the event loop."""
        with _session_lock:  # boto3's client factory is not thread-safe
            return _session().client(
                "s3",
                endpoint_url=self._environment["AWS_ENDPOINT_URL"],
                region_name=self.region,
                aws_access_key_id=self._environment["AWS_ACCESS_KEY_ID"],
                aws_secret_access_key=self._environment["AWS_SECRET_ACCESS_KEY"],
                aws_session_token=self._environment.get("AWS_SESSION_TOKEN"),
                config=Config(
                    s3={"addressing_style": "path"}, max_pool_connections=PARALLEL, retries={"max_attempts": 3}
                ),
            )

    def exists(self, uri: str) -> bool:
        """Whether the object is there and may be read."""
        try:
            bucket, key = split(uri)
            self.s3.head_object(Bucket=bucket, Key=key)
        except (TransferError, ClientError, BotoCoreError):
            return False
        return True

    def download(self, uri: str, data_type: str, folder: Path) -> int:
        """Brings an S3Prefix or a ManifestFile into `folder` (made if need be). Returns the number of files."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            objects = list(self._manifest(uri) if data_type == "ManifestFile" else self._prefix(uri))
        except (ClientError, BotoCoreError) as error:
            raise TransferError(f"ClientError: Data download failed:{reason(error)} ({uri})") from error
        for _, _, name in objects:
            if ".." in name.split("/"):
                raise TransferError(f"ClientError: Data download failed:{name!r} leaves the channel's folder.")
        self._each(lambda item: self._fetch(item[0], item[1], folder / item[2].lstrip("/")), objects)
        return len(objects)

    def _each(self, function: Callable[[Any], None], items: list) -> None:
        """A few at once; the first failure gives up those that have not begun."""
        if items:
            self.s3  # noqa: B018  # made once, before the threads share it
            with ThreadPoolExecutor(PARALLEL) as pool:
                for _ in pool.map(function, items):
                    pass

    def _prefix(self, uri: str) -> Iterable[tuple[str, str, str]]:
        """(bucket, key, path under the channel) of every object that the prefix covers."""
        bucket, prefix = split(uri)
        found = False
        for page in self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                key = item["Key"]
                if not key.endswith("/"):
                    found = True
                    yield bucket, key, relative_name(key, prefix)
        if not found:
            raise NothingThere(
                f'ClientError: Data download failed:No S3 objects found under S3 URL "{uri}" given in input data '
                f"source. Please ensure that the bucket exists in the selected region ({self.region}), that objects "
                f'exist under that S3 prefix, and that the role "{self.role}" has "s3:ListBucket" permissions on '
                f'bucket "{bucket}".'
            )

    def _manifest(self, uri: str) -> Iterable[tuple[str, str, str]]:
        """The same for a manifest: `[{"prefix": "s3://bucket/folder/"}, "one", "two"]`, under the keys' own names.

        A key is the prefix with the name put behind it, without a slash between them.
        """
        bucket, key = split(uri)
        try:
            entries = json.loads(self.s3.get_object(Bucket=bucket, Key=key)["Body"].read())
            prefix_bucket, prefix = split(entries[0]["prefix"])
            names = [str(name) for name in entries[1:]]
        except (ValueError, LookupError, TypeError) as error:
            raise TransferError(
                f"ClientError: Data download failed:the manifest {uri} is not a list that starts "
                f'with {{"prefix": "s3://…"}} and goes on with names ({error}).'
            ) from error
        return [(prefix_bucket, prefix + name, name) for name in names]

    def _fetch(self, bucket: str, key: str, target: Path) -> None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                for block in self.s3.get_object(Bucket=bucket, Key=key)["Body"].iter_chunks(1 << 20):
                    if self.cancelled():
                        raise Cancelled
                    file.write(block)
            if self.cancelled():  # of empty objects there are no blocks
                raise Cancelled
        except (ClientError, BotoCoreError, OSError) as error:  # OSError: one key is another's folder, or a full disk
            raise TransferError(f"ClientError: Data download failed:{reason(error)} (s3://{bucket}/{key})") from error

    def unpack(self, uri: str, folder: Path) -> None:
        """Downloads a tar.gz and unpacks it into `folder`, refusing what would land outside."""
        folder.mkdir(parents=True, exist_ok=True)
        archive = folder.with_name(folder.name + ".tar.gz")
        try:
            self._fetch(*split(uri), archive)
            with tarfile.open(archive, "r:*") as tar:
                tar.extractall(folder, filter="data")
        except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise TransferError(f"ClientError: {uri} could not be unpacked: {error}") from error
        finally:
            archive.unlink(missing_ok=True)

    def pack(self, folder: Path, uri: str) -> None:
        """Uploads a folder's content as a tar.gz."""
        archive = folder.with_name(folder.name + ".upload.tar.gz")
        try:
            # Level 1: the weights in it hardly compress, and the time would be the job's.
            with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
                for path in sorted(folder.iterdir()):
                    tar.add(path, arcname=path.name)
            self._put(archive, uri)
        finally:
            archive.unlink(missing_ok=True)

    def upload(self, folder: Path, uri: str) -> int:
        """Uploads every file of a folder under a prefix. Returns their number."""
        return Mirror(self, folder, uri).sync()

    def _put(self, path: Path, uri: str) -> None:
        bucket, key = split(uri)
        try:
            with path.open("rb") as file:
                self.s3.put_object(Bucket=bucket, Key=key, Body=file)
        except FileNotFoundError:  # a mirrored file that is gone again
            raise
        except (ClientError, BotoCoreError, OSError) as error:
            raise TransferError(f"ClientError: Data upload failed:{reason(error)} ({uri})") from error


class Mirror:
    """A folder whose files are uploaded under a prefix while they are written: each state of a file once.

    Nothing is removed from S3.
    """

    def __init__(self, transfers: Transfers, folder: Path, uri: str) -> None:
        self.transfers, self.folder, self.uri = transfers, folder, uri.rstrip("/")
        self._sent: dict[Path, tuple[int, int]] = {}  # path: (size, time of change) of what S3 has
        self._seen: dict[Path, tuple[int, int]] = {}  # at the last look

    def _look(self) -> dict[Path, tuple[int, int]]:
        found = {}
        for path in sorted(self.folder.rglob("*")) if self.folder.is_dir() else []:
            with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    found[path] = (status.st_size, status.st_mtime_ns)
        return found

    def same(self) -> None:
        """What is in the folder now came from S3."""
        self._sent = self._look()

    def sync(self, settled: bool = False) -> int:
        """Uploads what is new or changed, `settled`: unless it changed since the last look. Returns their number."""
        now = self._look()
        due = [
            path
            for path, state in now.items()
            if self._sent.get(path) != state and (not settled or self._seen.get(path) == state)
        ]
        self._seen = now

        def send(path: Path) -> None:
            with contextlib.suppress(FileNotFoundError):
                self.transfers._put(path, f"{self.uri}/{path.relative_to(self.folder).as_posix()}")
                self._sent[path] = now[path]

        self.transfers._each(send, due)
        return len(due)


def reason(error: Exception) -> str:
    """A failed request as FailureReason has it: `NoSuchKey (404): The specified key does not exist.`"""
    if isinstance(error, ClientError):
        details = error.response.get("Error", {})
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")
        return f"{details.get('Code', '')} ({status}): {details.get('Message', '')}"
    return str(error)


def relative_name(key: str, prefix: str) -> str:
    """Where an object lands under its channel: its key without the prefix, as SageMaker does it.

    >>> relative_name("data/train/a/1.jpg", "data/train")
    'a/1.jpg'
    >>> relative_name("data/model.tar.gz", "data/model.tar.gz")
    'model.tar.gz'
    >>> relative_name("data/train-2/1.jpg", "data/train")
    'train-2/1.jpg'
    """
    if prefix and not prefix.endswith("/") and key.startswith(prefix + "/"):
        return key[len(prefix) + 1 :]
    return key[prefix.rfind("/") + 1 :]
