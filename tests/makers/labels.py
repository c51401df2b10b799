"""Files of labels as labeling tools write them."""

import json


def manifest(labels: list[tuple[str, str]], bucket: str = "pictures") -> bytes:
    """The output manifest that Ground Truth writes of (key, class)."""
    lines = (
        {
            "source-ref": f"s3://{bucket}/{key}",
            "breed": 0,
            "breed-metadata": {"class-name": name, "type": "groundtruth/image-classification", "confidence": 0.0},
        }
        for key, name in labels
    )
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)
