"""docs/local-sagemaker.md, written from the table in `support.py` and the service models that ship in botocore."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import botocore.session
from botocore.model import ListShape, OperationModel, Shape, StructureShape

from . import validation
from .settings import REAL_TIME_BODY_LIMIT, SERVERLESS_BODY_LIMIT
from .support import ACTIONS, Action, is_above

MEGABYTE = 1024 * 1024
INTRODUCTION = """\
<!-- Written by `python -m local.sagemaker.support`. Change the table or the prose there, not here. -->
# The local SageMaker

`local/sagemaker` answers SageMaker's API on this machine and really does what it is asked: a training job runs the
real script, a tuning job searches, an endpoint is one server process for each instance, behind a router. There is
no container engine. It is reached with any AWS client through `AWS_ENDPOINT_URL`, and from Step Functions. This
page says where it differs from AWS.

Each request is held to the service model that ships in botocore {version}, then to the rules which that model does
not hold. What AWS refuses is refused here with AWS's code, status and words, as far as documentation or public code
shows them; where only the rule is known, the sentence is this project's. What AWS does and this does not is
answered with the error `NotImplemented` (HTTP 501), which names the action, field or value: nothing that would
matter on AWS is silently accepted. Below are, for each action, the fields that are accepted and change nothing
here, with the reason; the values that are there, where some are left out; and the fields that are refused when they
say something (`false`, an empty list and an empty structure say nothing). A dot leads into a structure or into the
items of a list. A field that is not listed works as on AWS.

A field that has no effect is still checked, kept, and shown by Describe.

## Images and paths

An image is a name here. `local/<folder>:<tag>` runs as `python <checkout>/<folder> <arguments>`; the environment
variable `HOUNDLOOP_IMAGES` names another place for these folders. Any other image stands for a training image, and
runs with the Python that runs the emulator; it cannot be served. `/opt/ml` at the start of a word in entry points,
arguments and variables, or after a `=` there, becomes the job's own folder. `docs/architecture.md` tells the rest.

Everything runs as the user who started the emulator, sees that user's files, and shares this machine's network,
processors and memory; nothing keeps a job to what its instance type would have. Jobs and servers act on AWS (the
local one) with the credentials of their role, and the role's policies hold.

## What holds for all actions

- The account is `000000000000`, unless the access key is a number of twelve digits, which then is the account. What
  AWS limits for each account and region (ResourceLimitExceeded) is mostly not imitated.
- Times are real. What AWS spends on starting machines is not imitated: a job is `Starting` only while it waits for
  room (as many jobs at once as there are processors; `HOUNDLOOP_MAX_JOBS` says another number), and billable
  seconds are the seconds that passed.
- Every change is on disk before it is answered. After a restart of the emulator, jobs that were at work are
  `Failed`, and endpoints come back by themselves.
- Whatever changes its status sends its state-change event to EventBridge.
- Lists return 10 items unless `MaxResults` says otherwise. `NameContains` does not mind upper and lower case.
- ARNs hold names in lower case, as on AWS, so two names that differ only in case are one name for models, endpoint
  configurations and model package groups.
"""
# Every action belongs to the section with the longest word that its name contains.
SECTIONS = {
    "TrainingJob": (
        "Training jobs",
        """\
A `requirements.txt` of the source is not installed: the environment that runs the emulator is used as it is. The
input mode `FastFile` is there, but the data is fetched before the script starts, as with `File`. There is one
instance, so data is never sharded. A job that runs alone has all processors, jobs side by side share them. What it
writes to its checkpoints, its debug output and its profiler output is uploaded within seconds, while it runs; the
system metrics of the profiler are not collected.""",
    ),
    "HyperParameterTuningJob": (
        "Hyperparameter tuning jobs",
        """\
Optuna proposes the hyperparameters. `Bayesian` is regression by a Gaussian process, as on AWS, but the values that it
tries are not those that AWS would try. Training jobs of a tuning job run as all others do.""",
    ),
    "ProcessingJob": (
        "Processing jobs",
        """\
An image other than `local/…` needs a `ContainerEntrypoint`, because there is no image that could bring one.
Of one that fails by itself `FailureReason` says no more than that, as on AWS; why is for the script to write to
`/opt/ml/output/message`, which becomes the `ExitMessage`, and in the log.""",
    ),
    "Model": (
        "Models",
        """\
A model has one container, and its image is one of this machine's folders. The model data must be readable with the
model's role, or CreateModel refuses as AWS does. A model package must be `Approved` when a model is made of it;
what becomes of the package later does not matter to the model. As on AWS, a model can be deleted while an endpoint
serves it; the endpoint then cannot be started anew. Deployment recommendations are not made.""",
    ),
    "EndpointConfig": (
        "Endpoint configurations",
        """\
As on AWS, a configuration can be deleted while an endpoint uses it. AWS asks not to: the endpoint goes on serving,
but it can neither be updated nor started anew.""",
    ),
    "Endpoint": (
        "Endpoints",
        f"""\
An instance is a server process on a port of its own. It is started with the argument `serve`, and told its port by
`SAGEMAKER_BIND_TO_PORT` and its model's folder by `MODEL_DIR`, because `/opt/ml/model` and port 8080 cannot be
everyone's. A serverless variant is one process that stays; it has no cold start. A request may have
{REAL_TIME_BODY_LIMIT // MEGABYTE} MB, one for a serverless endpoint {SERVERLESS_BODY_LIMIT // MEGABYTE} MB, and a
container has 60 seconds to answer. Alarms are those of the emulator's CloudWatch.""",
    ),
    "ModelPackage": (
        "Model packages",
        """\
Every model package is a version in a group; packages outside of groups (`ModelPackageName` in CreateModelPackage)
are not there. A version is `Completed` at once: nothing is validated by running it, images are not scanned, and
image and model data are not looked at before a model is made of it. `ImageDigest` is not filled in, since a folder
has none.""",
    ),
    "Tags": (
        "Tags",
        """\
Tags can be put on everything that has an ARN. ListTags answers with all of them at once.""",
    ),
}


def page() -> str:
    """The whole page."""
    text = [INTRODUCTION.replace("{version}", botocore.__version__)]
    for word, (title, prose) in SECTIONS.items():
        text.append(f"## {title}\n\n{prose}\n")
        actions = [action for action in ACTIONS if section(action) == word]
        plain = [action for action in actions if not any(differences(action))]
        for action in actions:
            if action not in plain:
                text.append(f"### {action}\n\n" + "\n\n".join(filter(None, differences(action))) + "\n")
        if plain:
            text.append(f"{listed(plain)} {'take' if len(plain) > 1 else 'takes'} all that AWS takes.\n")
    return "\n".join(text) + "\n" + rest()


def section(action: str) -> str:
    """The key in SECTIONS of an action; raises ValueError for one that belongs to none."""
    return max((word for word in SECTIONS if word in action), key=len)


def rest() -> str:
    """The actions that are not there."""
    names = validation.service_model().operation_names
    missing = [name for name in names if name not in ACTIONS]
    here = len(names) - len(missing)
    return f"""\
## Everything else

Of SageMaker's {len(names)} actions these {here} are there. The other {len(missing)} are answered with
`NotImplemented`: among them transform, compilation, labelling and AutoML jobs, pipelines, experiments, notebooks,
Studio, monitoring, the feature store, inference components and recommendations, and HyperPod. Of the runtime API,
only InvokeEndpoint is there.
"""


@functools.cache
def model(action: str) -> OperationModel:
    """The model of an action of SageMaker or of its runtime."""
    if action in validation.service_model().operation_names:
        return validation.operation(action)
    runtime = botocore.session.get_session().get_service_model("sagemaker-runtime")
    return runtime.operation_model(action)


def differences(action: str) -> tuple[str, str, str]:
    """What an action accepts without effect, which values it takes, and what it refuses; each may be empty."""
    support = ACTIONS[action]
    return no_effect(support), values(action, support), refused(action, support)


def no_effect(support: Action) -> str:
    """A table of the fields without effect, together where the reason is the same."""
    reasons: dict[str, list[str]] = {}
    for name, reason in support.no_effect.items():
        reasons.setdefault(reason, []).append(name)
    rows = [f"| {listed(names)} | {reason} |" for reason, names in reasons.items()]
    return "\n".join(["| Accepted without effect | because |", "|---|---|", *rows]) if rows else ""


def values(action: str, support: Action) -> str:
    """A list of the fields that take some of AWS's values only."""
    lines = []
    for name, there in support.values.items():
        enum = enumeration(action, name)
        left_out = [value for value in enum if value not in there]
        if left_out or not enum:
            without = f", not {listed(left_out, 'or')}" if left_out else ""
            lines.append(f"- `{name}` is {listed(list(there), 'or')}{without}")
    return "\n".join(["Values:", "", *lines]) if lines else ""


def refused(action: str, support: Action) -> str:
    """A list of the fields of the service model that the table does not accept, by the structure that they are in."""
    inside: dict[str, list[str]] = {}
    for path in missing_fields(model(action).input_shape, support.fields):
        above, _, name = path.rpartition(".")
        inside.setdefault(above, []).append(name)
    lines = [f"- {f'in `{above}`: ' if above else ''}{listed(names)}" for above, names in inside.items()]
    return "\n".join(["Refused:", "", *lines]) if lines else ""


def missing_fields(shape: Shape | None, accepted: frozenset[str], path: str = "") -> Iterator[str]:
    """The fields of a shape that are not accepted, each as far up as nothing of it is."""
    while isinstance(shape, ListShape):
        shape = shape.member
    if not isinstance(shape, StructureShape):
        return
    for name, member in shape.members.items():
        below = f"{path}.{name}" if path else name
        if below in accepted:
            continue
        if is_above(below, accepted):
            yield from missing_fields(member, accepted, below)
        else:
            yield below


def find(action: str, path: str) -> Shape | None:
    """The shape of a field, or None when the service model has no such field."""
    shape: Shape | None = model(action).input_shape
    for name in path.split("."):
        while isinstance(shape, ListShape):
            shape = shape.member
        shape = shape.members.get(name) if isinstance(shape, StructureShape) else None
    return shape


def enumeration(action: str, path: str) -> list[str]:
    """The values that the service model allows a field, where it lists them."""
    shape = find(action, path)
    while isinstance(shape, ListShape):
        shape = shape.member
    return list(shape.metadata.get("enum", [])) if shape else []


def listed(names: list, word: str = "and") -> str:
    """Names as prose has them: a, b and c."""
    quoted = [f"`{name}`" for name in names]
    return f"{', '.join(quoted[:-1])} {word} {quoted[-1]}" if len(quoted) > 1 else "".join(quoted)
