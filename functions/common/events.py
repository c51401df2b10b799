"""S3 object events as EventBridge delivers them through SQS, and the order of the versions of one key."""

import json
from dataclasses import dataclass
from typing import Any

# AWS orders two sequencers of one key by padding the shorter with zeros on the right and comparing as text; padding
# all of them to one width lets DynamoDB compare them. AWS promises no length: today's have 18 digits.
SEQUENCER_WIDTH = 64


class MalformedEvent(ValueError):
    """A message that no attempt can read: it is not an object event."""


@dataclass(frozen=True)
class ObjectEvent:
    """One version of one object came to be, or went."""

    bucket: str
    key: str
    version_id: str
    sequencer: str
    size: int
    deleted: bool = False
    erased: bool = False
    """Deleted for good: this version alone, which need not be the newest; no marker hides the key."""
    replayed: bool = False
    """Sent by the system itself: the picture is to be classified again although nothing about it changed."""
    postponed: int = 0
    """How often the message was put back because the endpoint, not the picture, was in trouble."""

    @property
    def image(self) -> str:
        """The partition key of the picture's rows."""
        return f"{self.bucket}/{self.key}"

    @property
    def is_folder_marker(self) -> bool:
        """What the S3 console leaves behind for 'create folder'."""
        return self.size == 0 and self.key.endswith("/")

    @classmethod
    def from_body(cls, body: str) -> "ObjectEvent":
        """Read the body of an SQS message; raises MalformedEvent. Keys are verbatim in EventBridge, not URL-encoded."""
        try:
            event = json.loads(body)
            detail = event["detail"]
            thing = detail["object"]
            sequencer = thing["sequencer"]
            if len(sequencer) > SEQUENCER_WIDTH:
                raise ValueError(f"the sequencer has {len(sequencer)} characters; at most {SEQUENCER_WIDTH} are kept")
            return cls(
                bucket=detail["bucket"]["name"],
                key=thing["key"],
                version_id=thing.get("version-id", ""),
                sequencer=sequencer.ljust(SEQUENCER_WIDTH, "0"),
                size=int(thing.get("size", 0)),
                deleted=event.get("detail-type") == "Object Deleted",
                erased=detail.get("deletion-type") == "Permanently Deleted",
                replayed=bool(detail.get("replayed", False)),
                postponed=int(detail.get("postponed", 0)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MalformedEvent(f"not an S3 object event ({error!r}): {body[:200]}") from error

    def to_body(self, *, replayed: bool | None = None, postponed: int | None = None) -> str:
        """The same event as a message that the system sends to itself."""
        thing: dict[str, Any] = {"key": self.key, "size": self.size, "sequencer": self.sequencer}
        if self.version_id:
            thing["version-id"] = self.version_id
        return json.dumps(
            {
                "detail-type": "Object Deleted" if self.deleted else "Object Created",
                "source": "houndloop",
                "detail": {
                    "bucket": {"name": self.bucket},
                    "object": thing,
                    "replayed": self.replayed if replayed is None else replayed,
                    "postponed": self.postponed if postponed is None else postponed,
                },
            }
        )
