"""The difference on which all retrying hangs: broken for ever (BrokenImage, MalformedEvent, BadLabel) or for now."""


class EndpointTrouble(RuntimeError):
    """The endpoint, not the picture, is in trouble for now: updating, throttled, failing or away."""
