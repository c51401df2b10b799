"""IAM: wildcards of policies match every character, the line breaks of an object's key included, as on AWS.

For ministack's authors: `re.DOTALL` and `\\Z` in `iam_evaluator._fnmatch_compile`.
"""

from __future__ import annotations

import re
from functools import cache

from ministack.core import iam_evaluator

from . import expect


def install() -> None:
    """Make the patterns that ministack makes of wildcards match over line breaks, and to the very end."""
    compiled = expect("policies", iam_evaluator, "_fnmatch_compile", "pattern", "ignore_case")

    @cache
    def fnmatch_compile(pattern: str, ignore_case: bool) -> re.Pattern:
        found = compiled(pattern, ignore_case)
        return re.compile(found.pattern.removesuffix("$") + r"\Z", found.flags | re.DOTALL)

    iam_evaluator._fnmatch_compile = fnmatch_compile
