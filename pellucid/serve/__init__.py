"""A local server: OpenAI's API over the models that were named at its start."""

from __future__ import annotations

from pellucid.serve.app import build_app, open_engines
from pellucid.serve.queue import ServedModel
from pellucid.serve.security import Rules
from pellucid.serve.server import serve_models

__all__ = ["Rules", "ServedModel", "build_app", "open_engines", "serve_models"]
