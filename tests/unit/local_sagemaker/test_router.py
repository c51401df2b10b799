"""Where a request goes when an instance fails, and what its caller is told."""

import asyncio

import pytest

from local.sagemaker.connections import BrokenAnswer, NotReached
from local.sagemaker.instances import InstanceDied
from local.sagemaker.router import NO_INSTANCE, TIMED_OUT, forward, model_error


class Instance:
    """One that raises what it is told to, or answers."""

    def __init__(self, outcome: Exception | int) -> None:
        self.outcome, self.asked = outcome, 0

    async def invoke(self, headers, body):
        self.asked += 1
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome, {}, b"answer"


class Variant:
    def __init__(self, *instances: Instance) -> None:
        self.instances = instances

    def next(self, tried):
        return next((instance for instance in self.instances if instance not in tried), None)


DIED, UNREACHED = InstanceDied("reset"), NotReached("refused")
BROKEN = BrokenAnswer("half an answer", began=True)


@pytest.mark.parametrize(
    ("outcomes", "status", "asked"),
    [
        ([200, 200], 200, [1, 0]),
        ([UNREACHED, UNREACHED, 200], 200, [1, 1, 1]),
        ([UNREACHED, UNREACHED], NO_INSTANCE, [1, 1]),
        ([], NO_INSTANCE, []),
        ([DIED, 200], 200, [1, 1]),
        ([DIED, UNREACHED, 200], 200, [1, 1, 1]),
        ([DIED, DIED, 200], 502, [1, 1, 0]),  # the request may be what kills them
        ([BROKEN, 200], 502, [1, 0]),  # the server lives, and may have acted on it
        ([TimeoutError(), 200], TIMED_OUT, [1, 0]),
        ([500, 200], 500, [1, 0]),  # an answer is an answer
    ],
)
def test_a_request_goes_on_only_where_it_cannot_have_been_acted_on(outcomes, status, asked):
    instances = [Instance(outcome) for outcome in outcomes]
    found, _, _, seconds = asyncio.run(forward(Variant(*instances), {"accept": "a", "x-other": "b"}, b"body"))
    assert found == status and [instance.asked for instance in instances] == asked and seconds >= 0


def test_the_models_errors_in_awss_words():
    error = model_error("e", 404, b"nothing")
    assert error.message.startswith('Received client error (404) from primary with message "nothing". See https://')
    assert error.extra["OriginalStatusCode"] == 404 and error.extra["OriginalMessage"] == "nothing"
    assert model_error("e", TIMED_OUT, b"late").message.startswith("Received server error (0) from primary with")
    long = model_error("e", 500, b"x" * 5000)
    assert long.message.startswith("Received server error (500) from primary and could not load the entire response")
    assert len(long.extra["OriginalMessage"]) == 2048, "the length that the service model allows"
