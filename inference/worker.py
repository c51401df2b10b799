"""One worker: a process that decodes and infers, one request at a time, and knows nothing of HTTP."""

from __future__ import annotations

import json
import logging
import mmap
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from channel import Channel, Kind, Message
from predictor import BadArtifact, Predictor
from preprocessing import BrokenImage, inspect, prepare
from privileges import drop_privileges
from settings import BAD_ARTIFACT, Settings

PARENT_CHECK = 1.0  # seconds between looks whether the supervisor is still there

log = logging.getLogger("inference")


class Refused(Exception):
    """The request cannot be answered, for a reason that lies in it: a 400."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def work(channel: Channel, settings: Settings, supervisor: int) -> int:
    """Loads the model, and answers what comes through the channel until the supervisor is gone. The exit status."""
    for ends in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ends, signal.SIG_IGN)  # the supervisor ends workers, when the front needs them no more
    started = time.perf_counter()
    try:
        predictor = Predictor(settings.model_dir, settings.precision)
        if settings.model_version not in ("", predictor.model_version):
            told, found = settings.model_version, predictor.model_version
            raise BadArtifact(
                f"MODEL_VERSION is {told}, the artifact's model_version {found}: the endpoint's model points to "
                "another artifact"
            )
    except (BadArtifact, ValueError) as error:
        log.error("cannot serve: %s", error)
        return BAD_ARTIFACT
    drop_privileges(settings.run_as)
    log.info("model %s is ready after %.2f s", predictor.model_version, time.perf_counter() - started)
    channel.ready(json.dumps({"model_version": predictor.model_version}).encode())
    channel.worker.settimeout(PARENT_CHECK)
    room = settings.memory - own_memory()
    own = os.getpid()
    while os.getppid() == supervisor:
        try:
            message = channel.receive(channel.worker)
        except TimeoutError:
            continue
        if message.process != own:
            continue  # meant for the one before; whoever sent it does so again
        channel.begin(message.number)
        outcome, answer = respond(predictor, message.kind, channel.read(message.length), room)
        length = channel.write([json.dumps(answer).encode()])
        channel.send(channel.worker, Message(outcome, own, message.number, length))
    return 0


def own_memory() -> int:
    """Bytes that this process has and shares with no file; macOS does not say, so none there."""
    with suppress(FileNotFoundError):
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - shared) * mmap.PAGESIZE
    return 0


def respond(predictor: Predictor, kind: Kind, body: memoryview, room: int) -> tuple[Kind, Any]:
    """What becomes of a request: {"classes": …} for each picture, or an error's code and message.

    `room`: bytes of memory for decoding.
    """
    try:
        images = crops(predictor, body) if kind is Kind.CROPS else picture(predictor, body, room)
        return Kind.ANSWERED, [{"classes": classes} for classes in predictor.top(predictor.predict(images))]
    except Refused as refused:
        return Kind.REFUSED, {"code": refused.code, "message": str(refused)}
    except Exception:
        log.exception("a request failed")
        message = "the request failed for a reason that is in the endpoint's log"
        return Kind.FAILED, {"code": "InternalError", "message": message}


def crops(predictor: Predictor, body: memoryview) -> np.ndarray:
    """uint8 [N, size, size, 3] in the very memory that the front wrote to."""
    shape = (predictor.preprocess.size, predictor.preprocess.size, 3)
    size = shape[0] * shape[1] * shape[2]
    if not body or len(body) % size:
        named = "*".join(map(str, shape))
        message = f"{len(body):,} bytes are no whole number of crops of {named} = {size:,} bytes"
        raise Refused("WrongCropSize", message)
    return np.frombuffer(body, np.uint8).reshape(-1, *shape)


def picture(predictor: Predictor, body: memoryview, room: int) -> np.ndarray:
    """uint8 [1, size, size, 3] of a picture's file."""
    size, data = predictor.preprocess.size, bytes(body)
    try:
        header = inspect(data, predictor.preprocess)
        if header.bytes_needed > room:  # a small file can hold 120 megapixels; out of memory, any process ends
            needed = f"{header.width}x{header.height} pixels take {header.bytes_needed / 1e6:,.0f} MB"
            raise BrokenImage(f"too large to decode here: {needed}, and a worker has {max(room, 0) / 1e6:,.0f} MB")
        crop = prepare(data, predictor.preprocess)
    except BrokenImage as broken:
        raise Refused("BrokenImage", str(broken)) from None
    return np.frombuffer(crop.pixels, np.uint8).reshape(1, size, size, 3)
