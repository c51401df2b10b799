"""TorchServe: its handler, archived with classifier.py, weights.pt and classes.json."""

from typing import Any

from classifier import Classifier


class Handler:
    def initialize(self, context: Any) -> None:
        self.classifier = Classifier(context.system_properties["model_dir"])

    def handle(self, data: list[dict[str, Any]] | None, _: Any) -> list[dict[str, Any]]:
        """One answer for each request of a batch, which is of one where nothing else is configured."""
        return [self.classifier.answer(bytes(row["body"])) for row in data or []]
