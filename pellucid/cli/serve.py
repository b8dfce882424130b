"""``pellucid serve``: the explorer and OpenAI's API for models, on this machine."""

from __future__ import annotations

import argparse
import sys

from pellucid.cli.arguments import ENGINES, MODEL_FLAG_HELP, MODEL_HELP, add_shared
from pellucid.cli.types import byte_size


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL …, where to listen and which requests to accept."""
    parser.add_argument(
        "models", nargs="*", metavar="MODEL",
        help=f"models to serve, and no others: {MODEL_HELP} (default: demo)",
    )  # fmt: skip
    door = parser.add_argument_group("server")
    door.add_argument(
        "--host", default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1: this machine only)",
    )  # fmt: skip
    door.add_argument(
        "--open", action="store_true", help="open the explorer in this machine's browser"
    )
    door.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    door.add_argument(
        "--api-key", metavar="KEY", help="key that requests must carry as Authorization: Bearer KEY"
    )
    door.add_argument(
        "--insecure",
        action="store_true",
        help="accept requests without a key on a --host that other machines can reach",
    )
    door.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL",
        help="let pages of this origin call from a browser, such as https://example.org; may be "
        "given several times (default: none)",
    )  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument(
        "-m", "--model", action="append", default=[],
        help=MODEL_FLAG_HELP,
    )  # fmt: skip
    add_shared(model, "--dtype", "--device", "--engine", "--draft")
    model.add_argument(
        "--memory", type=byte_size, default="1G", metavar="SIZE",
        help="how much the explorer's runs may hold, such as 500M or 4G; what is dropped is "
        "computed again (default: 1G)",
    )  # fmt: skip


def serve(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    from pellucid.serve import serve_models

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    serve_models(
        [*arguments.models, *arguments.model] or ["demo"],
        host=arguments.host,
        port=arguments.port,
        key=arguments.api_key,
        insecure=arguments.insecure,
        origins=arguments.allow_origin,
        fast=ENGINES[arguments.engine],
        show=arguments.open,
        memory=arguments.memory,
        report=report,
        dtype=arguments.dtype,
        device=arguments.device,
        draft=arguments.draft,
    )
