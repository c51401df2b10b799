"""Tags, of every resource that has an ARN."""

from __future__ import annotations

from .errors import ValidationException
from .store import Record, Store

MAX_TAGS = 50  # tags per resource
SYSTEM_PREFIX = "aws:"  # AWS's own tags, in any case


def check(tags: list[dict]) -> None:
    """Raises ValidationException for tags that no request may give: AWS's own, and two values for one key."""
    keys = [tag["Key"] for tag in tags]
    check_keys(keys)
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValidationException(f"Duplicate tag keys found: {', '.join(repeated)}")


def check_keys(keys: list[str]) -> None:
    """Raises ValidationException for a key that belongs to AWS."""
    for key in keys:
        if key.lower().startswith(SYSTEM_PREFIX):
            raise ValidationException(f"System prefix 'aws:' reserved for AWS usage in tag key: {key}")


class Tags:
    """AddTags, ListTags, DeleteTags. A resource's tags stand in its record, as `_tags`."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def _tagged(self, request: dict) -> Record:
        found = self.store.by_arn(request["ResourceArn"])
        if found is None:
            raise ValidationException(f"Could not find resource {request['ResourceArn']}.")
        return found

    async def add(self, request: dict) -> dict:
        """AddTags: a key that is there gets the new value."""
        found = self._tagged(request)
        tags = {tag["Key"]: tag for tag in found["_tags"] + request["Tags"]}
        if len(tags) > MAX_TAGS:
            raise ValidationException(f"The number of tags of {found['_arn']} would exceed {MAX_TAGS}.")
        found["_tags"] = list(tags.values())
        self.store.save(found)
        return {"Tags": found["_tags"]}

    async def list(self, request: dict) -> dict:
        """ListTags. A page holds at least 50, which is all that there can be."""
        if "NextToken" in request:
            raise ValidationException('Invalid pagination token because "{0}".')
        return {"Tags": self._tagged(request)["_tags"]}

    async def delete(self, request: dict) -> dict:
        """DeleteTags: keys that are not there are no error."""
        check_keys(request["TagKeys"])
        found = self._tagged(request)
        found["_tags"] = [tag for tag in found["_tags"] if tag["Key"] not in request["TagKeys"]]
        self.store.save(found)
        return {}
