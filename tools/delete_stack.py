"""Deletes a stack and all that it made: endpoint, models, packages, buckets with every version in them.

    python tools/delete_stack.py houndloop

CloudFormation alone cannot: it refuses buckets that hold objects and a package group that holds packages, and knows
nothing of the endpoint, which the workflow made. Works on whatever account or emulator boto3 is pointed at.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, it finds its siblings so

from tools.stack import ToolError, any_outputs, client, run

# What the workflow names: the stack's Name and the run's yymmddHHMMSS. Anchored, because one stack's Name may begin
# another's.
MADE_BY_RUN = r"{name}-\d{{12}}"
IN_MOTION = ("Creating", "Updating", "SystemUpdating", "RollingBack")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stack", help="name of the CloudFormation stack")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    arguments = parser.parse_args()
    return run(lambda: delete(arguments.stack, ask=None if arguments.yes else input))


def delete(stack: str, ask: Callable[[str], str] | None) -> int:
    """Delete `stack`; `ask` gets the question and returns the answer, None deletes without asking."""
    outputs = any_outputs(stack)
    buckets = [outputs[key] for key in ("DataBucketName", "ArtifactBucketName") if key in outputs]
    name = outputs.get("EndpointName", "")
    print(f"This deletes the stack {stack}, the endpoint {name}, and for ever all pictures, labels, predictions and")
    print(f"models in the buckets {' and '.join(buckets)} and the stack's tables,")
    print(f"of {where()}.")
    if ask and ask(f"Type {stack} to go on: ") != stack:
        print("Nothing was deleted.")
        return 1
    if machine := outputs.get("RetrainStateMachineArn"):
        stop_runs(machine)
    if name:
        delete_models(name)
    for bucket in buckets:
        empty(bucket)
    say(f"deleting the stack {stack}")
    cloudformation = client("cloudformation")
    cloudformation.delete_stack(StackName=stack)
    cloudformation.get_waiter("stack_delete_complete").wait(StackName=stack, WaiterConfig={"Delay": 5})
    say("deleted")
    return 0


def where() -> str:
    """Which AWS the credentials lead to: a stack on this machine has the same name as one in an account."""
    if url := os.environ.get("AWS_ENDPOINT_URL"):
        return f"AWS on this machine ({url})"
    identity = client("sts")
    return f"the account {identity.get_caller_identity()['Account']} in {identity.meta.region_name}"


def stop_runs(machine: str) -> None:
    """Stop executions that run, until what they leave behind has been cleaned up.

    end_run hears of each and stops its jobs. For one that died in a deployment it starts a recovery, which is stopped,
    too; it gives up after a few.
    """
    states = client("stepfunctions")
    while running := states.list_executions(stateMachineArn=machine, statusFilter="RUNNING")["executions"]:
        for execution in running:
            say(f"stopping the run {execution['name']}")
            states.stop_execution(executionArn=execution["executionArn"], cause="the stack is being deleted")
        time.sleep(5)


def delete_models(name: str) -> None:
    """Delete the endpoint, and every configuration, model and model package that runs of this stack made."""
    sagemaker = client("sagemaker")
    mine = re.compile(MADE_BY_RUN.format(name=re.escape(name)))

    def listed(operation: str, key: str, field: str) -> Iterator[str]:
        for page in sagemaker.get_paginator(operation).paginate(NameContains=name):
            yield from (item[field] for item in page[key])

    if name in listed("list_endpoints", "Endpoints", "EndpointName"):
        say(f"deleting the endpoint {name}")
        # SageMaker deletes none that is being changed, as by a run that was stopped.
        while sagemaker.describe_endpoint(EndpointName=name)["EndpointStatus"] in IN_MOTION:
            time.sleep(5)
        sagemaker.delete_endpoint(EndpointName=name)
        sagemaker.get_waiter("endpoint_deleted").wait(EndpointName=name, WaiterConfig={"Delay": 5})
    for config in list(listed("list_endpoint_configs", "EndpointConfigs", "EndpointConfigName")):
        if mine.fullmatch(config):
            sagemaker.delete_endpoint_config(EndpointConfigName=config)
    for model in list(listed("list_models", "Models", "ModelName")):
        if mine.fullmatch(model):
            sagemaker.delete_model(ModelName=model)
    if name in listed("list_model_package_groups", "ModelPackageGroupSummaryList", "ModelPackageGroupName"):
        pages = sagemaker.get_paginator("list_model_packages").paginate(ModelPackageGroupName=name)
        packages = [package["ModelPackageArn"] for page in pages for package in page["ModelPackageSummaryList"]]
        say(f"deleting {len(packages)} model packages")
        for arn in packages:
            sagemaker.delete_model_package(ModelPackageName=arn)


def empty(bucket: str) -> None:
    """Delete every version of every object."""
    s3 = client("s3")
    deleted = 0
    for page in s3.get_paginator("list_object_versions").paginate(Bucket=bucket):
        things: list[Any] = [*page.get("Versions", []), *page.get("DeleteMarkers", [])]
        objects = [{"Key": thing["Key"], "VersionId": thing["VersionId"]} for thing in things]
        if objects:
            answer = s3.delete_objects(Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
            if errors := answer.get("Errors"):
                raise ToolError(f"{errors[0]['Key']} in {bucket} cannot be deleted: {errors[0]['Message']}")
            deleted += len(objects)
            print(f"\r  {bucket}: {deleted} versions deleted", end="", flush=True)
    print()


def say(text: str) -> None:
    print(f"  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
