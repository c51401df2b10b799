"""The README holds: its commands are run as they stand there, and what it names exists."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from local.demo.keep import PID_FILE
from local.demo.pictures import pictures
from local.emulator import free_port
from tests.makers import template

pytestmark = pytest.mark.timeout(1800)  # the demo takes minutes, on a busy machine many

README = (template.ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
QUERIES = [block for block in BLOCKS if block.startswith("aws dynamodb")]
TABLE = dict(re.findall(r"^\| ([a-z ]+) \| `([^`|]+)`", README, re.MULTILINE))


def sh(command: str, folder: Path, seconds: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `command` as someone would who follows the README: in bash, with the virtual environment's tools."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=clean | {"PATH": path} | environment,
        text=True,
        capture_output=True,
        timeout=seconds,
    )


@pytest.fixture(scope="module")
def demo() -> Iterator[subprocess.CompletedProcess[str]]:
    """`make demo`, left up for the commands that follow it in the README."""
    if PID_FILE.exists():
        pytest.fail("a demo is up already; stop it with: make down")
    venv = str(Path(sys.executable).parent.parent)
    done = sh("make demo KEEP=1", template.ROOT, 1500, PORT=str(free_port()), VENV=venv, MAKEFLAGS="-e")
    yield done
    sh("make down", template.ROOT, 60, VENV=venv, MAKEFLAGS="-e")


@pytest.fixture
def folder(demo: subprocess.CompletedProcess[str], tmp_path: Path) -> Path:
    """Where a user types: with a picture to classify and some to label."""
    (tmp_path / "tools").symlink_to(template.ROOT / "tools")
    (tmp_path / "dog.jpg").write_bytes(next(pictures("spotted", 1, seed=1234)))
    (tmp_path / "my-beagles").mkdir()
    for number, data in enumerate(pictures("tuxedo", 2, seed=1)):
        (tmp_path / "my-beagles" / f"{number}.jpg").write_bytes(data)
    return tmp_path


def aws(command: str, folder: Path) -> str:
    done = sh(f"source {template.ROOT}/.houndloop/environment; {command}", folder, 60)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def test_make_demo_runs_the_whole_loop(demo):
    assert demo.returncode == 0, demo.stdout[-3000:] + demo.stderr[-3000:]
    assert "Accuracy on held-out pictures" in demo.stdout
    page = re.search(r"Page of this demo: (.+)", demo.stdout)
    assert page and "<html" in Path(page[1]).read_text()[:500]
    seconds = re.search(r"in all +(?:(\d+) min )?(\d+) s", demo.stdout)
    assert seconds, "the demo says how long it took"


def test_a_dropped_picture_is_classified_and_found_by_every_query(demo, folder):
    aws(TABLE["classify"], folder)
    deadline = time.monotonic() + 60
    item: dict = {}
    while item.get("status", {}).get("S") != "CLASSIFIED" and time.monotonic() < deadline:
        item = json.loads(aws(QUERIES[0], folder) or "{}").get("Item", {})
    assert item["status"]["S"] == "CLASSIFIED"
    assert json.loads(aws(QUERIES[1], folder))["Count"] >= 2, "the current row and the history"
    day = item["class_day"]["S"].partition("#")[2]
    by_class = QUERIES[2].replace("spotted#'$(date -u +%F)'", f"{item['label']['S']}#{day}")
    assert item["key"]["S"] in aws(by_class, folder)
    rejected = json.loads(aws(QUERIES[3], folder))["Items"]
    assert len(rejected) == 3 and all(row["reason"]["S"] for row in rejected)
    json.loads(aws(QUERIES[4], folder))


def test_the_endpoint_is_asked_and_its_answer_shown(demo, folder):
    ask, show = (next(block for block in BLOCKS if word in block) for word in ("invoke-endpoint", "show.py"))
    aws(ask, folder)
    answer = json.loads((folder / "answer.json").read_text())
    (shown,) = map(json.loads, re.findall(r"```json\n(.*?)```", README, re.DOTALL))
    (prediction,), (example,) = answer["predictions"], shown["predictions"]
    best = prediction["classes"][0]
    assert answer.keys() == shown.keys() and best.keys() == example["classes"][0].keys()
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (folder / "ask.py").write_text(code)
    assert aws("python ask.py", folder).strip() == str(best)
    assert best["class"] in aws(show, folder) and (folder / "dog-labelled.png").stat().st_size > 0


def test_the_live_model_and_its_history_can_be_asked_for(demo, folder):
    answers = aws(QUERIES[5], folder)
    champion, deployments = (json.loads(part) for part in answers.replace("}\n{", "}\0{").split("\0"))
    assert champion["Count"] == 1 and deployments["Count"] == 2


def test_labels_runs_and_reports_are_had_as_the_table_says(demo, folder):
    aws(TABLE["label"], folder)
    assert aws(TABLE["watch the runs"], folder).count("PROMOTED") == 2
    assert "spotted" in aws(TABLE["see what a run would learn from"], folder)
    assert "Started" in aws(TABLE["retrain now"], folder)
    stop = TABLE["retrain now"].replace("start --force", "stop")
    deadline = time.monotonic() + 60
    while "Stopped" not in aws(stop, folder):  # it has not begun yet
        assert time.monotonic() < deadline
        time.sleep(0.5)
    champion = "\n".join(QUERIES[5].splitlines()[:2])
    item = json.loads(aws(champion, folder))
    run = item["Items"][0]["model_version"]["S"]
    aws(TABLE["read its report"].replace("<RunId>", run), folder)
    assert (folder / "report.html").stat().st_size > 10_000


def test_make_down_leaves_no_process(demo):
    pid = int(PID_FILE.read_text())
    below = psutil.Process(pid).children(recursive=True)
    done = sh("make down", template.ROOT, 60, VENV=str(Path(sys.executable).parent.parent), MAKEFLAGS="-e")
    assert done.returncode == 0 and not PID_FILE.exists()
    gone, alive = psutil.wait_procs(below, timeout=10)
    assert not alive


def test_every_make_target_that_is_named_exists():
    for target in set(re.findall(r"`?make ([a-z]+)", README)) - {"it"}:
        done = sh(f"make -n {target} STACK=x", template.ROOT, 30)
        assert done.returncode == 0, f"make {target}: {done.stderr}"


def test_every_parameter_that_is_named_exists():
    parameters = template.template()["Parameters"]
    named = set(re.findall(r"`([A-Z][a-z]+[A-Z][A-Za-z]+)(?:=[^`]*)?`", README))
    outside = {"StartRetraining", "RunId", "InferenceAmiVersion"}
    assert named - outside <= parameters.keys(), named - outside - parameters.keys()


def test_every_folder_that_is_named_exists():
    for name in re.findall(r"^\| `([a-z./]+)`", README, re.MULTILINE):
        assert (template.ROOT / name).exists(), name


def test_sam_is_there_for_the_commands_on_aws():
    assert shutil.which("sam", path=str(Path(sys.executable).parent))
