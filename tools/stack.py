"""What the tools share: finding a stack's parts, showing what they hold, and saying clearly what is wrong with the
account or the stack."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, NoRegionError

sdk: Any = boto3  # the type stubs know a client only by a literal name


class ToolError(Exception):
    """What a person can mend; the text says how."""


def client(service: str) -> Any:
    return sdk.client(service)


def any_outputs(stack: str) -> dict[str, str]:
    """The outputs of a stack, whatever was deployed; raises ToolError where there is none."""
    cloudformation = client("cloudformation")
    try:
        found = cloudformation.describe_stacks(StackName=stack)["Stacks"][0]
    except ClientError as error:
        if error.response["Error"]["Code"] != "ValidationError":
            raise
        raise ToolError(
            f"There is no stack {stack} in {cloudformation.meta.region_name}; --help says how to name yours."
        ) from None
    return {output["OutputKey"]: output["OutputValue"] for output in found.get("Outputs", [])}


def outputs(stack: str) -> dict[str, str]:
    """The outputs of a stack that these tools can work on; raises ToolError."""
    named = any_outputs(stack)
    if "ReconcileQueueUrl" not in named:
        raise ToolError(
            f"The stack {stack} is not Houndloop's, or was deployed from an older version: deploy it again."
        )
    return named


def table(name: str) -> Any:
    return sdk.resource("dynamodb").Table(name)


def run(command: Callable[[], int]) -> int:
    """The exit code of a tool; what goes wrong is one line, not a traceback."""
    try:
        return command()
    except (NoCredentialsError, NoRegionError) as error:
        print(f"{error} Set AWS_PROFILE and AWS_REGION, or what else your account needs.", file=sys.stderr)
    except (ToolError, ClientError, BotoCoreError) as error:
        print(error, file=sys.stderr)
    except EOFError:
        print("\nNobody is there to answer; --yes does it without asking.", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    return 1


def cell(value: Any) -> str:
    """A value on one line, character for character: what a terminal would act on is shown as a question mark."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in str(value))


def print_table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table whose last column takes what room there is, and in which one long value moves only its own line."""
    lines = [titles, *([cell(value) for value in row] for row in rows)]
    widths = [min(40, max(len(line[column]) for line in lines)) for column in range(len(titles) - 1)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=False)), "", line[-1])


class Progress:
    """One line that says how far long work has come: redrawn on a terminal, printed once in a while elsewhere."""

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what, self.total = what, total
        self.terminal = sys.stderr.isatty()
        self._printed = ""

    def show(self, done: int, more: str = "") -> None:
        bar = ""
        if self.total:
            filled = min(20, 20 * done // self.total)
            bar = f"[{'#' * filled}{'.' * (20 - filled)}] "
        of = f" of about {self.total}" if self.total else ""
        text = f"{bar}{done}{of} {self.what}{', ' + more if more else ''}"
        if self.terminal:
            print(f"\r{text:<{len(self._printed)}}", end="", file=sys.stderr, flush=True)
        elif text != self._printed:
            print(text, file=sys.stderr, flush=True)
        self._printed = text

    def end(self) -> None:
        if self.terminal and self._printed:
            print(file=sys.stderr)
