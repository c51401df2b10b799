"""What outlives the emulator, and what must not."""

import os
import signal
import textwrap
import uuid

import boto3
import psutil

from local.emulator import Emulator
from tests.makers.sagemaker import BUCKET, SERVER, World, alive, archive, until


def connect(emulator: Emulator, service: str):
    return boto3.client(
        service,
        endpoint_url=emulator.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


def unique(name: str) -> str:
    """A name by which processes are looked for: not that of another run of these tests, nor the beginning of one."""
    return f"{name}-{uuid.uuid4().hex}"


STARTS_OTHERS = """
    import os, signal, subprocess, sys, time
    sleep = "import time; time.sleep(300)  # " + os.environ["TRAINING_JOB_NAME"]
    subprocess.Popen([sys.executable, "-c", sleep])
    subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True)
    checkpoint = os.path.join(os.path.dirname(os.environ["SM_MODEL_DIR"]), "checkpoints", "weights")
    if os.path.isdir(os.path.dirname(checkpoint)):
        open(checkpoint, "w").write("half way")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(300)
"""


def test_a_kill_leaves_no_orphan_and_a_restart_brings_endpoints_back(tmp_path):
    images, name = tmp_path / "images", unique("orphan")
    (images / "server").mkdir(parents=True)
    (images / "server" / "__main__.py").write_text(textwrap.dedent(SERVER))
    environment = {"HOUNDLOOP_IMAGES": str(images), "HOUNDLOOP_PRELOAD": "json", "S3_PERSIST": "1"}
    with Emulator(state=tmp_path / "state", auth=False, keep=True, environment=environment) as emulator:
        first = World(emulator)
        first.model("kept", "kept")
        first.sagemaker.create_endpoint(EndpointName="kept", EndpointConfigName="kept")
        first.endpoint("kept", "InService")
        source = first.put("code/others.tar.gz", archive(train_py=STARTS_OTHERS))
        first.train(name, hyperparameters={"sagemaker_submit_directory": source})
        until(lambda: alive(f"# {name}"), lambda pids: len(pids) == 2, 30)
        servers = alive(str(images / "server"))
        assert len(servers) == 2
        os.kill(emulator.pid, signal.SIGSTOP)
        os.kill(servers[0], signal.SIGKILL)  # of which the emulator is told, and does not hear
        until(lambda: psutil.pid_exists(servers[0]), lambda there: not there, 10)
        os.kill(emulator.pid, signal.SIGKILL)
        until(lambda: alive(f"# {name}") + alive(str(images / "server")), lambda pids: not pids, 15)
    with Emulator(state=tmp_path / "state", auth=False, keep=True, environment=environment) as emulator:
        client = connect(emulator, "sagemaker")
        job = client.describe_training_job(TrainingJobName=name)
        assert job["TrainingJobStatus"] == "Failed" and "InternalServerError" in job["FailureReason"]
        found = until(
            lambda: client.describe_endpoint(EndpointName="kept"),
            lambda seen: seen["EndpointStatus"] in ("InService", "Failed"),
            30,
        )
        assert found["EndpointStatus"] == "InService", found
    assert not alive(str(images / "server"))


def warden_of(emulator: Emulator) -> psutil.Process:
    """The parent of the emulator's jobs."""
    children = psutil.Process(emulator.pid).children()
    [warden] = [child for child in children if "warden.py" in " ".join(child.cmdline())]
    return warden


def test_when_the_warden_is_killed_its_jobs_fail_and_the_next_ones_run(tmp_path):
    name = unique("bereft")
    with Emulator(state=tmp_path / "state", auth=False, environment={"HOUNDLOOP_PRELOAD": "json"}) as emulator:
        world = World(emulator)
        world.train(name, hyperparameters={"mode": "sleep"})
        until(lambda: alive(f"# {name}"), lambda pids: len(pids) == 2, 30)
        warden_of(emulator).kill()
        assert "ExitCode -9" in world.trained(name, "Failed")["FailureReason"]
        until(lambda: alive(f"# {name}"), lambda pids: not pids, 10)
        world.train("next")
        assert world.trained("next")["TrainingJobStatus"] == "Completed"


def test_what_a_kill_of_emulator_and_warden_leaves_is_ended_by_the_next_start(tmp_path):
    environment = {"HOUNDLOOP_PRELOAD": "json", "S3_PERSIST": "1"}
    state, name = tmp_path / "state", unique("left-over")
    with Emulator(state=state, auth=False, keep=True, environment=environment) as emulator:
        first = World(emulator)
        source = first.put("code/others.tar.gz", archive(train_py=STARTS_OTHERS))
        first.train(
            name,
            hyperparameters={"sagemaker_submit_directory": source},
            CheckpointConfig={"S3Uri": f"s3://{BUCKET}/checkpoints/{name}"},
        )
        until(lambda: alive(f"# {name}"), lambda pids: len(pids) == 2, 30)
        until(lambda: first.s3.list_objects_v2(Bucket=BUCKET, Prefix=f"checkpoints/{name}/")["KeyCount"], bool, 20)
        warden = warden_of(emulator)
        jobs = warden.children()
        for pid in (emulator.pid, warden.pid):
            os.kill(pid, signal.SIGSTOP)  # so that neither sees the other go
        for pid in (emulator.pid, warden.pid):
            os.kill(pid, signal.SIGKILL)
        psutil.wait_procs(jobs, timeout=10)
        assert not [job for job in jobs if job.is_running()]  # by the kernel, as children of the warden
        assert len(alive(f"# {name}")) == 2  # which nobody has ended
        with Emulator(state=tmp_path / "other", auth=False, environment=environment):
            assert len(alive(f"# {name}")) == 2  # not another emulator's to end
        emulator._process.wait()
        with Emulator(state=state, auth=False, keep=True, environment=environment) as second:
            assert not alive(f"# {name}")
            job = connect(second, "sagemaker").describe_training_job(TrainingJobName=name)
            assert job["TrainingJobStatus"] == "Failed" and job["FailureReason"].startswith("InternalServerError")
            saved = connect(second, "s3").get_object(Bucket=BUCKET, Key=f"checkpoints/{name}/weights")["Body"].read()
            assert saved == b"half way"
            until(lambda: [*map(str, state.glob(f"sagemaker/jobs/*/*/*/{name}/opt"))], lambda found: not found, 10)
