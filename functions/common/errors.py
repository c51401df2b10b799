"""The difference on which all retrying hangs: broken for ever (BrokenImage, MalformedEvent, BadLabel) or for now."""


class EndpointTrouble(RuntimeError):
    """The endpoint, not the picture, is in trouble for now: updating, throttled, failing or away."""


class DecodingFailed(RuntimeError):
    """A picture's decoding took too much memory or time, or crashed. The text says which in plain words."""


class OutOfTime(RuntimeError):
    """The invocation ends before this picture is done."""
