"""Processing jobs: one command between S3 and S3."""

import textwrap

from tests.makers.sagemaker import BUCKET, PROCESSOR, until


def test_processing_job_maps_paths_and_puts_the_image_on_the_import_path(world):
    world.put("proc/run.py", textwrap.dedent(PROCESSOR).encode())
    world.sagemaker.create_processing_job(
        ProcessingJobName="process",
        RoleArn=world.role,
        AppSpecification={
            "ImageUri": "local/server:1",
            "ContainerEntrypoint": ["python3", "/opt/ml/processing/input/code/run.py"],
            "ContainerArguments": ["/opt/ml/processing/input/data", "--out=/opt/ml/processing/output/names"],
        },
        ProcessingResources={"ClusterConfig": {"InstanceCount": 1, "InstanceType": "ml.m5.large", "VolumeSizeInGB": 5}},
        ProcessingInputs=[
            {
                "InputName": name,
                "S3Input": {
                    "S3Uri": uri,
                    "LocalPath": f"/opt/ml/processing/input/{name}",
                    "S3DataType": "S3Prefix",
                    "S3InputMode": "File",
                },
            }
            for name, uri in (("code", f"s3://{BUCKET}/proc/run.py"), ("data", f"s3://{BUCKET}/data/a"))
        ],
        ProcessingOutputConfig={
            "Outputs": [
                {
                    "OutputName": "names",
                    "S3Output": {
                        "S3Uri": f"s3://{BUCKET}/processed",
                        "LocalPath": "/opt/ml/processing/output/names",
                        "S3UploadMode": "EndOfJob",
                    },
                }
            ]
        },
    )
    job = until(
        lambda: world.sagemaker.describe_processing_job(ProcessingJobName="process"),
        lambda found: found["ProcessingJobStatus"] not in ("InProgress", "Stopping"),
        30,
    )
    assert job["ProcessingJobStatus"] == "Completed", job
    assert world.s3.get_object(Bucket=BUCKET, Key="processed/sub/names.txt")["Body"].read() == b"1.txt,2.txt"
