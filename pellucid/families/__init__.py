"""What is known of each family of models, as rows: config keys, names in files, sources.

Features decide what a model computes, families only what its files look like. Nothing outside this
room asks for a family.
"""

from pellucid.families.config import WITH_TEXT_PART, family_of, read_config, write_config
from pellucid.families.gguf_config import (
    gguf_of,
    gguf_table,
    read_gguf_config,
    rope_tensors,
    write_gguf_config,
)
from pellucid.families.names import (
    Entry,
    Names,
    PairOrder,
    Shape,
    as_ours,
    joined,
    split,
    stored_shape,
)
from pellucid.families.row import Family
from pellucid.families.rows import FAMILIES
from pellucid.families.table import known_buffers, left_out_prefix, table

__all__ = [
    "FAMILIES",
    "WITH_TEXT_PART",
    "Entry",
    "Family",
    "Names",
    "PairOrder",
    "Shape",
    "as_ours",
    "family_of",
    "gguf_of",
    "gguf_table",
    "joined",
    "known_buffers",
    "left_out_prefix",
    "read_config",
    "read_gguf_config",
    "rope_tensors",
    "split",
    "stored_shape",
    "table",
    "write_config",
    "write_gguf_config",
]
