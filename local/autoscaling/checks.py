"""What Application Auto Scaling refuses, in AWS's words where they are known, and what is not implemented here."""

from __future__ import annotations

import math

from local.sagemaker.errors import SageMakerError, ValidationException

from . import policies

NAMESPACE, DIMENSION = "sagemaker", "sagemaker:variant:DesiredInstanceCount"
METRICS = (policies.INVOCATIONS, "SageMakerVariantConcurrentRequestsPerModelHighResolution")  # of this dimension
UNSUPPORTED = "Unsupported service namespace, resource type or scalable dimension"


class Refusal(SageMakerError):
    """An error that Application Auto Scaling has and SageMaker has not."""

    def __init__(self, code: str, message: str, status: int = 400, **extra: object) -> None:
        super().__init__(message, **extra)
        self.code, self.status = code, status


def not_implemented(what: str) -> Refusal:
    """AWS does this, it is not done here: said by name, never silently accepted."""
    return Refusal("NotImplemented", f"{what} is not implemented by the local Application Auto Scaling.", 501)


def check_scope(request: dict) -> None:
    """Refuse by name what scales on AWS but not here, and in AWS's words what scales nowhere."""
    namespace, dimension = request.get("ServiceNamespace", NAMESPACE), request.get("ScalableDimension", DIMENSION)
    if namespace != NAMESPACE:
        raise not_implemented(f"The service namespace {namespace}")
    if not dimension.startswith(f"{NAMESPACE}:"):
        raise ValidationException(UNSUPPORTED)
    if dimension != DIMENSION:
        raise not_implemented(f"The scalable dimension {dimension}")
    for resource in request.get("ResourceIds", [request["ResourceId"]] if "ResourceId" in request else []):
        if not policies.RESOURCE.fullmatch(resource):
            raise ValidationException(UNSUPPORTED)


def check_filter(request: dict, member: str) -> None:
    """Refuse a Describe request that names a dimension, and no resource of it in `member`."""
    if "ScalableDimension" in request and not request.get(member):
        raise ValidationException(f"{member} must be specified when ScalableDimension is specified")


def check_tracking(config: dict) -> None:
    """Refuse a target tracking configuration that AWS would refuse, or that is not implemented here."""
    predefined = config.get("PredefinedMetricSpecification")
    custom = config.get("CustomizedMetricSpecification")
    if bool(predefined) == bool(custom):
        raise ValidationException(
            "Exactly one of PredefinedMetricSpecification and CustomizedMetricSpecification must be specified"
        )
    if predefined:
        metric = predefined["PredefinedMetricType"]
        if metric not in METRICS:
            raise ValidationException(
                f"Scalable dimension {DIMENSION} only supports the following predefined metric types: "
                f"{', '.join(METRICS)}"
            )
        if metric != policies.INVOCATIONS:
            raise not_implemented(f"PredefinedMetricType {metric}")
        if predefined.get("ResourceLabel"):
            raise ValidationException("ResourceLabel can only be specified for ALBRequestCountPerTarget")
    if custom:
        if custom.get("Metrics"):
            raise not_implemented("CustomizedMetricSpecification.Metrics")
        for name in ("MetricName", "Namespace", "Statistic"):
            if not custom.get(name):
                raise ValidationException(f"CustomizedMetricSpecification.{name} must be specified")
    if not 0 < config["TargetValue"] < math.inf:
        raise ValidationException("TargetValue must be greater than 0")
    _check_cooldowns(config)


def check_steps(config: dict) -> None:
    """Refuse a step scaling configuration that AWS would refuse."""
    kind, steps = config.get("AdjustmentType"), config.get("StepAdjustments")
    if not kind:
        raise ValidationException("AdjustmentType must be specified")
    if not steps:
        raise ValidationException("At least one StepAdjustment must be specified")
    intervals = sorted(policies.bounds(step) for step in steps)
    if any(low >= high for low, high in intervals):
        raise ValidationException("MetricIntervalUpperBound must be greater than MetricIntervalLowerBound")
    for (_, end), (begin, _) in zip(intervals, intervals[1:], strict=False):
        if end != begin:
            fault = "overlap" if begin < end else "have gaps between them"
            raise ValidationException(f"StepAdjustment intervals can't {fault}")
    if kind == "ExactCapacity" and any(step["ScalingAdjustment"] < 0 for step in steps):
        raise ValidationException("ScalingAdjustment must not be negative for ExactCapacity")
    if config.get("MinAdjustmentMagnitude") and kind != "PercentChangeInCapacity":
        raise ValidationException("MinAdjustmentMagnitude can only be specified for PercentChangeInCapacity")
    _check_cooldowns(config)


def _check_cooldowns(config: dict) -> None:
    for name in ("Cooldown", "ScaleOutCooldown", "ScaleInCooldown"):
        if config.get(name, 0) < 0:
            raise ValidationException(f"{name} must be greater than or equal to 0")
