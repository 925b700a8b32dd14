"""A plugin of pytest for `mutate.py map`: coverage says which test executes a line, whatever runs the test.

(Coverage's own `dynamic_context = test_function` takes the first function whose name begins with "test". Under
Hypothesis that is one of its own, so that property tests would execute nothing.) What a fixture of wider scope than a
function does belongs to no test in particular.
"""

from collections.abc import Iterator

import coverage
import pytest

_current = ""


def _switch(context: str) -> None:
    running = coverage.Coverage.current()
    if running is not None:
        running.switch_context(context)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """The context of a test is its node id, without parameters."""
    global _current
    _current = item.nodeid.partition("[")[0]
    _switch(_current)
    try:
        return (yield)
    finally:
        _current = ""
        _switch("")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> Iterator[None]:  # type: ignore[type-arg]
    """No context while a fixture that several tests share is made."""
    shared = fixturedef.scope != "function"
    if shared:
        _switch("")
    try:
        return (yield)
    finally:
        if shared:
            _switch(_current)
