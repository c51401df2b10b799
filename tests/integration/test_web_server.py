"""The emulator's web server: what clients of AWS do with a connection."""

import hashlib
import json
import os
import signal
import socket
import threading

import boto3
import psutil
import pytest
from boto3.s3.transfer import TransferConfig
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials

from local.emulator import HOST, Emulator
from tests.makers.waiting import wait_for

LARGE = 40_000_000


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    with Emulator(state=tmp_path_factory.mktemp("web") / "state") as emulator:
        client(emulator).create_bucket(Bucket="web")
        yield emulator


def client(aws, service="s3", **more):
    return boto3.client(
        service,
        endpoint_url=aws.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
        **more,
    )


def connected(aws):
    return socket.create_connection((HOST, aws.port), timeout=30)


def signed(aws, method, path):
    """The bytes of a request of the root's, without a body."""
    request = AWSRequest(method, aws.endpoint_url + path)
    S3SigV4Auth(Credentials("test", "test"), "s3", "us-east-1").add_auth(request)
    head = [f"{method} {path} HTTP/1.1", f"Host: {HOST}:{aws.port}", *(f"{k}: {v}" for k, v in request.headers.items())]
    return ("\r\n".join(head) + "\r\n\r\n").encode()


def answered(stream, head=False):
    """The next answer of a connection: (status, body)."""
    status = int(stream.readline().split()[1])
    fields = dict(line.decode().lower().split(": ", 1) for line in iter(stream.readline, b"\r\n"))
    return status, b"" if head else stream.read(int(fields["content-length"]))


def test_large_objects_arrive_whole_in_one_piece_and_in_parts(aws):
    data, s3 = os.urandom(LARGE), client(aws)
    s3.put_object(Bucket="web", Key="whole", Body=data)  # waits for 100 Continue
    parts = TransferConfig(multipart_threshold=8_000_000, multipart_chunksize=8_000_000)
    (file := aws.state / "file").write_bytes(data)
    s3.upload_file(str(file), "web", "parts", Config=parts)
    for key in ("whole", "parts"):
        found = s3.get_object(Bucket="web", Key=key)["Body"].read()
        assert hashlib.sha256(found).digest() == hashlib.sha256(data).digest()
        assert s3.head_object(Bucket="web", Key=key)["ContentLength"] == LARGE


def test_keys_and_metadata_are_what_was_sent(aws):
    s3, key = client(aws), "a b+c%20d//e\n#?&'\u00fc\U0001f600"
    s3.put_object(Bucket="web", Key=key, Body=b"x", Metadata={"Mixed-Case": "a, b"})
    assert s3.get_object(Bucket="web", Key=key)["Metadata"] == {"mixed-case": "a, b"}
    assert key in [found["Key"] for found in s3.list_objects_v2(Bucket="web")["Contents"]]


def test_requests_in_one_packet_are_answered_in_order_and_each_with_its_own_caller(aws):
    client(aws).put_object(Bucket="web", Key="first", Body=b"1")
    anonymous = f"GET /web/first HTTP/1.1\r\nHost: {HOST}:{aws.port}\r\n\r\n".encode()
    with connected(aws) as raw, raw.makefile("rb") as stream:
        raw.sendall(signed(aws, "GET", "/web/first") + signed(aws, "HEAD", "/web/first") + anonymous)
        assert answered(stream) == (200, b"1")
        assert answered(stream, head=True)[0] == 200
        assert answered(stream)[0] == 403


def test_what_is_no_http_is_refused_and_the_next_request_is_not(aws):
    with connected(aws) as raw, raw.makefile("rb") as stream:
        raw.sendall(b"nonsense\r\n\r\n")
        assert answered(stream)[0] == 400
    assert client(aws).list_buckets()["Buckets"]


def test_connections_of_clients_that_are_gone_are_let_go_of(aws):
    process = psutil.Process(aws.pid)
    before = process.num_fds()
    for _ in range(300):
        with connected(aws) as raw:
            raw.sendall(f"GET /_ministack/health HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
            assert raw.recv(12) == b"HTTP/1.1 200"
    wait_for(lambda: process.num_fds() < before + 20)


def test_who_asks_is_the_connections_peer_whatever_a_header_says(aws):
    iam = client(aws, "iam")
    iam.create_user(UserName="asker")
    elsewhere = {"IpAddress": {"aws:SourceIp": "203.0.113.9/32"}}
    statements = [
        {"Effect": "Allow", "Action": "s3:*", "Resource": "*"},
        {"Effect": "Deny", "Action": "s3:*", "Resource": "*", "Condition": elsewhere},
    ]
    policy = json.dumps({"Version": "2012-10-17", "Statement": statements})
    iam.put_user_policy(UserName="asker", PolicyName="p", PolicyDocument=policy)
    key = iam.create_access_key(UserName="asker")["AccessKey"]
    s3 = boto3.client(
        "s3",
        endpoint_url=aws.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id=key["AccessKeyId"],
        aws_secret_access_key=key["SecretAccessKey"],
    )
    forwarded = {"X-Forwarded-For": "203.0.113.9"}
    s3.meta.events.register("before-send.s3", lambda request, **_: request.headers.update(forwarded))
    assert s3.list_objects_v2(Bucket="web")["Name"] == "web"


def test_a_stop_in_the_middle_of_requests_ends_it_all(tmp_path):
    with Emulator(state=tmp_path / "state") as aws:
        s3 = client(aws, config=Config(retries={"total_max_attempts": 1}))
        s3.create_bucket(Bucket="web")
        over, done = threading.Event(), []

        def put():
            while not over.is_set():
                try:
                    s3.put_object(Bucket="web", Key="k", Body=bytes(5_000_000))
                    done.append(1)
                except Exception:
                    return

        putting = [threading.Thread(target=put) for _ in range(3)]
        for thread in putting:
            thread.start()
        half = connected(aws)
        half.sendall(b"PUT /web/half HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n123")  # and never the rest
        wait_for(lambda: len(done) > 3)
        os.kill(aws.pid, signal.SIGTERM)
        try:
            wait_for(lambda: not aws.running())
        finally:
            over.set()
            half.close()
        for thread in putting:
            thread.join(30)
        assert "failed" not in aws.log.read_text()
