"""The list of codes and the catalogues of faults are the same list, and as long as the documentation says."""

import re
import runpy
from pathlib import Path

from validators.findings import CODES

HERE = Path(__file__).parent
CATALOGUES = {
    "test_damages.py": ("DAMAGES",),
    "test_lies.py": ("LIES",),
    "test_origins.py": ("DRAWS", "OVERLAPS", "DEEP", "AGAINST"),
}


def faults():
    """Of every corruption of every catalogue the codes under which it has to be found."""
    found = {}
    for file, names in CATALOGUES.items():
        module = runpy.run_path(str(HERE / file))
        found |= {(name, fault): codes for name in names for fault, (codes, _) in module[name].items()}
    return found


def test_every_code_can_be_provoked():
    assert set().union(*faults().values()) == set(CODES)


def test_there_are_as_many_kinds_of_damage_as_the_page_says():
    page = (HERE.parents[1] / "docs/trust.md").read_text()
    (stated,) = re.findall(r"(\d+) kinds of damage", page)
    assert int(stated) == len(faults()) >= 60
