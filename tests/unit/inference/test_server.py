"""The server as SageMaker meets it: a process on a port, from its start to SIGTERM."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import predictor
from channel import Kind
from settings import Settings
from tests.makers.corpus import broken
from tests.makers.images import encode, picture, png_header
from tests.makers.models import make_artifact
from worker import own_memory, respond

INFERENCE = Path(predictor.__file__).parent
CROPS = "application/x-rgb-crops"
UNFINISHED = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\nab"
RED, BLUE = bytes((255, 0, 0)) * 1024, bytes((0, 0, 255)) * 1024


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def call(port: int, path: str = "/invocations", body: bytes | None = None, kind: str = CROPS, method: str = "") -> Any:
    """Status and JSON of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, {"Content-Type": kind})
        response = connection.getresponse()
        assert response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(response.read())
    finally:
        connection.close()


class Running:
    """A server process. `slow`: seconds that each picture is made to take, by a wrapper around the predictor."""

    def __init__(self, folder: Path, slow: float = 0, **environment: str) -> None:
        self.port = free_port()
        variables = {"MODEL_DIR": str(folder), "SAGEMAKER_BIND_TO_PORT": str(self.port), "WORKERS": "1"} | environment
        command = [sys.executable, str(INFERENCE), "serve"]
        if slow:
            code = f"""
import sys, time, runpy
sys.path.insert(0, {str(INFERENCE)!r})
import predictor
predict = predictor.Predictor.predict
predictor.Predictor.predict = lambda self, images: (time.sleep({slow} * (len(images) - 1)), predict(self, images))[1]
sys.argv = ["inference", "serve"]
runpy.run_path({str(INFERENCE)!r}, run_name="__main__")
"""
            command = [sys.executable, "-c", code]
        self.process = subprocess.Popen(
            command, env=os.environ | variables, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.started = time.monotonic()

    def wait_until_healthy(self, seconds: float = 20) -> float:
        while time.monotonic() - self.started < seconds and self.process.poll() is None:
            try:
                if call(self.port, "/ping")[0] == 200:
                    return time.monotonic() - self.started
            except OSError:
                time.sleep(0.02)
        raise AssertionError(f"not healthy: {self.end()}")

    def end(self) -> str:
        """What it wrote to its log; the process is gone afterwards."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.communicate()[1]


@contextmanager
def running(folder: Path, slow: float = 0, **environment: str) -> Iterator[Running]:
    server = Running(folder, slow, **environment)
    try:
        server.wait_until_healthy()
        yield server
    finally:
        server.end()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("artifact"))


@pytest.fixture(scope="module")
def server(artifact) -> Iterator[int]:
    with running(artifact, DEPLOYMENT="3", MODEL_VERSION="260101000000", MAX_PAYLOAD_BYTES="300000") as process:
        yield process.port


def test_ping_is_200_and_says_who_answers(server):
    assert call(server, "/ping") == (200, {"model_version": "260101000000", "deployment": 3})


def test_a_batch_of_crops_is_answered_in_its_order(server):
    status, answer = call(server, body=RED + BLUE + RED)
    assert status == 200
    assert (answer["model_version"], answer["deployment"]) == ("260101000000", 3)
    assert [entry["classes"][0]["class"] for entry in answer["predictions"]] == ["red", "blue", "red"]
    assert 0.9 < answer["predictions"][0]["classes"][0]["probability"] <= 1
    assert sum(entry["probability"] for entry in answer["predictions"][0]["classes"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_one_picture_is_prepared_by_the_server(server, format):
    from PIL import Image

    blue = encode(Image.new("RGB", (90, 60), (0, 0, 255)), format)
    status, answer = call(server, body=blue, kind=f"image/{format.lower()}; charset=binary")
    assert status == 200 and [entry["classes"][0]["class"] for entry in answer["predictions"]] == ["blue"]


def test_the_same_picture_gets_the_same_answer_as_its_crop(server):
    from preprocessing import Preprocess, crop

    data = encode(picture(200, 150), "JPEG")
    by_picture, by_crop = (
        call(server, body=data, kind="image/jpeg"),
        call(server, body=crop(data, Preprocess.default(32))),
    )
    assert by_picture == by_crop and by_crop[0] == 200


@pytest.mark.parametrize(("data", "reason"), [pytest.param(*case, id=name) for name, *case in broken()])
def test_a_broken_picture_is_a_400_with_the_reason(server, data, reason):
    status, answer = call(server, body=data, kind="image/jpeg")
    assert (status, answer["error"]["code"]) == (400, "BrokenImage")
    assert reason in answer["error"]["message"]


@pytest.mark.parametrize(
    "request_, expected",
    [
        ({"body": RED[:-1]}, (400, "WrongCropSize")),
        ({"body": b""}, (400, "WrongCropSize")),
        ({"body": bytes(300_001)}, (413, "PayloadTooLarge")),
        ({"body": bytes(3_000_000), "kind": "image/png"}, (413, "PayloadTooLarge")),
        ({"body": RED, "kind": "application/json"}, (415, "UnsupportedMediaType")),
        ({"body": RED, "kind": ""}, (415, "UnsupportedMediaType")),
        ({"path": "/"}, (404, "NotFound")),
        ({"path": "/invocations"}, (405, "MethodNotAllowed")),
        ({"path": "/ping", "body": b"x"}, (405, "MethodNotAllowed")),
    ],
)
def test_a_request_that_cannot_be_served_says_why(server, request_, expected):
    status, answer = call(server, **request_)
    assert (status, answer["error"]["code"]) == expected
    assert answer["error"]["message"]
    assert call(server, "/ping")[0] == 200


def test_a_picture_that_takes_more_memory_than_there_is_is_refused_before_it_is_decoded(artifact):
    model, room = predictor.Predictor(artifact), 400_000_000
    message = "too large to decode here: 10000x10000 pixels take 505 MB, and a worker has 400 MB"
    refused = respond(model, Kind.PICTURE, memoryview(png_header(10_000, 10_000)), room)
    assert refused == (Kind.REFUSED, {"code": "BrokenImage", "message": message})
    assert respond(model, Kind.PICTURE, memoryview(encode(picture(40, 40))), room)[0] is Kind.ANSWERED


def test_a_worker_may_take_its_share_of_the_containers_memory(monkeypatch, tmp_path):
    limit, machine = tmp_path / "memory.max", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr("settings.MEMORY_LIMITS", (limit, tmp_path / "none"))
    for told, all_of_it in (("max\n", machine), ("800000000\n", 800_000_000), (str(2**63 - 4096), machine)):
        limit.write_text(told)
        assert Settings.from_environment("model", workers=4).memory == all_of_it // 4
    assert 10_000_000 < own_memory() < psutil.Process().memory_info().rss


def test_a_body_in_chunks_is_limited_too(server):
    connection = http.client.HTTPConnection("127.0.0.1", server, timeout=20)
    connection.request("POST", "/invocations", (bytes(50_000) for _ in range(10)), {"Content-Type": CROPS})
    assert connection.getresponse().status == 413
    connection.close()


def test_a_connection_serves_on_after_a_refusal(server):
    connection = http.client.HTTPConnection("127.0.0.1", server, timeout=20)
    for body, status in [(bytes(400_000), 413), (RED, 200), (RED[1:], 400), (BLUE, 200)]:
        connection.request("POST", "/invocations", body, {"Content-Type": CROPS})
        response = connection.getresponse()
        response.read()
        assert response.status == status
    connection.close()


def test_clients_that_go_away_leave_nothing_behind(artifact):
    with running(artifact, QUEUE_SIZE="2") as server:
        for _ in range(6):
            with socket.create_connection(("127.0.0.1", server.port)) as half:
                half.sendall(UNFINISHED)
            time.sleep(0.05)
        assert call(server.port, body=RED)[0] == 200


def test_a_client_that_goes_away_gives_up_its_place_in_the_queue(artifact):
    """GIVEN room for two, one at work WHEN the one that waits goes away THEN nobody works for it."""
    body = RED * 40  # sixteen seconds of work
    head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: {CROPS}\r\nContent-Length: {len(body)}\r\n\r\n"
    settings = {"QUEUE_SIZE": "2", "REQUEST_TIMEOUT": "5"}
    with running(artifact, slow=0.4, **settings) as server, ThreadPoolExecutor(1) as client:
        first = client.submit(call, server.port, "/invocations", RED * 6)
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", server.port)) as leaving:
            leaving.sendall(head.encode() + body)
            assert until(lambda: call(server.port, body=RED)[0] == 429)
        assert first.result()[0] == 200
        assert call(server.port, body=RED)[0] == 200


def test_overload_is_429_while_ping_answers_at_once(artifact):
    """GIVEN room for 4 requests of half a second WHEN 12 come THEN 4 are answered, 8 turned away, and none failed."""
    with running(artifact, slow=0.5, QUEUE_SIZE="4") as server, ThreadPoolExecutor(12) as clients:
        answers = [clients.submit(call, server.port, "/invocations", RED + RED) for _ in range(12)]
        time.sleep(0.3)
        began = time.monotonic()
        assert call(server.port, "/ping")[0] == 200
        assert time.monotonic() - began < 0.2
        statuses = sorted(answer.result()[0] for answer in answers)
        assert statuses == [200] * 4 + [429] * 8
        assert call(server.port, body=RED)[0] == 200, "the queue is free again"


def test_a_request_past_its_deadline_is_429_and_leaves_the_queue(artifact):
    with running(artifact, slow=0.8, REQUEST_TIMEOUT="0.5") as server, ThreadPoolExecutor(3) as clients:
        answers = [clients.submit(call, server.port, "/invocations", RED + RED) for _ in range(3)]
        assert {(status, answer["error"]["code"]) for status, answer in (a.result() for a in answers)} == {
            (429, "DeadlineExceeded")
        }
        time.sleep(0.5)
        assert call(server.port, body=RED)[0] == 200, "only the one at work ran to its end"


def test_a_body_that_never_comes_is_given_up(artifact):
    with (
        running(artifact, REQUEST_TIMEOUT="0.3") as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as slow,
    ):
        slow.sendall(UNFINISHED)
        assert b"400 Bad Request" in slow.recv(1000)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_lets_the_requests_at_work_finish(artifact, workers):
    with running(artifact, slow=0.6, WORKERS=workers) as server, ThreadPoolExecutor(2) as clients:
        answers = [clients.submit(call, server.port, "/invocations", RED + BLUE) for _ in range(2)]
        time.sleep(0.3)
        server.process.terminate()
        assert [answer.result()[0] for answer in answers] == [200, 200]
        assert server.process.wait(timeout=10) == 0
        with pytest.raises(OSError):
            call(server.port, "/ping")


def test_sigterm_while_the_model_loads_ends_it(artifact):
    server = Running(artifact, WORKERS="2")
    time.sleep(0.25)
    server.process.terminate()
    assert server.process.wait(timeout=10) in (0, -signal.SIGTERM)
    server.end()


def front_and_workers(server: Running) -> tuple[psutil.Process, list[psutil.Process]]:
    """The process that listens, and the others below the supervisor."""
    children = psutil.Process(server.process.pid).children()
    fronts = [child for child in children if child.net_connections("tcp")]
    assert len(fronts) == 1
    return fronts[0], [child for child in children if child != fronts[0]]


def workers_of(server: Running) -> set[int]:
    return {worker.pid for worker in front_and_workers(server)[1]}


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def until(condition, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_worker_that_dies_is_put_back_and_nobody_notices(artifact):
    with running(artifact, WORKERS="2") as server:
        first = workers_of(server)
        assert len(first) == 2
        for worker in first:  # all of them: what comes now waits for the new ones
            os.kill(worker, signal.SIGKILL)
        assert call(server.port, body=RED)[0] == 200
        assert until(lambda: len(workers_of(server) - first) == 2)


def test_ping_is_false_while_no_worker_can_answer(artifact):
    """Until another is there for the one that hangs."""
    with running(artifact, REQUEST_TIMEOUT="1") as server, ThreadPoolExecutor(1) as client:
        os.kill(*workers_of(server), signal.SIGSTOP)
        client.submit(call, server.port, body=RED)
        assert until(lambda: call(server.port, "/ping")[0] == 503)
        assert until(lambda: call(server.port, "/ping")[0] == 200)


def test_a_request_that_kills_its_worker_costs_that_request_only(artifact):
    """GIVEN one worker and a queue WHEN the request at work kills it THEN the others are answered by the next one."""
    with running(artifact, slow=0.3) as server, ThreadPoolExecutor(5) as clients:
        deadly = clients.submit(call, server.port, "/invocations", RED * 4)  # at work for a second
        time.sleep(0.3)
        others = [clients.submit(call, server.port, "/invocations", RED + BLUE) for _ in range(4)]
        time.sleep(0.2)
        os.kill(*workers_of(server), signal.SIGKILL)
        status, answer = deadly.result()
        assert (status, answer["error"]["code"]) == (500, "WorkerDied")
        assert [other.result()[0] for other in others] == [200] * 4


def test_a_worker_that_dies_while_the_server_drains_is_put_back(artifact):
    with running(artifact, slow=0.5) as server, ThreadPoolExecutor(3) as clients:
        deadly = clients.submit(call, server.port, "/invocations", RED * 4)
        time.sleep(0.3)
        others = [clients.submit(call, server.port, "/invocations", RED + BLUE) for _ in range(2)]
        time.sleep(0.2)
        workers = workers_of(server)
        server.process.terminate()
        os.kill(*workers, signal.SIGKILL)
        assert deadly.result()[1]["error"]["code"] == "WorkerDied"
        assert [other.result()[0] for other in others] == [200] * 2
        assert server.process.wait(timeout=10) == 0


def test_a_worker_that_hangs_is_replaced(artifact):
    with running(artifact, REQUEST_TIMEOUT="0.5") as server:
        first = workers_of(server)
        os.kill(*first, signal.SIGSTOP)
        status, answer = call(server.port, body=RED)
        assert (status, answer["error"]["code"]) == (429, "DeadlineExceeded")
        assert until(lambda: call(server.port, body=RED)[0] == 200)
        assert workers_of(server).isdisjoint(first)


def test_a_worker_that_cannot_start_again_ends_the_server(tmp_path):
    make_artifact(tmp_path)
    with running(tmp_path) as server:
        (tmp_path / "model.xml").unlink()
        os.kill(*workers_of(server), signal.SIGKILL)
        assert server.process.wait(timeout=15) == 78


def test_nothing_outlives_a_supervisor_that_dies_while_no_worker_is_ready(artifact):
    server = Running(artifact, WORKERS="2")
    assert until(lambda: len(psutil.Process(server.process.pid).children()) == 3)
    family = psutil.Process(server.process.pid).children()
    for worker in family[1:]:
        worker.suspend()
    server.process.kill()
    server.process.wait()
    for worker in family[1:]:
        worker.kill()
    assert until(lambda: not any(alive(process.pid) for process in family))
    server.end()


def test_nothing_outlives_the_supervisor(artifact):
    with running(artifact, WORKERS="2") as server:
        family = [child.pid for child in psutil.Process(server.process.pid).children()]
        assert len(family) == 3
        server.process.kill()
        server.process.wait()
        assert until(lambda: not any(map(alive, family)))


def test_a_front_that_dies_ends_the_server(artifact):
    with running(artifact, WORKERS="2") as server:
        front, workers = front_and_workers(server)
        front.kill()
        assert server.process.wait(timeout=10) == 1
        assert until(lambda: not any(alive(worker.pid) for worker in workers))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_bad_artifact_ends_the_server_with_the_reason(tmp_path, workers):
    make_artifact(tmp_path)
    (tmp_path / "classes.json").write_text('["red"]')
    server = Running(tmp_path, WORKERS=workers)
    assert server.process.wait(timeout=15) == 78
    assert "classes.json has 1 classes" in server.end()


def test_the_artifact_of_another_version_is_refused(artifact):
    server = Running(artifact, MODEL_VERSION="270101000000")
    assert server.process.wait(timeout=15) == 78
    assert "MODEL_VERSION is 270101000000, the artifact's model_version 260101000000" in server.end()


def test_a_wrong_setting_is_named(artifact):
    server = Running(artifact, QUEUE_SIZE="many")
    assert server.process.wait(timeout=15) == 78
    assert "QUEUE_SIZE is 'many'" in server.end()


@pytest.mark.parametrize("setting", ["MAX_PAYLOAD_BYTES=inf", "REQUEST_TIMEOUT=nan", "RUN_AS=nobody-of-this-name"])
def test_an_impossible_setting_is_one_line(artifact, setting):
    variable, value = setting.split("=")
    if variable == "RUN_AS" and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    server = Running(artifact, **{variable: value})
    assert server.process.wait(timeout=15) == 78
    log = server.end()
    assert f"{variable} is '{value}'" in log and len(log.splitlines()) == 1


def test_a_taken_port_is_one_clear_sentence(artifact):
    with running(artifact) as first:
        second = Running(artifact, SAGEMAKER_BIND_TO_PORT=str(first.port))
        assert second.process.wait(timeout=15) == 1
        assert f"cannot listen on 127.0.0.1:{first.port}" in second.end()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_root_becomes_the_unprivileged_user_before_it_serves(tmp_path):
    """The model directory belongs to root, as on SageMaker; requests are not served as root."""
    make_artifact(tmp_path).chmod(0o700)
    with running(tmp_path, RUN_AS="nobody") as server:
        front, workers = front_and_workers(server)
        assert [process.username() for process in (front, *workers)] == ["nobody", "nobody"]
        assert call(server.port, body=RED)[0] == 200
        os.kill(workers[0].pid, signal.SIGKILL)
        assert call(server.port, body=RED)[0] == 200, "the next one could read the model, too"


def test_memory_is_flat_over_many_requests(artifact):
    with running(artifact) as server:
        processes = psutil.Process(server.process.pid).children()
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        data = encode(picture(300, 200), "JPEG")

        def rounds(count: int) -> int:
            for index in range(count):
                body, kind = ((RED * 4, CROPS), (data, "image/jpeg"), (data[:500], "image/jpeg"))[index % 3]
                connection.request("POST", "/invocations", body, {"Content-Type": kind})
                connection.getresponse().read()
            return sum(process.memory_info().rss for process in processes)

        warm = rounds(600)
        assert rounds(1500) - warm < 6_000_000
        connection.close()


def test_help_lists_the_settings():
    done = subprocess.run(
        [sys.executable, str(INFERENCE), "serve", "--help"], capture_output=True, text=True, check=True
    )
    for word in ("--workers", "--port", "MODEL_DIR", "SAGEMAKER_BIND_TO_PORT", "DEPLOYMENT"):
        assert word in done.stdout
