"""What the tests of the whole application share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `sam build` puts the application: whoever comes second finds it built."""
    return tmp_path_factory.mktemp("build")
