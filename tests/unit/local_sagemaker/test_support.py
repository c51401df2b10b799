"""The table of what each action takes, and the page that is written from it."""

import pytest

from local.emulator import CHECKOUT
from local.sagemaker import reference
from local.sagemaker.api import SageMaker
from local.sagemaker.support import ACTIONS

RUNTIME = {"InvokeEndpoint"}  # routed by its path


def test_the_page_is_what_the_table_says():
    page = (CHECKOUT / "docs" / "local-sagemaker.md").read_text()
    assert page == reference.page(), "run: python -m local.sagemaker.support > docs/local-sagemaker.md"


def test_every_action_is_in_the_table_and_every_action_of_the_table_is_there(settings):
    assert set(SageMaker(settings).actions) | RUNTIME == set(ACTIONS)


@pytest.mark.parametrize("action", ACTIONS)
def test_fields_and_values_of_the_table_are_sagemakers(action):
    support = ACTIONS[action]
    unknown = [path for path in support.fields | set(support.values) if reference.find(action, path) is None]
    assert not unknown
    for path, values in support.values.items():
        assert set(values) <= set(reference.enumeration(action, path) or values), path
        assert path in support.fields, f"{path} is restricted but not accepted"


def test_a_field_either_acts_or_has_no_effect():
    for action, support in ACTIONS.items():
        for path in support.no_effect:
            above = [path[:end] for end in range(len(path)) if path[end] == "."]
            assert not set(above) & support.fields, f"{action}.{path} is within a field that is accepted whole"
