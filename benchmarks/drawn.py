"""One picture by the kernels and one by the reference, and what the judge sees in the first.

python3 -m benchmarks.drawn --device cuda --output picture.png
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from fluxkern.bench import ROOT
from fluxkern.compact.drawings import Scene
from fluxkern.compact.judge import judge, matches

from . import rows
from .jobs import FAILED, PASSED

PROMPT = "a red circle on a blue background"
SCENE = Scene("circle", "red", "medium", "centre", "blue")


def draw(file: Path, args: argparse.Namespace, backend: str | None) -> Image.Image:
    command = [sys.executable, "-m", "fluxkern.cli", "generate", PROMPT, "--seed", "0", "--force"]
    command += ["--output", str(file), "--device", args.device]
    command += ["--steps", str(args.steps)] if args.steps else []
    named = {"FLUXKERN_BACKEND": backend} if backend else {}
    subprocess.run(command, cwd=ROOT, env=os.environ | named, check=True)
    return Image.open(file)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.drawn", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--steps", type=int, help="fewer than the judge needs: it is not asked")
    add("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    with TemporaryDirectory() as aside:
        plain = draw(Path(aside) / "reference.png", args, "reference").convert("RGB")
        picture = draw(args.output, args, None)
    about, ours = json.loads(picture.info["fluxkern"]), np.asarray(picture.convert("RGB"))
    seen, levels = judge(ours), np.abs(ours.astype(int) - np.asarray(plain).astype(int)).max()
    right = bool(args.steps) or matches(seen, SCENE)
    rows.emit(
        what=PROMPT,
        status=PASSED if right else FAILED,
        judge=vars(seen),
        levels_from_reference=int(levels),
        backends=about["backends"],
        steps=about["steps"],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
