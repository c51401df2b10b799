"""A SageMaker that really runs: jobs and endpoints are processes of this machine, behind SageMaker's own API.

The rooms:
    the protocol   `api`, `validation` (what a request must look like), `support` (what of it is here), `errors`;
                   `reference` writes docs/local-sagemaker.md
    the state      `store` (what was acknowledged), `events` (what EventBridge hears of it)
    jobs           `training`, `processing`, `tuning` with `search` and `warmstart`; `jobs` is what they share,
                   `container`, `toolkit` and `transfers` are the container contract and S3
    endpoints      `endpoints` (the control plane), `rollout`, `fleets`, `instances`, `connections`, `router`
    the rest       `registry` (models, endpoint configurations), `packages`, `tags`
    the machine    `processes` and `warden` start and stop processes, `host` is the emulator around it all, `settings`
"""
