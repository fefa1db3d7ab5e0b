"""The list of places in docs/adding-an-op.md is that of the tree."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/adding-an-op.md").read_text()
ROWS = re.findall(
    r"^\| `([\w./]+)` \| .* \| (.*) \|$", PAGE.partition("## All the places")[2], re.M
)
OP = "gated_residual_norm_modulate"


def test_the_list_is_read():
    assert len(ROWS) == 14 and sum(OP in place for place, _ in ROWS) == 5


@pytest.mark.parametrize("place, test", ROWS, ids=[place for place, _ in ROWS])
def test_each_place_holds_the_op_and_its_test_is_there(place: str, test: str):
    assert OP in (ROOT / place).read_text()
    name = test.strip("`")
    if name.startswith("test_"):
        found = [f for f in (ROOT / "tests").glob("test_*.py") if f"def {name}(" in f.read_text()]
        assert len(found) == 1


def test_no_other_file_of_the_package_or_of_csrc_has_a_line_of_the_op():
    """But those that use it: the model, the drop-in, what is measured."""
    using = ("model", "integrations", "compact", "bench", "checkpoint", "pipeline.py", "measured")
    for folder in ("fluxkern", "csrc"):
        for file in (ROOT / folder).rglob("*"):
            parts = file.relative_to(ROOT).parts
            if file.suffix not in (".py", ".h", ".cuh", ".cpp", ".cu") or parts[1] in using:
                continue
            if re.search(rf"\b{OP}\b", file.read_text()):
                assert "/".join(parts) in dict(ROWS), "/".join(parts)
