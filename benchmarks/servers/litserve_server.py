"""LitServe: two processes for inference behind one for HTTP. Pictures come as its documentation has it, as a form.

python litserve_server.py PORT WORKERS
"""

import sys
from typing import Any

import litserve
from classifier import Classifier
from fastapi import Request


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.classifier = Classifier()

    def decode_request(self, request: Request, **_: Any) -> bytes:
        return request["picture"].file.read()  # the form of the request, by then

    def predict(self, data: bytes, **_: Any) -> dict[str, Any]:
        return self.classifier.answer(data)

    def encode_response(self, output: dict[str, Any], **_: Any) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    server = litserve.LitServer(
        Api(api_path="/invocations"),
        accelerator="cpu",
        workers_per_device=int(sys.argv[2]),
        healthcheck_path="/ping",
        timeout=60,
    )
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
