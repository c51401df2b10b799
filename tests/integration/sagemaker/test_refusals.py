"""What AWS refuses, in AWS's words; what is not here, by name."""

import pytest
from botocore.exceptions import ClientError

from tests.makers.sagemaker import BUCKET


def test_requests_are_refused_in_awss_words(world):
    with pytest.raises(ClientError) as caught:
        world.sagemaker.create_training_job(TrainingJobName="bad name", OutputDataConfig={})
    message = caught.value.response["Error"]["Message"]
    assert caught.value.response["Error"]["Code"] == "ValidationException"
    assert message.startswith("3 validation errors detected: ")
    assert "Value null at 'roleArn' failed to satisfy constraint: Member must not be null" in message
    assert (
        "Value 'bad name' at 'trainingJobName' failed to satisfy constraint: Member must satisfy regular "
        "expression pattern: " in message
    )
    with pytest.raises(ClientError, match='Could not find endpoint "arn:aws:sagemaker:us-east-1:000000000000:endpo'):
        world.sagemaker.describe_endpoint(EndpointName="Missing")
    with pytest.raises(ClientError, match="NotImplemented.*CreateTransformJob"):
        world.sagemaker.create_transform_job()
    with pytest.raises(ClientError, match="NotImplemented.*DebugRuleConfigurations"):
        world.train("refused", DebugRuleConfigurations=[{"RuleConfigurationName": "r", "RuleEvaluatorImage": "i"}])
    with pytest.raises(ClientError, match="Could not assume role"):
        world.train("refused", RoleArn="arn:aws:iam::000000000000:role/nobody")
    with pytest.raises(ClientError, match="Could not access model data"):
        world.sagemaker.create_model(
            ModelName="no-data",
            ExecutionRoleArn=world.role,
            PrimaryContainer={"Image": "local/server:1", "ModelDataUrl": f"s3://{BUCKET}/nowhere.tar.gz"},
        )
