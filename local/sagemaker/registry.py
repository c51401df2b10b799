"""Models and endpoint configurations: what is written down and runs nothing by itself."""

from __future__ import annotations

from . import host
from .errors import NotImplementedLocally, ValidationException
from .jobs import Work, summaries
from .packages import Packages
from .settings import LOCAL_IMAGE
from .store import Record, Store, arn, now, page, pick, record
from .transfers import Transfers

MODEL, CONFIG = "model", "endpoint-config"
SERVERLESS_MEMORY = (1024, 2048, 3072, 4096, 5120, 6144)  # MB, all that AWS offers


class Registry:
    """CreateModel, CreateEndpointConfig and their siblings."""

    def __init__(self, store: Store, work: Work, packages: Packages) -> None:
        self.store, self.work, self.packages = store, work, packages

    # Models

    async def create_model(self, request: dict) -> dict:
        """CreateModel."""
        name = request["ModelName"]
        model_arn = arn(MODEL, name)
        if self.store.by_arn(model_arn):
            raise ValidationException(f'Cannot create already existing model "{model_arn}".')
        containers = request.get("Containers", [])
        if "PrimaryContainer" in request and containers:
            raise ValidationException("Only one of PrimaryContainer and Containers may be specified.")
        if len(containers) > 1:
            raise NotImplementedLocally("A model of several containers")
        primary = request.get("PrimaryContainer") or (containers[0] if containers else None)
        if not primary:
            raise ValidationException("You must provide at least one container in PrimaryContainer or Containers.")
        if ("ModelPackageName" in primary) == ("Image" in primary or "ModelDataUrl" in primary):
            raise ValidationException(
                "Specify one of either Image and Model Data URL or ModelPackageName in container definition."
            )
        role = request.get("ExecutionRoleArn")
        if not role:
            raise ValidationException("You must specify ExecutionRoleArn.")
        if not host.can_assume(role):
            raise ValidationException(
                f'The execution role ARN "{role}" is invalid. Please ensure that the role exists and that its trust '
                'relationship policy allows the action "sts:AssumeRole" for the service principal '
                '"sagemaker.amazonaws.com".'
            )
        container = self._resolved(primary)
        await self._check_container(container, role, model_arn)
        if self.store.by_arn(model_arn):  # made by another request while this one looked at S3
            raise ValidationException(f'Cannot create already existing model "{model_arn}".')
        shown = {"Mode": "SingleModel", "Environment": {}} | primary
        if url := primary.get("ModelDataUrl"):
            source = {"S3Uri": url, "S3DataType": "S3Object", "CompressionType": "Gzip"}
            shown["ModelDataSource"] = {"S3DataSource": source}
        self.store.save(
            record(
                MODEL,
                name,
                model_arn,
                **without_tags({"EnableNetworkIsolation": False} | request)
                | ({"Containers": [shown]} if containers else {"PrimaryContainer": shown}),
                ModelArn=model_arn,
                CreationTime=now(),
                DeploymentRecommendation={
                    "RecommendationStatus": "NOT_APPLICABLE",
                    "RealTimeInferenceRecommendations": [],
                },
                _tags=request.get("Tags", []),
                _container=container,
            )
        )
        return {"ModelArn": model_arn}

    async def _check_container(self, container: dict, role: str, model_arn: str) -> None:
        image = container.get("Image", "")
        local = LOCAL_IMAGE.match(image)
        if not local:
            raise NotImplementedLocally(
                f"Serving from the container image {image!r} (local/<folder>:<tag> are the images of this machine)"
            )
        if not (self.work.settings.checkout / local["folder"]).exists():
            raise ValidationException(f"Requested image {image} not found.")
        if url := container.get("ModelDataUrl"):
            transfers = Transfers(host.role_environment(role, model_arn), role)
            if not await self.work.blocking(transfers.exists, url):
                raise ValidationException(
                    f'Could not access model data at {url}. Please ensure that the role "{role}" exists and that its '
                    'trust relationship policy allows the action "sts:AssumeRole" for the service principal '
                    '"sagemaker.amazonaws.com". Also ensure that the role has "s3:GetObject" permissions and that the '
                    f"object is located in {host.region()}."
                )

    def _resolved(self, definition: dict) -> dict:
        """A container definition with what its model package says now, if it names one.

        Raises:
            ValidationException: there is no such package, or it is not approved, which AWS asks of what is deployed.
        """
        if not (name := definition.get("ModelPackageName")):
            return definition
        package = self.packages.find(name)
        if package["ModelApprovalStatus"] != "Approved":
            raise ValidationException(
                f"ModelPackage {package['_arn']} must be Approved to be deployed, found "
                f"{package['ModelApprovalStatus']}."
            )
        if not (containers := package.get("InferenceSpecification", {}).get("Containers")):
            raise ValidationException(f"ModelPackage {package['_arn']} has no InferenceSpecification.")
        environment = containers[0].get("Environment", {}) | definition.get("Environment", {})
        return pick(containers[0], "Image", "ModelDataUrl") | definition | {"Environment": environment}

    def model_container(self, model_name: str) -> tuple[dict, str]:
        """The one container of a model as it was when the model was created, and its role."""
        model = self._model(model_name)
        return model["_container"], model["ExecutionRoleArn"]

    def _model(self, name: str) -> Record:
        return self.store.get(MODEL, name, lambda: could_not_find("model", arn(MODEL, name)))

    async def describe_model(self, request: dict) -> dict:
        """DescribeModel."""
        return self._model(request["ModelName"])

    async def list_models(self, request: dict) -> dict:
        """ListModels."""
        models, token = page(self.store.all(MODEL), request, "ModelName", default_order="Descending")
        return {"Models": [*summaries(models, "ModelName", "ModelArn", "CreationTime")], "NextToken": token}

    async def delete_model(self, request: dict) -> dict:
        """DeleteModel. As on AWS, endpoint configurations that name it do not hold it."""
        self.store.delete(self._model(request["ModelName"]))
        return {}

    # Endpoint configurations

    async def create_config(self, request: dict) -> dict:
        """CreateEndpointConfig."""
        name = request["EndpointConfigName"]
        config_arn = arn(CONFIG, name)
        if self.store.by_arn(config_arn):
            raise ValidationException(f'Cannot create already existing endpoint configuration "{config_arn}".')
        variants = [{"InitialVariantWeight": 1.0} | variant for variant in request["ProductionVariants"]]
        names = [variant["VariantName"] for variant in variants]
        if len(set(names)) < len(names):
            raise ValidationException("Variant names must be unique within an endpoint configuration.")
        for number, variant in enumerate(variants, start=1):
            self._check_variant(variant, number)
        if any("ServerlessConfig" in variant for variant in variants) and len(variants) > 1:
            raise ValidationException("A serverless endpoint can have one production variant only.")
        if not sum(variant["InitialVariantWeight"] for variant in variants):
            raise ValidationException("The sum of the weights of the production variants must be greater than 0.")
        self.store.save(
            record(
                CONFIG,
                name,
                config_arn,
                **without_tags({"EnableNetworkIsolation": False} | request | {"ProductionVariants": variants}),
                EndpointConfigArn=config_arn,
                CreationTime=now(),
                _tags=request.get("Tags", []),
            )
        )
        return {"EndpointConfigArn": config_arn}

    def _check_variant(self, variant: dict, number: int) -> None:
        if "ModelName" not in variant:
            raise NotImplementedLocally("A production variant without ModelName (inference components)")
        self._model(variant["ModelName"])
        instances = [name for name in ("InstanceType", "InitialInstanceCount") if name in variant]
        if serverless := variant.get("ServerlessConfig"):
            if instances:
                raise ValidationException(
                    f"{instances[0]} and ServerlessConfig cannot both be specified for the variant "
                    f"{variant['VariantName']!r}."
                )
            memory = serverless["MemorySizeInMB"]
            if memory not in SERVERLESS_MEMORY:
                raise ValidationException(
                    f"1 validation error detected: Value '{memory}' at 'productionVariants.{number}.member."
                    "serverlessConfig.memorySizeInMB' failed to satisfy constraint: Member must satisfy enum value "
                    f"set: [{', '.join(map(str, SERVERLESS_MEMORY))}]"
                )
        elif len(instances) < 2:
            raise ValidationException(
                "You must specify InstanceType and InitialInstanceCount for the variant "
                f"{variant['VariantName']!r}, or a ServerlessConfig."
            )

    def config(self, name: str) -> Record:
        """The endpoint configuration of that name; raises ValidationException."""
        return self.store.get(CONFIG, name, lambda: could_not_find("endpoint configuration", arn(CONFIG, name)))

    async def describe_config(self, request: dict) -> dict:
        """DescribeEndpointConfig."""
        return self.config(request["EndpointConfigName"])

    async def list_configs(self, request: dict) -> dict:
        """ListEndpointConfigs."""
        configs, token = page(self.store.all(CONFIG), request, "EndpointConfigName", default_order="Descending")
        shown = summaries(configs, "EndpointConfigName", "EndpointConfigArn", "CreationTime")
        return {"EndpointConfigs": [*shown], "NextToken": token}

    async def delete_config(self, request: dict) -> dict:
        """DeleteEndpointConfig. AWS asks not to do it while an endpoint uses it, and does not hinder it."""
        self.store.delete(self.config(request["EndpointConfigName"]))
        return {}


def without_tags(request: dict) -> dict:
    """The request's members but Tags, which Describe does not show."""
    return {key: value for key, value in request.items() if key != "Tags"}


def could_not_find(what: str, resource_arn: str) -> ValidationException:
    """AWS's words for a model, endpoint or endpoint configuration that is not there."""
    return ValidationException(f'Could not find {what} "{resource_arn}".')
