"""`python -m local up`: AWS on this machine with the application deployed, until Ctrl-C. `down` ends a demo's."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time

from local.emulator import STATE, Emulator, EmulatorError
from local.stack import ENVIRONMENT, Stack, StackError, write_environment


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(
        prog="python -m local", description="AWS on this machine, with no account and no container engine."
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser(
        "up",
        help="start, deploy, and stay until Ctrl-C",
        description="Start AWS on 127.0.0.1, deploy template.yaml into it with sam, say which file to source so that "
        "the README's commands, the aws command line and boto3 reach it, and stay until Ctrl-C.",
    )
    up.add_argument(
        "--port",
        type=int,
        default=os.environ.get("PORT") or "0",
        help="where to listen on 127.0.0.1 (default: PORT, or any free port)",
    )
    up.add_argument("--name", help="the template's parameter Name: prefix of what the workflow makes")
    up.add_argument(
        "--parameter",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another parameter of the template; may be given more than once",
    )
    up.add_argument("--no-deploy", action="store_true", help="start an empty account, deploy nothing")
    up.add_argument("--no-auth", action="store_true", help="do not enforce IAM policies")
    up.add_argument("--keep", action="store_true", help="go on from what the last such run saved, and save as it goes")
    up.add_argument("--verbose", action="store_true", help="show what sam prints")
    commands.add_parser("down", help="stop what `make demo KEEP=1` left running")
    return main


def down() -> None:
    """Run `down`."""
    from local.demo import keep

    kept = keep.down()
    print("Stopped; its pictures, labels and models are gone." if kept else "Nothing was left running.")


def up(arguments: argparse.Namespace) -> None:
    """Run `up`."""
    parameters = {}
    for given in arguments.parameter:
        name, equals, value = given.partition("=")
        if not equals:
            raise StackError(f"--parameter {given} is not NAME=VALUE.")
        parameters[name] = value
    if arguments.name:
        parameters["Name"] = arguments.name
    state = STATE / "kept" if arguments.keep else STATE  # what begins empty must not empty what is kept
    environment = STATE / ENVIRONMENT
    with Emulator(port=arguments.port, state=state, auth=not arguments.no_auth, keep=arguments.keep) as aws:
        print(f"AWS runs at {aws.endpoint_url}; its log is {aws.log}", flush=True)
        if not arguments.no_deploy:
            started = time.monotonic()
            stack = Stack(aws, progress=(lambda line: print(f"  {line}", flush=True)) if arguments.verbose else None)
            print("Deploying template.yaml …", flush=True)
            outputs = stack.deploy(parameters)
            print(f"Deployed {stack.name} in {time.monotonic() - started:.0f} s:")
            for name, value in sorted(outputs.items()):
                print(f"  {name} = {value}")
            write_environment(aws, outputs, environment)
            print(f"\nIn another terminal: source {environment}")
        else:
            print("\nIn another terminal:\n")
            for name, value in aws.environment().items():
                print(f"  export {name}={shlex.quote(value)}")
        print("\nCtrl-C stops it.", flush=True)
        try:
            while aws.running():
                time.sleep(0.5)
        finally:
            if not arguments.no_deploy:  # else a demo may have written it for its own
                environment.unlink(missing_ok=True)
        raise EmulatorError(f"The emulator ended by itself; its log is {aws.log}")


def main() -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args()
    if arguments.command == "down":
        down()
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        up(arguments)
    except KeyboardInterrupt:
        print("\nStopped.")
        return 130
    except (EmulatorError, StackError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
