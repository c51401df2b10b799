"""BentoML: a service of as many processes as WORKERS says. The body is the picture, which BentoML opens with Pillow.

bentoml serve bentoml_server:Pictures
"""

import os
from typing import Any

import bentoml
from classifier import Classifier
from PIL.Image import Image


@bentoml.service(workers=int(os.environ.get("WORKERS", "1")), traffic={"timeout": 60, "max_concurrency": 1000})
class Pictures:
    def __init__(self) -> None:
        self.classifier = Classifier()

    @bentoml.api(route="/invocations")
    def invocations(self, picture: Image, /) -> dict[str, Any]:
        return self.classifier.classify(picture)
