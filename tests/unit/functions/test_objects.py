"""The short way to an object's bytes, over real HTTP; what moto and the SDK do is tested with the functions."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from common import aws, objects
from common.errors import OutOfTime
from common.events import ObjectEvent

KEY = "inbox/a b+c%20&=?#'ö//../x.jpg"


class S3(BaseHTTPRequestHandler):
    """Answers with the status it is told to, and remembers what it was asked."""

    protocol_version = "HTTP/1.1"
    status = 200
    cut = 0  # how many answers break off in the middle
    asked: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Authorization"]))
        self.send_response(self.status)
        self.send_header("Content-Length", "4")
        self.end_headers()
        if self.cut:
            type(self).cut -= 1
            self.wfile.write(b"da")
            self.close_connection = True
        else:
            self.wfile.write(b"data")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[S3]]:
    class Handler(S3):
        asked = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "eu-west-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    caches = (aws.client, objects._http, objects._credentials)
    for cached in caches:
        cached.cache_clear()
    yield Handler
    for cached in caches:
        cached.cache_clear()
    server.shutdown()


def test_the_version_is_asked_for_under_its_very_key_and_signed(s3):
    assert objects.fetch(ObjectEvent("b", KEY, "v/1", "0", size=4)) == b"data"
    [(path, authorization)] = s3.asked
    assert path == "/b/inbox/a%20b%2Bc%2520%26%3D%3F%23%27%C3%B6//../x.jpg?versionId=v%2F1"
    assert (
        authorization.startswith("AWS4-HMAC-SHA256 Credential=key/") and "/eu-west-1/s3/aws4_request" in authorization
    )


def test_whatever_is_no_plain_success_is_left_to_the_sdk(s3):
    event = ObjectEvent("b", KEY, "v1", "0", size=4)
    for s3.status in (404, 403, 503, 301):
        assert objects._quickly(event) is None


def test_a_download_that_breaks_off_is_begun_again_and_one_that_trickles_is_given_up(s3, monkeypatch):
    event = ObjectEvent("b", KEY, "v1", "0", size=4)
    s3.cut = 1
    assert objects.fetch(event) == b"data"
    assert len(s3.asked) == 2
    s3.cut, send = 1, objects._http().send

    def lax(request):
        response = send(request)
        response.raw.enforce_content_length = False  # as urllib3 1
        return response

    with monkeypatch.context() as patch:
        patch.setattr(objects._http(), "send", lax)
        assert objects.fetch(event) == b"data"
    monkeypatch.setattr(objects, "PIECE", 3)
    with pytest.raises(OutOfTime, match="at 3 of 4 bytes"):
        objects.fetch(event, until=0)
