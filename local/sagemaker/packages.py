"""The model registry: model package groups, and the versions in them."""

from __future__ import annotations

from .errors import ConflictException, ValidationException
from .jobs import summaries
from .store import Record, Store, arn, now, page, pick, record

GROUP, PACKAGE = "model-package-group", "model-package"
MAX_METADATA = 50  # CustomerMetadataProperties of a package
SUMMARY = (
    "ModelPackageGroupName",
    "ModelPackageVersion",
    "ModelPackageArn",
    "ModelPackageDescription",
    "CreationTime",
    "ModelPackageStatus",
    "ModelApprovalStatus",
)


class Packages:
    """CreateModelPackageGroup, CreateModelPackage and their siblings. Every package is a version in a group."""

    def __init__(self, store: Store) -> None:
        self.store = store

    # Groups

    def _group(self, name: str) -> Record:
        """The group of that name or ARN; raises ValidationException."""
        group_arn = name if name.startswith("arn:") else arn(GROUP, name)
        found = self.store.by_arn(group_arn)
        if found is None or found["_kind"] != GROUP:
            raise ValidationException(f"ModelPackageGroup {group_arn} does not exist.")
        return found

    async def create_group(self, request: dict) -> dict:
        """CreateModelPackageGroup."""
        name = request["ModelPackageGroupName"]
        group_arn = arn(GROUP, name)
        if self.store.by_arn(group_arn):
            raise ValidationException(f"Model Package Group already exists: {group_arn}")
        self.store.save(
            record(
                GROUP,
                name,
                group_arn,
                **pick(request, "ModelPackageGroupName", "ModelPackageGroupDescription"),
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
        shown = summaries(
            groups,
            "ModelPackageGroupName",
            "ModelPackageGroupArn",
            "ModelPackageGroupDescription",
            "CreationTime",
            "ModelPackageGroupStatus",
        )
        return {"ModelPackageGroupSummaryList": list(shown), "NextToken": token}

    async def delete_group(self, request: dict) -> dict:
        """DeleteModelPackageGroup: an empty one."""
        group = self._group(request["ModelPackageGroupName"])
        if self._versions(group):
            raise ConflictException(
                f"Model Package Group {group['_arn']} cannot be deleted because it still contains Model Packages."
            )
        self.store.delete(group)
        return {}

    # Versions

    def _versions(self, group: Record) -> list[Record]:
        return [item for item in self.store.all(PACKAGE) if item["ModelPackageGroupName"] == group["_name"]]

    def find(self, name: str) -> Record:
        """The package of that ARN, or `<group>/<version>`; raises ValidationException."""
        package_arn = name if name.startswith("arn:") else arn(PACKAGE, name)
        found = self.store.by_arn(package_arn)
        if found is None or found["_kind"] != PACKAGE:
            raise ValidationException(f"ModelPackage {package_arn} does not exist.")
        return found

    async def create(self, request: dict) -> dict:
        """CreateModelPackage: the next version in a group. A number is never given out twice."""
        if "ModelPackageGroupName" not in request:
            raise ValidationException("Missing ARN.")
        if "Tags" in request:
            raise ValidationException("Tags cannot be given for a versioned model package: it has those of its group.")
        group = self._group(request["ModelPackageGroupName"])
        if repeated := self._same_request(group, request):
            return {"ModelPackageArn": repeated["_arn"]}
        group["_versions"] += 1
        self.store.save(group)
        version = group["_versions"]
        name = f"{group['_name']}/{version}"
        package_arn = arn(PACKAGE, name)
        members = {"ModelApprovalStatus": "PendingManualApproval"} | request
        members.pop("ClientToken", None)
        self.store.save(
            record(
                PACKAGE,
                name,
                package_arn,
                **(members | {"ModelPackageGroupName": group["_name"]}),
                ModelPackageVersion=version,
                ModelPackageArn=package_arn,
                ModelPackageStatus="Completed",
                ModelPackageStatusDetails={"ValidationStatuses": [], "ImageScanStatuses": []},
                CertifyForMarketplace=False,
                CreationTime=now(),
                CreatedBy={},
                _tags=[],
                _request=request if "ClientToken" in request else None,
            )
        )
        return {"ModelPackageArn": package_arn}

    def _same_request(self, group: Record, request: dict) -> Record | None:
        """The package that an earlier request with this ClientToken made; raises ConflictException if it differed."""
        token = request.get("ClientToken")
        for package in self._versions(group) if token else ():
            earlier = package.get("_request", {})
            if earlier.get("ClientToken") == token:
                if earlier != request:
                    raise ConflictException("The client token was used before, with other parameters.")
                return package
        return None

    async def describe(self, request: dict) -> dict:
        """DescribeModelPackage."""
        return self.find(request["ModelPackageName"])

    async def describe_batch(self, request: dict) -> dict:
        """BatchDescribeModelPackage: what is there, and an error for each that is not."""
        found, errors = {}, {}
        for package_arn in request["ModelPackageArnList"]:
            try:
                package = self.find(package_arn)
            except ValidationException as error:
                errors[package_arn] = {"ErrorCode": error.code, "ErrorResponse": error.message}
            else:
                found[package_arn] = pick(package, *SUMMARY, "InferenceSpecification")
        return {"ModelPackageSummaries": found, "BatchDescribeModelPackageErrorMap": errors}

    async def list(self, request: dict) -> dict:
        """ListModelPackages: without a group, and without ModelPackageType, those outside any: there are none here."""
        if name := request.get("ModelPackageGroupName"):
            packages = self._versions(self._group(name))
        elif request.get("ModelPackageType", "Unversioned") == "Unversioned":
            packages = []
        else:
            packages = [*self.store.all(PACKAGE)]
        if approval := request.get("ModelApprovalStatus"):
            packages = [package for package in packages if package["ModelApprovalStatus"] == approval]
        found, token = page(packages, request, "ModelPackageGroupName")
        return {"ModelPackageSummaryList": [*summaries(found, *SUMMARY)], "NextToken": token}

    async def update(self, request: dict) -> dict:
        """UpdateModelPackage: approval, its description, and metadata."""
        package = self.find(request["ModelPackageArn"])
        removed = request.get("CustomerMetadataPropertiesToRemove", [])
        properties = package.get("CustomerMetadataProperties", {}) | request.get("CustomerMetadataProperties", {})
        properties = {key: value for key, value in properties.items() if key not in removed}
        if len(properties) > MAX_METADATA:
            raise ValidationException(f"The number of CustomerMetadataProperties would exceed {MAX_METADATA}.")
        package |= pick(request, "ModelApprovalStatus", "ApprovalDescription", "SourceUri")
        package["CustomerMetadataProperties"] = properties
        package["LastModifiedTime"] = now()
        package["LastModifiedBy"] = {}
        self.store.save(package)
        return {"ModelPackageArn": package["_arn"]}

    async def delete(self, request: dict) -> dict:
        """DeleteModelPackage."""
        self.store.delete(self.find(request["ModelPackageName"]))
        return {}
