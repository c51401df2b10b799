"""Puts in the bucket what jobs and the serving image are made of: training source, serving source, pretrained weights.

First step of the workflow, so that `sam deploy` is the only command. Everything is named for the hash of its content:
a second call with the same sources uploads nothing.
"""

import hashlib
import io
import os
import tarfile
import urllib.error
import urllib.request
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.typing import LambdaContext
from botocore.exceptions import ClientError

from common import aws
from common.objects import put_if_absent
from common.tracing import tracer

logger = Logger()

WEIGHTS_SHA256_START = "f37072fd"
WEIGHTS_FILE = f"resnet18-{WEIGHTS_SHA256_START}.pth"  # torchvision's name
WEIGHTS_KEY = f"weights/{WEIGHTS_FILE}"
WEIGHTS_URL = f"https://download.pytorch.org/models/{WEIGHTS_FILE}"


class WeightsUnavailable(RuntimeError):
    """The pretrained weights are neither in the bucket nor to be had from the network."""


class NoSource(RuntimeError):
    """The function was deployed without a layer that holds sources."""


@logger.inject_lambda_context
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    bucket = os.environ["ARTIFACT_BUCKET"]
    serving = files_of("serving_source")
    # The one definition of preprocessing stands with the server; training gets a copy of it.
    training = files_of("training_source") | {"preprocessing.py": serving["preprocessing.py"]}
    serving_hash = content_hash(serving)
    return {
        "code": publish_training(bucket, training),
        "weights": publish_weights(bucket) if os.environ["PRETRAINED_WEIGHTS"] == "imagenet" else None,
        "serving": publish_serving(bucket, serving, serving_hash),
    }


def files_of(package: str) -> dict[str, bytes]:
    """The files of a layer that carries sources as the folder `package`, by path."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise NoSource(f"no layer of this function holds {package}; build and deploy the stack again")
    root = Path(next(iter(spec.submodule_search_locations)))
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def content_hash(files: dict[str, bytes]) -> str:
    """16 hexadecimal digits that change when a name or a byte does."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()[:16]


def publish_training(bucket: str, files: dict[str, bytes]) -> dict[str, str]:
    """For training jobs one archive (script mode), for processing jobs the files as they are."""
    source_hash = content_hash(files)
    prefix = f"code/{source_hash}"
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for name, data in files.items():
        # The wheel is for training alone; evaluating and preparing do without it.
        if not name.endswith(".whl"):
            put_if_absent(bucket, f"{prefix}/files/{name}", data)
    put_if_absent(bucket, f"{prefix}/sourcedir.tar.gz", archive.getvalue())
    return {
        "hash": source_hash,
        "archive": f"s3://{bucket}/{prefix}/sourcedir.tar.gz",
        "files": f"s3://{bucket}/{prefix}/files/",
    }


def publish_serving(bucket: str, files: dict[str, bytes], source_hash: str) -> dict[str, Any]:
    """The image to serve with, or null where CodeBuild has yet to build it from the source named here."""
    if given := os.environ["SERVING_IMAGE_URI"]:
        return {"hash": source_hash, "image": given, "source": None}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, data in files.items():
            zipped.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    key = f"serving/{source_hash}/source.zip"
    put_if_absent(bucket, key, archive.getvalue())
    return {"hash": source_hash, "image": image_with(source_hash), "source": f"{bucket}/{key}"}


def image_with(tag: str) -> str | None:
    """The image that carries `tag`, by digest, so that what was evaluated is what is served."""
    repository = os.environ["SERVING_REPOSITORY"]
    try:
        answer = aws.client("ecr").describe_images(repositoryName=repository, imageIds=[{"imageTag": tag}])
    except ClientError as error:
        if aws.code(error) != "ImageNotFoundException":
            raise
        return None
    return f"{os.environ['SERVING_REPOSITORY_URI']}@{answer['imageDetails'][0]['imageDigest']}"


def publish_weights(bucket: str) -> str:
    """The prefix with the ImageNet weights, fetched once from where torchvision fetches them."""
    uri = f"s3://{bucket}/{WEIGHTS_KEY.rpartition('/')[0]}/"
    try:
        aws.client("s3").head_object(Bucket=bucket, Key=WEIGHTS_KEY)
        return uri
    except ClientError as error:
        if aws.code(error) not in ("404", "NoSuchKey"):
            raise
    try:
        with urllib.request.urlopen(WEIGHTS_URL, timeout=60) as response:
            data = response.read()
    except (urllib.error.URLError, TimeoutError) as error:
        raise WeightsUnavailable(
            f"{WEIGHTS_URL} cannot be fetched ({error}); put the file at s3://{bucket}/{WEIGHTS_KEY}, or deploy with "
            "PretrainedWeights=none and Unfreeze=all"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if not found.startswith(WEIGHTS_SHA256_START):
        raise WeightsUnavailable(f"{WEIGHTS_URL} has sha256 {found[:8]}…, not {WEIGHTS_SHA256_START}…: not used")
    aws.client("s3").put_object(Bucket=bucket, Key=WEIGHTS_KEY, Body=data)
    return uri
