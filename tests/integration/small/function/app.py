import os
import time

import boto3
from shared import shout


class PictureIsBroken(Exception):
    pass


def handler(event, context):
    if event.get("sleep"):
        time.sleep(event["sleep"])
    if event.get("fail"):
        raise PictureIsBroken("no header")
    return {
        "greeting": shout(os.environ["GREETING"]),
        "caller": boto3.client("sts").get_caller_identity()["Arn"],
        "event": event,
    }
