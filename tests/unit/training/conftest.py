from pathlib import Path

import pytest

from tests.unit.training.jobs import prepare, write_snapshot


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_snapshot(tmp_path_factory.mktemp("snapshot"), broken=1)


@pytest.fixture(scope="session")
def prepared(snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "prepared"
    prepare(snapshot, folder)
    return folder
