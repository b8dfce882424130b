"""Fixtures of the page's tests: one browser and one server for a whole session.

Their helpers lie in tests/serve, which is on the path once a test there is collected.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import pellucid


@pytest.fixture(scope="session")
def demo_lm() -> Any:
    """The shipped model that the page's tests look into."""
    return pellucid.load("demo")


@pytest.fixture(scope="session")
def changed_lm() -> Any:
    """The same model with one weight changed."""
    from browsing import changed_demo

    return changed_demo()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Chromium without a window; skips where it or playwright is missing."""
    from browsing import launch

    with launch() as browser:
        yield browser


@pytest.fixture(scope="session")
def url(chromium, demo_lm, changed_lm) -> Iterator[str]:
    """The address of a server with demo, the changed demo and a model of another shape."""
    from serving import served

    from pellucid.serve import ServedModel

    models = {"demo": demo_lm, "changed": changed_lm, "demo-gpt2": pellucid.load("demo-gpt2")}
    with served(*(ServedModel(lm, name, fast=False) for name, lm in models.items())) as client:
        yield str(client.base_url).rstrip("/")


@pytest.fixture(scope="session")
def shared_tab(chromium, url) -> Iterator[Any]:
    """One tab in which the page is loaded once."""
    from browsing import Reader

    one = Reader(chromium, url)
    one.open()
    yield one
    one.context.close()


@pytest.fixture
def reader(shared_tab, url) -> Iterator[Any]:
    """The shared tab: without complaints afterwards, and without requests to elsewhere."""
    shared_tab.complaints.clear()
    shared_tab.asked.clear()
    yield shared_tab
    assert shared_tab.complaints == []
    assert all(asked.startswith((url, "about:", "data:")) for asked in shared_tab.asked), (
        "the page called elsewhere"
    )
