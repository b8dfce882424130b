"""``config.json`` of Hugging Face's layout; what its keys mean is known to `pellucid.families`."""

from pellucid.families import read_config, write_config

__all__ = ["read_config", "write_config"]
