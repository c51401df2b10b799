"""`make down`, and the file that says where AWS on this machine is."""

from local.demo import keep
from local.stack import ENVIRONMENT


def test_what_was_kept_takes_its_environment_with_it_and_that_of_make_up_stays(tmp_path):
    environment = tmp_path / ENVIRONMENT
    environment.write_text("export AWS_ENDPOINT_URL=…")
    assert not keep.down(tmp_path / "pid") and environment.exists(), "nothing was kept"
    (tmp_path / "pid").write_text("0")  # of a demo that was killed
    assert not keep.down(tmp_path / "pid") and not environment.exists()
