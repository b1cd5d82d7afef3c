"""What the tests share."""

import pytest

# Their assertions say what they compared, as a test's own do; each by name, before it is imported.
pytest.register_assert_rewrite(
    "tests.support.embedded_users",
    "tests.support.leftovers",
    "tests.support.side_by_side",
    "tests.support.subjects",
)
