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
    "logs": "import ministack.services.cloudwatch_logs as m; m._filter_log_events = lambda request: ()",
    "queues": "import ministack.core.iam_actions as m; m.extract_iam_action = lambda request: None",
    "sessions": "import ministack.services.sts as m; del m.register_session",
    "policies": "import ministack.core.iam_evaluator as m; del m._fnmatch_compile",
    "partiql": "import ministack.core.iam_actions as m; m.dynamodb_resource_arns = lambda request: []",
    "s3events": "import ministack.services.s3 as m; m._fire_s3_event = lambda bucket: None",
    "functions": "import ministack.core.lambda_runtime as m; m._PYTHON_WORKER_SCRIPT = 'run()'",
    "cloudwatch": "import ministack.services.cloudwatch as m; m._evaluate_alarm = lambda: None",
    "cloudformation": "import ministack.services.cloudformation.provisioners as m; del m._ddb_create",
    "sagemaker": "import ministack.core.router as m; m.SERVICE_PATTERNS = []",
    "autoscaling": "import ministack.core.iam_actions as m; m.request_tag_context = lambda request: None",
    "statelogs": "import ministack.services.cloudwatch_logs as m; del m._create_log_stream",
    "history": "import ministack.services.stepfunctions as m; m._apply_parameters = lambda state: {}",
    "passrole": "import ministack.app as m; del m._enforce_data_plane",
    "stepfunctions": "import ministack.services.stepfunctions as m; m._invoke_resource = lambda arn, data: None",
}


# Imports once, and installs in a child for each move: ministack takes seconds to import.
PROGRAM = """
import importlib, json, os, sys
from local import seams
for name in seams.SEAMS:
    importlib.import_module(f"local.seams.{name}")
for seam, move in json.loads(sys.argv[1]).items():
    if os.fork():
        os.wait()
        continue
    try:
        exec(move)
        seams.install()
        answer = "installed"
    except seams.SeamMovedError as error:
        answer = str(error)
    print(json.dumps([seam, answer]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def answers():
    """What installing the seams says, by the seam whose hook was moved; "" for none."""
    program = [sys.executable, "-c", PROGRAM, json.dumps({"": "", **MOVES})]
    done = subprocess.run(program, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def test_every_seam_fits_the_ministack_that_is_installed(answers):
    assert answers[""] == "installed"


def test_every_seam_has_a_move_to_notice():
    assert set(MOVES) == set(SEAMS)


@pytest.mark.parametrize("seam", SEAMS)
def test_a_seam_whose_hook_moved_is_named(answers, seam):
    assert f"ministack {version('ministack')} moved what local/seams/{seam}.py hooks" in answers[seam]


def test_the_tested_version_is_the_installed_one():
    assert version("ministack") == TESTED_MINISTACK


def test_a_changed_signature_is_a_move():
    with pytest.raises(SeamMovedError, match=r"json\.dumps takes \(obj\), not \(text\)"):
        expect("example", json, "dumps", "text")
