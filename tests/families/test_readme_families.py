"""The README's table of families, made from the rows; `make readme-table` writes it there.

A type stands in it because a tiny model of that type is built, loaded and run by the tests beside.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from family_samples import SAMPLES

from pellucid.families import FAMILIES, WITH_TEXT_PART
from pellucid.families.shapes import SHAPES

README = Path(__file__).parents[2] / "README.md"
HEADINGS = (
    "| families | `model_type` in transformers' words | GGUF | sizes that `info` and `plan` know |",
    "|---|---|---|---|",
)
GROUPS = {  # a beginning of a type's name -> its line; the rest stand in the last one
    "Llama, Mistral": ("llama", "mi", "arcee", "helium"),
    "Qwen, SmolLM 3": ("qwen", "smollm", "seed", "ernie", "hunyuan", "exaone"),
    "Gemma": ("gemma",),
    "OLMo, Granite, Cohere": ("olmo", "granite", "cohere"),
    "Phi, GLM": ("phi", "glm", "stablelm", "nemotron"),
    "GPT-2 and others": ("",),
}
# Releases whose files have the type of another name
ALSO = {"llama": "TinyLlama, SmolLM 2, Falcon 3", "qwen2": "Qwen 2.5", "phi3": "Phi-4"}


def group_of(model_type: str) -> str:
    return next(name for name, starts in GROUPS.items() if model_type.startswith(starts))


def line_of(group: str) -> str:
    types = [each for each in FAMILIES if group_of(each) == group]
    loaded = [f"`{each}`" + (f" ({ALSO[each]} too)" if each in ALSO else "") for each in types]
    parts = [whole for whole, text in WITH_TEXT_PART.items() if text in types]
    text_of = f"; the text part of {', '.join(f'`{each}`' for each in parts)}" if parts else ""
    without = [f"`{each}`" for each in types if FAMILIES[each].gguf is None]
    gguf = f"not {', '.join(without)}" if without else "yes"
    sizes = [f"`{name}`" for name, shape in SHAPES.items() if shape.config.family in types]
    return f"| {group} | {', '.join(loaded)}{text_of} | {gguf} | {', '.join(sizes) or '–'} |"


def table() -> str:
    return "\n".join((*HEADINGS, *map(line_of, GROUPS)))


def lines_in(readme: str) -> Iterator[re.Match[str]]:
    return re.finditer(r"^\| families \|.*\n(?:\|.*\n)*", readme, re.MULTILINE)


def test_the_readme_holds_the_table_of_the_rows():
    (found,) = lines_in(README.read_text("utf-8"))
    assert found[0] == table() + "\n", f"run `make readme-table`, or paste:\n{table()}"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_type_of_the_table_has_a_model_in_the_tests(model_type):
    assert any(sample["model_type"] == model_type for sample in SAMPLES.values())
    assert f"`{model_type}`" in table()


if __name__ == "__main__":
    text = README.read_text("utf-8")
    (old,) = lines_in(text)
    README.write_text(text.replace(old[0], table() + "\n"), "utf-8")
