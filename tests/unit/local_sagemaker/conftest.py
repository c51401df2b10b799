"""A state folder of its own, and the account and region that a request would bring."""

import pytest
from ministack.core.responses import request_scope

from local.sagemaker.settings import Settings


@pytest.fixture
def settings(tmp_path):
    return Settings(
        state_dir=tmp_path / "sagemaker", checkout=tmp_path, max_jobs=2, stop_grace=0.5, health_timeout=5, preload=()
    )


@pytest.fixture(autouse=True)
def scope():
    with request_scope("000000000000", "us-east-1"):
        yield
