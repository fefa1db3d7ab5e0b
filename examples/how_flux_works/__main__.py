"""Every picture and every figure of docs/how-flux-works.md, measured on the shipped weights.

    python -m examples.how_flux_works                # all of it, about ten minutes of one core
    python -m examples.how_flux_works guidance gates # some sections; the rest stays as it is

Writes docs/how-flux-works/*.png and figures.json, and puts the figures where the two documents
name them. Checkpoints that the package does not hold are left out; run it again when it does.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import torch

from fluxkern import FluxPipeline
from fluxkern.pipeline import COMPACT_WEIGHTS

from . import blocks, guidance, path, text, vae
from .common import Size, checkpoints

DOCS = Path(__file__).resolve().parents[2] / "docs"
FOLDER = DOCS / "how-flux-works"
PAGES = (DOCS / "how-flux-works.md", DOCS / "how-flux-works.zh.md")

SECTIONS: dict[str, Callable[[FluxPipeline, Size, Path], dict]] = {
    "road": path.road,
    "convolution": vae.convolution,
    "feature_maps": vae.feature_maps,
    "equivariance": vae.equivariance,
    "pooling": vae.pooling,
    "schedule": path.schedule,
    "path": path.path,
    "straightness": path.straightness,
    "encoders": text.encoders,
    "words": text.attention_maps,
    "blocks": blocks.diagram,
    "streams": blocks.streams,
    "rope": blocks.rope,
    "gates": blocks.gates,
}
EVERY = (*SECTIONS, "guidance")


def measure(names: list[str], size: Size, folder: Path) -> dict:
    """The figures of some sections, by their names; pictures go to the folder."""
    found = checkpoints()
    figures: dict = {"rows": {}}
    for name in names:
        print(name, flush=True)
        if name == "guidance":
            new = guidance.compare(found, size, folder)
        else:
            new = SECTIONS[name](found["compact-base"], size, folder)
        figures["rows"] |= new.pop("rows", {})
        figures |= new
    return figures


def weights() -> dict[str, str]:
    """The hash of each file of weights in the package."""
    files = sorted(COMPACT_WEIGHTS.rglob("*.safetensors"))
    return {
        str(file.relative_to(COMPACT_WEIGHTS)): sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def filled(page: str, figures: dict) -> str:
    """The page with its figures: `<!--=name-->old<!--/-->`, and whole rows of a table."""

    def value(match: re.Match) -> str:
        return f"<!--={match[1]}-->{figures[match[1]]}<!--/-->"

    def table(match: re.Match) -> str:
        rows = "".join(f"| {' | '.join(row)} |\n" for row in figures["rows"][match[1]])
        return f"<!--rows={match[1]}-->\n{match[2]}{rows}<!--/-->"

    page = re.sub(r"<!--=(\w+)-->.*?<!--/-->", value, page)
    return re.sub(r"<!--rows=(\w+)-->\n((?:\|.*\n){2})(?:\|.*\n)*<!--/-->", table, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(EVERY))
    names = parser.parse_args().sections or list(EVERY)
    if unknown := set(names) - set(EVERY):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(EVERY)}")
    new, store = measure(names, Size(), FOLDER), FOLDER / "figures.json"
    old = json.loads(store.read_text()) if store.exists() else {}
    rows = old.get("rows", {}) | new.pop("rows")
    kept = old | new | {"rows": rows, "weights": weights(), "torch": torch.__version__}
    store.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    for page in PAGES:
        if page.exists():
            page.write_text(filled(page.read_text(), kept))


if __name__ == "__main__":
    main()
