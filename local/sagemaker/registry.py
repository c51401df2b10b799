"""Models, endpoint configurations, model packages and tags: what is written down and runs nothing by itself."""

from __future__ import annotations

from . import host
from .errors import ConflictException, NotImplementedLocally, ValidationException
from .jobs import Work, check_role, summaries
from .settings import LOCAL_IMAGE
from .store import Record, Store, arn, now, page, pick, record
from .transfers import Transfers

MODEL, CONFIG, GROUP, PACKAGE = "model", "endpoint-config", "model-package-group", "model-package"
MAX_TAGS = 50  # tags per resource


class Registry:
    """CreateModel, CreateEndpointConfig, CreateModelPackageGroup, CreateModelPackage, AddTags and their siblings."""

    def __init__(self, store: Store, work: Work) -> None:
        self.store, self.work = store, work

    # Models

    async def create_model(self, request: dict) -> dict:
        """CreateModel."""
        name = request["ModelName"]
        model_arn = arn(MODEL, name)
        if self.store.find(MODEL, name):
            raise ValidationException(f'Cannot create already existing model "{model_arn}".')
        containers = request.get("Containers", [])
        if request.get("PrimaryContainer") and containers:
            raise ValidationException("Only one of PrimaryContainer and Containers may be specified.")
        if len(containers) > 1:
            raise NotImplementedLocally("A model of several containers")
        primary = request.get("PrimaryContainer") or (containers[0] if containers else None)
        if not primary:
            raise ValidationException("You must provide at least one container in PrimaryContainer or Containers.")
        role = request.get("ExecutionRoleArn", "")
        if not role:
            raise ValidationException("You must specify ExecutionRoleArn.")
        check_role(role)
        await self._check_container(self.container(primary), role, model_arn)
        self.store.save(
            record(
                MODEL,
                name,
                model_arn,
                **without_tags(request),
                ModelArn=model_arn,
                CreationTime=now(),
                _tags=request.get("Tags", []),
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

    def container(self, definition: dict) -> dict:
        """A container definition with what its model package says, if it names one."""
        if not (name := definition.get("ModelPackageName")):
            return definition
        package = self._package(name)
        inner = package.get("InferenceSpecification", {}).get("Containers", [{}])[0]
        return pick(inner, "Image", "ModelDataUrl", "Environment") | definition

    def model_container(self, model_name: str) -> tuple[dict, str]:
        """The one container of a model, and its role."""
        model = self.store.get(MODEL, model_name, lambda: could_not_find("model", arn(MODEL, model_name)))
        primary = model.get("PrimaryContainer") or model["Containers"][0]
        return self.container(primary), model["ExecutionRoleArn"]

    async def describe_model(self, request: dict) -> dict:
        """DescribeModel."""
        return self._model(request)

    def _model(self, request: dict) -> Record:
        name = request["ModelName"]
        return self.store.get(MODEL, name, lambda: could_not_find("model", arn(MODEL, name)))

    async def list_models(self, request: dict) -> dict:
        """ListModels."""
        models, token = page(self.store.all(MODEL), request, "ModelName")
        return {"Models": [*summaries(models, "ModelName", "ModelArn", "CreationTime")], "NextToken": token}

    async def delete_model(self, request: dict) -> dict:
        """DeleteModel."""
        self.store.delete(self._model(request))
        return {}

    # Endpoint configurations

    async def create_config(self, request: dict) -> dict:
        """CreateEndpointConfig."""
        name = request["EndpointConfigName"]
        config_arn = arn(CONFIG, name)
        if self.store.find(CONFIG, name):
            raise ValidationException(f'Cannot create already existing endpoint configuration "{config_arn}".')
        variants = request["ProductionVariants"]
        names = [variant["VariantName"] for variant in variants]
        if len(set(names)) < len(names):
            raise ValidationException("Variant names must be unique within an endpoint configuration.")
        for variant in variants:
            if "ModelName" not in variant:
                raise NotImplementedLocally("A production variant without ModelName (inference components)")
            self._model(variant)
            if "ServerlessConfig" in variant:
                if len(variants) > 1:
                    raise ValidationException("A serverless endpoint can have one production variant only.")
            elif not variant.get("InstanceType") or not variant.get("InitialInstanceCount"):
                raise ValidationException(
                    "You must specify InstanceType and InitialInstanceCount for the variant "
                    f"{variant['VariantName']!r}, or a ServerlessConfig."
                )
        stored = [{"InitialVariantWeight": 1.0} | variant for variant in variants]
        self.store.save(
            record(
                CONFIG,
                name,
                config_arn,
                **(without_tags(request) | {"ProductionVariants": stored}),
                EndpointConfigArn=config_arn,
                CreationTime=now(),
                _tags=request.get("Tags", []),
            )
        )
        return {"EndpointConfigArn": config_arn}

    def config(self, name: str) -> Record:
        """The endpoint configuration of that name; raises ValidationException."""
        return self.store.get(CONFIG, name, lambda: could_not_find("endpoint configuration", arn(CONFIG, name)))

    async def describe_config(self, request: dict) -> dict:
        """DescribeEndpointConfig."""
        return self.config(request["EndpointConfigName"])

    async def list_configs(self, request: dict) -> dict:
        """ListEndpointConfigs."""
        configs, token = page(self.store.all(CONFIG), request, "EndpointConfigName")
        return {
            "EndpointConfigs": [*summaries(configs, "EndpointConfigName", "EndpointConfigArn", "CreationTime")],
            "NextToken": token,
        }

    async def delete_config(self, request: dict) -> dict:
        """DeleteEndpointConfig."""
        self.store.delete(self.config(request["EndpointConfigName"]))
        return {}

    # Model packages

    def _group(self, name: str) -> Record:
        found = self.store.by_arn(name) if name.startswith("arn:") else self.store.find(GROUP, name)
        if found is None or found["_kind"] != GROUP:
            group_arn = name if name.startswith("arn:") else arn(GROUP, name)
            raise ValidationException(f"ModelPackageGroup {group_arn} does not exist.")
        return found

    def _package(self, name: str) -> Record:
        found = self.store.by_arn(name)
        if found is None or found["_kind"] != PACKAGE:
            raise ValidationException(
                f"ModelPackage {name if name.startswith('arn:') else arn(PACKAGE, name)} does not exist."
            )
        return found

    async def create_group(self, request: dict) -> dict:
        """CreateModelPackageGroup."""
        name = request["ModelPackageGroupName"]
        group_arn = arn(GROUP, name)
        if self.store.find(GROUP, name):
            raise ValidationException(f"Model Package Group already exists: {group_arn}")
        self.store.save(
            record(
                GROUP,
                name,
                group_arn,
                **without_tags(request),
                ModelPackageGroupArn=group_arn,
                ModelPackageGroupStatus="Completed",
                CreationTime=now(),
                CreatedBy={},
                _tags=request.get("Tags", []),
                _versions=0,
            )
        )
        return {"ModelPackageGroupArn": group_arn}

    async def describe_group(self, request: dict) -> dict:
        """DescribeModelPackageGroup."""
        return self._group(request["ModelPackageGroupName"])

    async def list_groups(self, request: dict) -> dict:
        """ListModelPackageGroups."""
        groups, token = page(self.store.all(GROUP), request, "ModelPackageGroupName")
        return {
            "ModelPackageGroupSummaryList": [
                *summaries(
                    groups,
                    "ModelPackageGroupName",
                    "ModelPackageGroupArn",
                    "ModelPackageGroupDescription",
                    "CreationTime",
                    "ModelPackageGroupStatus",
                )
            ],
            "NextToken": token,
        }

    async def delete_group(self, request: dict) -> dict:
        """DeleteModelPackageGroup: an empty one."""
        group = self._group(request["ModelPackageGroupName"])
        if any(package["ModelPackageGroupName"] == group["_name"] for package in self.store.all(PACKAGE)):
            raise ConflictException(
                f"Model package group {group['_arn']} cannot be deleted because it still contains model packages."
            )
        self.store.delete(group)
        return {}

    async def create_package(self, request: dict) -> dict:
        """CreateModelPackage: a version in a group."""
        if "ModelPackageGroupName" not in request:
            raise NotImplementedLocally("A model package outside a model package group")
        group = self._group(request["ModelPackageGroupName"])
        group["_versions"] += 1
        version = group["_versions"]
        package_arn = arn(PACKAGE, f"{group['_name']}/{version}")
        created = now()
        self.store.save(group)
        members = {"ModelApprovalStatus": "PendingManualApproval"} | without_tags(request)
        members.pop("ClientToken", None)
        self.store.save(
            record(
                PACKAGE,
                f"{group['_name']}/{version}",
                package_arn,
                **(members | {"ModelPackageGroupName": group["_name"]}),
                ModelPackageVersion=version,
                ModelPackageArn=package_arn,
                ModelPackageStatus="Completed",
                ModelPackageStatusDetails={"ValidationStatuses": [], "ImageScanStatuses": []},
                CreationTime=created,
                CreatedBy={},
                _tags=request.get("Tags", []),
            )
        )
        return {"ModelPackageArn": package_arn}

    async def describe_package(self, request: dict) -> dict:
        """DescribeModelPackage, by ARN."""
        return self._package(request["ModelPackageName"])

    async def list_packages(self, request: dict) -> dict:
        """ListModelPackages: the versions of a group."""
        packages = list(self.store.all(PACKAGE))
        if name := request.get("ModelPackageGroupName"):
            group = self._group(name)
            packages = [package for package in packages if package["ModelPackageGroupName"] == group["_name"]]
        elif request.get("ModelPackageType", "Unversioned") == "Unversioned":
            packages = []
        if approval := request.get("ModelApprovalStatus"):
            packages = [package for package in packages if package["ModelApprovalStatus"] == approval]
        found, token = page(packages, request, "ModelPackageGroupName", "ModelPackageStatus")
        return {
            "ModelPackageSummaryList": [
                *summaries(
                    found,
                    "ModelPackageGroupName",
                    "ModelPackageVersion",
                    "ModelPackageArn",
                    "ModelPackageDescription",
                    "CreationTime",
                    "ModelPackageStatus",
                    "ModelApprovalStatus",
                )
            ],
            "NextToken": token,
        }

    async def update_package(self, request: dict) -> dict:
        """UpdateModelPackage: approval, its description, and metadata."""
        package = self._package(request["ModelPackageArn"])
        package |= pick(request, "ModelApprovalStatus", "ApprovalDescription", "SourceUri")
        properties = package.get("CustomerMetadataProperties", {}) | request.get("CustomerMetadataProperties", {})
        removed = request.get("CustomerMetadataPropertiesToRemove", [])
        package["CustomerMetadataProperties"] = {key: value for key, value in properties.items() if key not in removed}
        package["LastModifiedTime"] = now()
        self.store.save(package)
        return {"ModelPackageArn": package["_arn"]}

    async def delete_package(self, request: dict) -> dict:
        """DeleteModelPackage."""
        self.store.delete(self._package(request["ModelPackageName"]))
        return {}

    # Tags

    def _tagged(self, request: dict) -> Record:
        found = self.store.by_arn(request["ResourceArn"])
        if found is None:
            raise ValidationException(f"Could not find resource {request['ResourceArn']}.")
        return found

    async def add_tags(self, request: dict) -> dict:
        """AddTags: a key that is there gets the new value."""
        found = self._tagged(request)
        tags = {tag["Key"]: tag for tag in found["_tags"] + request["Tags"]}
        if len(tags) > MAX_TAGS:
            raise ValidationException(f"The number of tags of {found['_arn']} would exceed {MAX_TAGS}.")
        found["_tags"] = list(tags.values())
        self.store.save(found)
        return {"Tags": found["_tags"]}

    async def list_tags(self, request: dict) -> dict:
        """ListTags."""
        return {"Tags": self._tagged(request)["_tags"]}

    async def delete_tags(self, request: dict) -> dict:
        """DeleteTags."""
        found = self._tagged(request)
        found["_tags"] = [tag for tag in found["_tags"] if tag["Key"] not in request["TagKeys"]]
        self.store.save(found)
        return {}


def without_tags(request: dict) -> dict:
    """The request's members but Tags, which Describe does not show."""
    return {key: value for key, value in request.items() if key != "Tags"}


def could_not_find(what: str, resource_arn: str) -> ValidationException:
    """AWS's words for a model, endpoint or endpoint configuration that is not there."""
    return ValidationException(f'Could not find {what} "{resource_arn}".')
