"""What can be said before anything starts: ports, parameters, hashes, and SageMaker's resources for IAM."""

import socket
import subprocess
import sys

import pytest

from local.emulator import CHECKOUT, HOST, Emulator, EmulatorError, check_port, free_port
from local.seams.sagemaker import further_permissions, resource_arn
from local.stack import parse_overrides, source_hash


def test_a_taken_port_is_one_clear_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EmulatorError) as refused:
            Emulator(port=port, state=tmp_path).start()
        shown = subprocess.run(
            [sys.executable, "-m", "local", "up", "--port", str(port)], cwd=CHECKOUT, capture_output=True, text=True
        )
    assert f"Port {port} on 127.0.0.1 is already in use" in str(refused.value)
    assert "set PORT (or --port)" in str(refused.value)
    assert shown.returncode == 1
    assert shown.stderr.count("\n") == 1, shown.stderr
    assert str(port) in shown.stderr
    assert not (tmp_path / "emulator.log").exists()


@pytest.mark.parametrize("port", [-1, 65536])
def test_what_is_no_port_is_refused(port):
    with pytest.raises(EmulatorError, match="is not a port"):
        check_port(port)


def test_a_free_port_can_be_used():
    check_port(free_port())


def test_help_names_the_commands():
    shown = subprocess.run([sys.executable, "-m", "local", "--help"], cwd=CHECKOUT, capture_output=True, text=True)
    assert shown.returncode == 0
    assert "up" in shown.stdout


@pytest.mark.parametrize("given", ["Name=a Words='b c' Url=x=y", ["Name=a", "Words=b c", "Url=x=y"]])
def test_parameter_overrides_of_samconfig(given):
    assert parse_overrides(given) == {"Name": "a", "Words": "b c", "Url": "x=y"}


def test_the_source_hash_sees_contents_and_names_but_no_caches(tmp_path):
    (tmp_path / "functions").mkdir()
    file = tmp_path / "functions" / "a.py"
    file.write_text("1")
    before = source_hash(tmp_path)
    (tmp_path / "functions" / "__pycache__").mkdir()
    (tmp_path / "functions" / "__pycache__" / "a.pyc").write_text("x")
    assert source_hash(tmp_path) == before
    file.write_text("2")
    changed = source_hash(tmp_path)
    assert changed != before
    file.rename(tmp_path / "functions" / "b.py")
    assert source_hash(tmp_path) != changed


PREFIX = "arn:aws:sagemaker:us-east-1:000000000000:"


@pytest.mark.parametrize(
    "action, request_, path, resource",
    [
        ("", {}, "/endpoints/My-Dogs/invocations", "endpoint/my-dogs"),
        ("DescribeEndpoint", {"EndpointName": "dogs"}, "/", "endpoint/dogs"),
        ("UpdateEndpoint", {"EndpointName": "dogs", "EndpointConfigName": "dogs-2"}, "/", "endpoint/dogs"),
        ("CreateEndpointConfig", {"EndpointConfigName": "dogs-2"}, "/", "endpoint-config/dogs-2"),
        ("CreateModelPackage", {"ModelPackageGroupName": "dogs"}, "/", "model-package/dogs/1"),
        (
            "DescribeModelPackageGroup",
            {"ModelPackageGroupName": PREFIX + "model-package-group/dogs"},
            "/",
            "model-package-group/dogs",
        ),
        ("CreateHyperParameterTuningJob", {"HyperParameterTuningJobName": "T"}, "/", "hyper-parameter-tuning-job/t"),
    ],
)
def test_the_resource_of_a_sagemaker_action(action, request_, path, resource):
    assert resource_arn(action, request_, path, "us-east-1", "000000000000") == PREFIX + resource


def test_lists_are_about_no_resource():
    assert resource_arn("ListEndpoints", {}, "/", "us-east-1", "000000000000") == "*"


def test_what_a_request_needs_beside_its_action():
    needed = list(
        further_permissions(
            "CreateHyperParameterTuningJob",
            {
                "HyperParameterTuningJobName": "t",
                "Tags": [{"Key": "a", "Value": "b"}],
                "TrainingJobDefinition": {"RoleArn": "arn:aws:iam::000000000000:role/jobs"},
            },
            "us-east-1",
            "000000000000",
        )
    )
    assert needed == [
        ("iam:PassRole", "arn:aws:iam::000000000000:role/jobs", {"iam:PassedToService": "sagemaker.amazonaws.com"}),
        ("sagemaker:AddTags", PREFIX + "hyper-parameter-tuning-job/t", {}),
    ]
    assert ("sagemaker:UpdateEndpoint", PREFIX + "endpoint-config/c", {}) in list(
        further_permissions(
            "UpdateEndpoint", {"EndpointName": "e", "EndpointConfigName": "c"}, "us-east-1", "000000000000"
        )
    )
