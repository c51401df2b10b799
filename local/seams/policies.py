"""IAM: wildcards of policies match every character, the line breaks of an object's key included, as on AWS.

And a policy is taken apart once: ministack does so twice for every request, for all policies of the caller.

For ministack's authors: `re.DOTALL` and `\\Z` in `iam_evaluator._fnmatch_compile`; policies parsed once.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import Any

from ministack.core import iam_evaluator

from . import expect


def install() -> None:
    """Make the patterns made of wildcards match over line breaks, and to the very end; keep what is parsed."""
    compiled = expect("policies", iam_evaluator, "_fnmatch_compile", "pattern", "ignore_case")

    @cache
    def fnmatch_compile(pattern: str, ignore_case: bool) -> re.Pattern:
        found = compiled(pattern, ignore_case)
        return re.compile(found.pattern.removesuffix("$") + r"\Z", found.flags | re.DOTALL)

    iam_evaluator._fnmatch_compile = fnmatch_compile
    parse = expect("policies", iam_evaluator, "parse_policy_document", "doc")
    kept = lru_cache(1024)(parse)  # by the text itself: a policy that is changed is another one

    def parse_policy_document(doc: Any) -> list:
        return list(kept(doc)) if isinstance(doc, str) else parse(doc)

    iam_evaluator.parse_policy_document = parse_policy_document
