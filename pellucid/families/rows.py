"""All rows, by ``model_type``."""

from __future__ import annotations

from pellucid.families import gemma, gpt2, llama, others, phi
from pellucid.families.row import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (*llama.ROWS, gpt2.GPT2, *gemma.ROWS, *phi.ROWS, *others.ROWS)
}
