"""What outlives the emulator, and what must not."""

import os
import signal
import textwrap

import boto3

from local.emulator import Emulator
from tests.makers.sagemaker import SERVER, World, alive, until


def test_a_kill_leaves_no_orphan_and_a_restart_brings_endpoints_back(tmp_path):
    images = tmp_path / "images"
    (images / "server").mkdir(parents=True)
    (images / "server" / "__main__.py").write_text(textwrap.dedent(SERVER))
    environment = {"HOUNDLOOP_IMAGES": str(images), "HOUNDLOOP_PRELOAD": "json", "S3_PERSIST": "1"}
    with Emulator(state=tmp_path / "state", auth=False, keep=True, environment=environment) as emulator:
        first = World(emulator)
        first.model("kept", "kept")
        first.sagemaker.create_endpoint(EndpointName="kept", EndpointConfigName="kept")
        first.endpoint("kept", "InService")
        first.train("orphan", hyperparameters={"mode": "sleep"})
        until(lambda: alive("# orphan"), lambda pids: len(pids) >= 2, 30)
        servers = alive(str(images / "server"))
        assert len(servers) == 2
        os.kill(emulator.pid, signal.SIGKILL)
        until(lambda: alive("# orphan") + alive(str(images / "server")), lambda pids: not pids, 10)
    with Emulator(state=tmp_path / "state", auth=False, keep=True, environment=environment) as emulator:
        client = boto3.client(
            "sagemaker",
            endpoint_url=emulator.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        job = client.describe_training_job(TrainingJobName="orphan")
        assert job["TrainingJobStatus"] == "Failed" and "InternalServerError" in job["FailureReason"]
        found = until(
            lambda: client.describe_endpoint(EndpointName="kept"),
            lambda seen: seen["EndpointStatus"] in ("InService", "Failed"),
            30,
        )
        assert found["EndpointStatus"] == "InService", found
    assert not alive(str(images / "server"))
