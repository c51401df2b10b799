"""Application Auto Scaling for the variants of SageMaker endpoints, beside the local SageMaker.

`api` is the protocol and what is registered, `checks` refuses, `policies` decides in pure functions, `scaler` watches
alarms and acts.
A variant is changed as AWS does it, with UpdateEndpointWeightsAndCapacities, and the alarms are CloudWatch's.
"""
