"""``pellucid fetch OWNER/NAME``: download a model and print the folder it is in."""

from __future__ import annotations

import argparse

from pellucid.cli.arguments import add_shared
from pellucid.cli.output import print_json


def fetch_arguments(parser: argparse.ArgumentParser) -> None:
    """Which repository, and whether as JSON."""
    parser.add_argument(
        "repository", metavar="OWNER/NAME", help="model to download, as the Hub names it"
    )
    add_shared(parser.add_argument_group("output"), "--json")


def fetch(arguments: argparse.Namespace) -> None:
    """Download into the Hub's own cache, check the files against each other, print the folder."""
    from pellucid import checkpoints

    checkpoint = checkpoints.open_checkpoint(checkpoints.fetch(arguments.repository))
    if not arguments.json:
        print(checkpoint.folder)
        return
    print_json(
        {
            "model": arguments.repository,
            "folder": str(checkpoint.folder),
            "layout": checkpoint.layout,
            "family": checkpoint.config.family,
            "file_bytes": checkpoint.file_bytes,
        }
    )
