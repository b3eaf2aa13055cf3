"""What a test needs and this machine does not have: a skip for a person, a failure where everything must be there.

CI that lost a package would otherwise stay green with the tests that need it left out. What a machine cannot be (not
Linux, not root) is skipped everywhere: `make ci` and `.ci/run` run on machines that can.
"""

import os
from typing import NoReturn

import pytest

VARIABLES = ("CI", "COMPLETE")
"""Either says that nothing may be lacking: the first is what CI systems set, the second what `.ci/run` does."""


def lacking(what: str) -> NoReturn:
    """`what`: what is not there and how to get it."""
    said = next(
        (name for name in VARIABLES if os.environ.get(name, "").lower() not in {"", "0", "false"}), None
    )
    if said is None:
        pytest.skip(what)
    pytest.fail(f"{what}\n{said} is set, so a test is not skipped for it: provide it", pytrace=False)
