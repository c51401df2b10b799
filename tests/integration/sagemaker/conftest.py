"""One local AWS for all tests of the local SageMaker, with a server image and limits that suit tests."""

import textwrap

import pytest

from local.emulator import Emulator
from tests.makers.sagemaker import SERVER, World, taken_names


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    images = tmp_path_factory.mktemp("images")
    (images / "server").mkdir()
    (images / "server" / "__main__.py").write_text(textwrap.dedent(SERVER))
    (images / "server" / "helper.py").write_text("join = ','.join\n")
    environment = {
        "HOUNDLOOP_IMAGES": str(images),
        "HOUNDLOOP_STOP_GRACE": "1",
        "HOUNDLOOP_MAX_JOBS": "2",
        "HOUNDLOOP_PRELOAD": "json",
        "HOUNDLOOP_HEALTH_TIMEOUT": "5",
    }
    with Emulator(state=tmp_path_factory.mktemp("state"), auth=True, environment=environment) as emulator:
        yield World(emulator)


@pytest.fixture(scope="session")
def taken(world):
    """One of each resource, all with the name that is returned; the endpoint is in service."""
    return taken_names(world)
