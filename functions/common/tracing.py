"""X-Ray segments of what a function does, and subsegments of its calls of AWS."""

from aws_lambda_powertools import Tracer

# Left to itself the tracer imports every library that it could follow, to follow it: half a second of a cold start.
tracer = Tracer(patch_modules=["botocore"])
