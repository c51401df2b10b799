"""Application Auto Scaling for the variants of SageMaker endpoints, beside the local SageMaker.

`api` is the protocol and what is registered, `policies` decides in pure functions, `scaler` watches alarms and acts.
It changes a variant as AWS does, with UpdateEndpointWeightsAndCapacities, and keeps its alarms in CloudWatch.
"""
