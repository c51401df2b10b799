"""Each seam finds what it hooks in the installed ministack, and says so clearly when it does not."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from local.emulator import CHECKOUT
from local.seams import SEAMS, TESTED_MINISTACK, SeamMovedError, expect

# What a new ministack might move, and the seam that must notice.
MOVES = {
    "persistence": "import ministack.app as m; m.save_all = lambda: None",
    "transport": "import ministack.app as m; del m.pin_request_origin",
    "metrics": "import ministack.services.cloudwatch as m; m._metrics = {}",
    "queues": "import ministack.core.iam_actions as m; m.extract_iam_action = lambda request: None",
    "policies": "import ministack.core.iam_evaluator as m; del m._fnmatch_compile",
    "partiql": "import ministack.core.iam_actions as m; m.dynamodb_resource_arns = lambda request: []",
    "s3events": "import ministack.services.s3 as m; m._fire_s3_event = lambda bucket: None",
    "functions": "import ministack.core.lambda_runtime as m; m._PYTHON_WORKER_SCRIPT = 'run()'",
    "cloudwatch": "import ministack.services.cloudwatch as m; m._evaluate_alarm = lambda: None",
    "cloudformation": "import ministack.services.cloudformation.provisioners as m; del m._ddb_create",
    "sagemaker": "import ministack.core.router as m; m.SERVICE_PATTERNS = []",
    "autoscaling": "import ministack.core.iam_actions as m; m.request_tag_context = lambda request: None",
    "statelogs": "import ministack.services.cloudwatch_logs as m; del m._put_log_events",
    "history": "import ministack.services.stepfunctions as m; m._apply_parameters = lambda state: {}",
    "passrole": "import ministack.app as m; del m._enforce_data_plane",
    "stepfunctions": "import ministack.services.stepfunctions as m; m._invoke_resource = lambda arn, data: None",
}


def python(program):
    return subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)


def test_every_seam_fits_the_ministack_that_is_installed():
    done = python("from local import seams; seams.install(); print('installed')")
    assert done.stdout.strip() == "installed", done.stderr


def test_every_seam_has_a_move_to_notice():
    assert set(MOVES) == set(SEAMS)


@pytest.mark.parametrize("seam", SEAMS)
def test_a_seam_whose_hook_moved_is_named(seam):
    done = python(f"{MOVES[seam]}\nfrom local import seams; seams.install()")
    assert done.returncode != 0
    assert f"SeamMovedError: ministack {version('ministack')} moved what local/seams/{seam}.py hooks" in done.stderr


def test_the_tested_version_is_the_installed_one():
    assert version("ministack") == TESTED_MINISTACK


def test_a_changed_signature_is_a_move():
    with pytest.raises(SeamMovedError, match=r"json\.dumps takes \(obj\), not \(text\)"):
        expect("example", json, "dumps", "text")
