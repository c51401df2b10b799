"""A SageMaker that really runs: jobs and endpoints are processes of this machine, behind SageMaker's own API.

The rooms: `api` speaks the protocol, `validation` and `errors` hold what a request must look like, `store` holds what
was acknowledged, `container` and `transfers` are the container contract and S3, `processes` and `warden` start and stop
processes, and `training`, `processing`, `tuning`, `registry`, `endpoints` are the resources themselves.
"""
