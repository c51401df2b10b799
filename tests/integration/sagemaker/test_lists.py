"""Lists: filters, order, pages. Names begin with the test's own word, which is the filter that keeps others out."""

import datetime

import pytest

from tests.makers.sagemaker import ROLE, variant


@pytest.fixture(scope="module")
def groups(world):
    """Five groups made in the order of their numbers, whose names sort otherwise."""
    names = [f"listed-{word}" for word in ("c", "A", "e", "b", "d")]
    for name in names:
        world.sagemaker.create_model_package_group(ModelPackageGroupName=name)
    return names


def names(world, **request):
    answer = world.sagemaker.list_model_package_groups(**{"NameContains": "listed-"} | request)
    return [item["ModelPackageGroupName"] for item in answer["ModelPackageGroupSummaryList"]]


def test_order_is_what_is_asked_for_or_documented(world, groups):
    by_name = sorted(groups)
    assert names(world) == groups, "groups are listed oldest first"
    assert names(world, SortOrder="Descending") == groups[::-1]
    assert names(world, SortBy="CreationTime") == groups
    assert names(world, SortBy="Name") == by_name
    assert names(world, SortBy="Name", SortOrder="Descending") == by_name[::-1]


def test_models_configurations_and_endpoints_are_listed_newest_first(world, taken):
    for number in range(3):
        name = f"newest-{number}"
        container = {"Image": "local/server:1"}
        world.sagemaker.create_model(ModelName=name, ExecutionRoleArn=ROLE, PrimaryContainer=container)
        world.sagemaker.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant(ModelName=name)])
    models = world.sagemaker.list_models(NameContains="newest")["Models"]
    configs = world.sagemaker.list_endpoint_configs(NameContains="newest")["EndpointConfigs"]
    assert [item["ModelName"] for item in models] == ["newest-2", "newest-1", "newest-0"]
    assert [item["EndpointConfigName"] for item in configs] == ["newest-2", "newest-1", "newest-0"]
    assert set(models[0]) == {"ModelName", "ModelArn", "CreationTime"}


def test_filters(world, groups):
    assert names(world, NameContains="LISTED-a") == ["listed-A"]
    assert names(world, NameContains="nothing") == []
    times = {
        name: world.sagemaker.describe_model_package_group(ModelPackageGroupName=name)["CreationTime"]
        for name in groups
    }
    middle = times["listed-e"]
    assert names(world, CreationTimeAfter=middle) == [name for name in groups if times[name] >= middle]
    assert names(world, CreationTimeBefore=middle) == [name for name in groups if times[name] < middle]
    assert names(world, CreationTimeAfter=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)) == []


def test_status_is_a_filter_of_what_has_one(world, taken):
    found = world.sagemaker.list_endpoints(StatusEquals="InService", NameContains="taken")["Endpoints"]
    assert [item["EndpointName"] for item in found] == ["taken"]
    assert world.sagemaker.list_endpoints(StatusEquals="Failed", NameContains="taken")["Endpoints"] == []


@pytest.mark.parametrize("request_", [{}, {"SortBy": "Name"}, {"SortBy": "Name", "SortOrder": "Descending"}])
def test_pages_hold_everything_once(world, groups, request_):
    pages = list(
        world.sagemaker.get_paginator("list_model_package_groups").paginate(
            NameContains="listed-", **request_, PaginationConfig={"PageSize": 2}
        )
    )
    assert [len(page["ModelPackageGroupSummaryList"]) for page in pages] == [2, 2, 1]
    found = [item["ModelPackageGroupName"] for page in pages for item in page["ModelPackageGroupSummaryList"]]
    assert found == names(world, **request_)


def test_a_page_has_ten_items_unless_it_is_told_otherwise(world):
    for number in range(11):
        world.sagemaker.create_model_package_group(ModelPackageGroupName=f"eleven-{number:02d}")
    first = world.sagemaker.list_model_package_groups(NameContains="eleven")
    assert len(first["ModelPackageGroupSummaryList"]) == 10
    second = world.sagemaker.list_model_package_groups(NameContains="eleven", NextToken=first["NextToken"])
    assert [item["ModelPackageGroupName"] for item in second["ModelPackageGroupSummaryList"]] == ["eleven-10"]
    assert "NextToken" not in second
    whole = world.sagemaker.list_model_package_groups(NameContains="eleven", MaxResults=11)
    assert len(whole["ModelPackageGroupSummaryList"]) == 11 and "NextToken" not in whole


@pytest.mark.parametrize("order", ["Ascending", "Descending"])
def test_what_is_made_and_deleted_between_pages_moves_nothing(world, order):
    client, prefix = world.sagemaker, f"moving-{order[:3].lower()}"
    for number in range(6):
        client.create_model_package_group(ModelPackageGroupName=f"{prefix}-{number}")
    request = {"NameContains": prefix, "SortOrder": order, "MaxResults": 2}
    first = client.list_model_package_groups(**request)
    shown = [item["ModelPackageGroupName"] for item in first["ModelPackageGroupSummaryList"]]
    for name in shown:
        client.delete_model_package_group(ModelPackageGroupName=name)
    client.create_model_package_group(ModelPackageGroupName=f"{prefix}-late")
    rest, token = [], first["NextToken"]
    while token:
        page = client.list_model_package_groups(**request, NextToken=token)
        rest += [item["ModelPackageGroupName"] for item in page["ModelPackageGroupSummaryList"]]
        token = page.get("NextToken")
    late = [f"{prefix}-late"] if order == "Ascending" else []
    expected = [f"{prefix}-{number}" for number in range(6) if f"{prefix}-{number}" not in shown]
    assert rest == (expected if order == "Ascending" else expected[::-1]) + late
