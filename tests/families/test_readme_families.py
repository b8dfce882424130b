"""The README's table of families names every type that loads, and no other."""

import re
from pathlib import Path

from pellucid.families import FAMILIES, WITH_TEXT_PART

README = Path(__file__).parents[2] / "README.md"


def test_the_table_names_every_type_that_loads():
    table = README.read_text().partition("| families |")[2].partition("\n\n")[0]
    assert set(re.findall("`([^`]+)`", table)) == {*FAMILIES, *WITH_TEXT_PART}
