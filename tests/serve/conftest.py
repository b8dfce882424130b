"""One browser and one server for all tests of the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browsing import Reader, changed_demo, launch
from serving import served

import pellucid
from pellucid.language_model import LanguageModel
from pellucid.serve import Engine


@pytest.fixture(scope="session")
def demo_lm() -> LanguageModel:
    """The shipped model that the page's tests look into."""
    return pellucid.load("demo")


@pytest.fixture(scope="session")
def changed_lm() -> LanguageModel:
    """The same model with one weight changed."""
    return changed_demo()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Chromium without a window; skips where it or playwright is missing."""
    with launch() as browser:
        yield browser


@pytest.fixture(scope="session")
def url(chromium, demo_lm, changed_lm) -> Iterator[str]:
    """The address of a server with demo, the changed demo and a model of another shape."""
    models = {"demo": demo_lm, "changed": changed_lm, "demo-gpt2": pellucid.load("demo-gpt2")}
    with served(*(Engine(lm, name, fast=False) for name, lm in models.items())) as client:
        yield str(client.base_url).rstrip("/")


@pytest.fixture(scope="session")
def shared_tab(chromium, url) -> Iterator[Reader]:
    """One tab in which the page is loaded once."""
    one = Reader(chromium, url)
    one.open()
    yield one
    one.context.close()


@pytest.fixture
def reader(shared_tab, url) -> Iterator[Reader]:
    """The shared tab: without complaints afterwards, and without requests to elsewhere."""
    shared_tab.complaints.clear()
    shared_tab.asked.clear()
    yield shared_tab
    assert shared_tab.complaints == []
    assert all(asked.startswith((url, "about:", "data:")) for asked in shared_tab.asked), (
        "the page called elsewhere"
    )
