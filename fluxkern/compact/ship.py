"""Packs what a run trained into the package: checkpoints that share all but their transformers.

    python -m fluxkern.compact.ship RUN --figures compact.json --machine "two cores of ..."

The folder is the teacher's, as diffusers loads it; `dev` and `schnell` in it are folders of the
same kind whose autoencoder, text encoders and tokenizers are links to the teacher's. A student that
RUN does not hold is left out. The figures are those of `python -m benchmarks.compact --json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .._files import ALL, new_folder, read_json
from ..pipeline import COMPACT_WEIGHTS, FluxPipeline

SHARED = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
STUDENTS = ("dev", "schnell")
LIMIT = 40e6  # bytes of all checkpoints
UNSAID = ("time", "stage", "step", "clip", "t5")  # of an entry of the log
STAGES = {  # of a checkpoint, and the command that goes through them
    "base": {"vae": "vae", "decoder": "vae", "text": "flow", "flow": "flow"},
    "dev": {"guidance": "distill"},
    "schnell": {"few_steps": "distill"},
}
ABOUT = {
    "base": """A FLUX.1 transformer of {millions:.1f} million parameters, a VAE with 16 channels at
an eighth of the size and two text encoders, in the file formats of FLUX.1, half precision, for
pictures of 128 x 128. It is the teacher: two passes a step, with `true_cfg_scale`, 16 steps.""",
    "dev": """The teacher's two passes in one: guidance is an input beside the time, drawn from 1 to
5 in training. 16 steps, `guidance_scale` 3.5, no `true_cfg_scale`: a negative prompt has no effect.
{millions:.1f} million parameters; autoencoder and text encoders are the teacher's, by links.""",
    "schnell": """The guidance-distilled student in 4 steps, without guidance. {millions:.1f}
million parameters; autoencoder and text encoders are the teacher's, by links.""",
}
CARD = """# Compact FLUX: {name}

{about}

`fluxkern generate PROMPT --model compact-{name}`; in Python `FluxPipeline.from_pretrained` of
fluxkern ("compact-{name}") and of diffusers (this folder).

## Training data

Drawings of 128 x 128 pixels that the code makes itself (`fluxkern/compact/drawings.py`): circle,
square, triangle, star, ring, cross; red, green, blue, yellow, orange, purple, cyan, black, white;
small, medium, large; nine places; a background of another colour, plain or textured; two objects
and their relation; captions in varied words. What a caption leaves unsaid is the default: medium,
in the centre. A tenth of the combinations of shape, colour and background never occurs in training.

## Training time

{machine}. By {commands}{start}:

| stage | steps | batch | seconds a step | hours | when judged last |
|---|---|---|---|---|---|
{stages}

Seconds a step are the median between two entries of the log, evaluations included; hours are these
times the steps. What was judged is a sample, drawn while it trained; shares are of 1.

## Figures

By `python -m benchmarks.compact`: {count} prompts, seed {seed}, commit {commit}, on {cpu},
{threads} threads. The judge (`fluxkern/compact/judge.py`) reads pixels and was fixed before
training.

| measure | value | asked for | met |
|---|---|---|---|
{figures}

## Limits

It knows these shapes, colours and words and nothing else. Words it has not seen have no meaning to
it.
"""


def ship(run: Path, weights: Path, figures: dict[str, Any], machine: str) -> None:
    """Writes the folder of the checkpoints, whole or not at all.

    Args:
        run: holds `weights`, perhaps `dev` and `schnell`, `log.jsonl` and the recipes.
        weights: the folder; what it holds before is replaced.
        figures: of `benchmarks.compact`.
        machine: where it was trained, in words.

    Raises:
        ValueError: a student that is not of this teacher's autoencoder and text encoders, or
            checkpoints that are too large together.
    """
    base = FluxPipeline.from_pretrained(run / "weights").to(dtype=torch.float16)
    with new_folder(weights, ALL) as folder:
        base.save_pretrained(folder)
        (folder / "README.md").write_text(card("base", base, run, figures, machine))
        for name in STUDENTS:
            if (run / name).is_dir():
                student = FluxPipeline.from_pretrained(run / name).to(dtype=torch.float16)
                check_twins(name, student, base)
                write_student(folder / name, student, base)
                (folder / name / "README.md").write_text(card(name, student, run, figures, machine))
                FluxPipeline.from_pretrained(folder / name)  # through its links
        size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
        if size > LIMIT:
            raise ValueError(f"the checkpoints must take at most {LIMIT:g} bytes, got {size}")


def check_twins(name: str, student: FluxPipeline, base: FluxPipeline) -> None:
    """The decoder may be newer than the student: it alone has no part in what a latent means."""
    for part in ("vae.encoder", "text_encoder.clip", "text_encoder.t5"):
        ours, theirs = (attrgetter(part)(pipe).state_dict() for pipe in (student, base))
        same = ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)
        if not same or student.vae.config != base.vae.config:
            raise ValueError(f"{name} was distilled with another {part} than that of weights")


def write_student(folder: Path, student: FluxPipeline, base: FluxPipeline) -> None:
    parts = base.vae, base.text_encoder, student.schedule, base.default_size
    FluxPipeline(student.transformer, *parts).save_pretrained(folder)
    for part in SHARED:
        shutil.rmtree(folder / part)
        (folder / part).symlink_to(Path("..") / part, target_is_directory=True)


def card(name: str, pipe: FluxPipeline, run: Path, figures: dict[str, Any], machine: str) -> str:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    commands = dict.fromkeys(STAGES[name].values())
    recipes = {command: read_json(run / f"{command}.json") for command in commands}
    started = name == "base" and any(recipe["start"] for recipe in recipes.values())
    size = sum(p.numel() for p in pipe.transformer.parameters())
    found = figures["machine"]
    return CARD.format(
        name=name,
        about=ABOUT[name].format(millions=size / 1e6),
        machine=machine[0].upper() + machine[1:],
        commands=", ".join(f"`fluxkern train {command}`" for command in commands),
        start=", which began with the weights that were here before" if started else "",
        stages="\n".join(
            stage_row(stage, recipes[command][stage], log)
            for stage, command in STAGES[name].items()
        ),
        count=figures["count"],
        seed=figures["seed"],
        commit=(found["commit"] or "unknown")[:7],
        cpu=found["gpu"]["name"] if found["gpu"] else found["cpu"],
        threads=found["threads"],
        figures="\n".join(
            figure_row(row) for row in figures["rows"] if row["measure"].startswith(f"{name}: ")
        ),
    )


def stage_row(stage: str, numbers: dict[str, Any], log: list[dict[str, Any]]) -> str:
    """Steps from the recipe, all else from the log; what it does not say stays empty."""
    entries = [entry for entry in log if entry["stage"] == stage]
    pace = [
        (b["time"] - a["time"]) / (b["step"] - a["step"])
        for a, b in pairwise(entries)
        if b.get("step", 0) > a.get("step", 0)
    ]
    times = " | "
    if pace:
        times = f"{median(pace):.2f} | {median(pace) * numbers['steps'] / 3600:.1f}"
    judged = {k: v for k, v in (entries or [{}])[-1].items() if not k.startswith(UNSAID)}
    said = ", ".join(f"{k} {v:.3g}" for k, v in judged.items())
    return f"| {stage} | {numbers['steps']} | {numbers['batch_size']} | {times} | {said} |"


def figure_row(row: dict[str, Any]) -> str:
    name = row["measure"].partition(": ")[2]
    if row["bound"] is None:
        return f"| {name} | {row['value']:.4g} | | |"
    met = row["value"] >= row["bound"] if row["at_least"] else row["value"] <= row["bound"]
    asked = f"{'>=' if row['at_least'] else '<='} {row['bound']:g}"
    return f"| {name} | {row['value']:.4g} | {asked} | {'yes' if met else 'no'} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fluxkern.compact.ship", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of `fluxkern train`")
    add("--figures", type=Path, required=True, metavar="FILE", help="of benchmarks.compact")
    add("--machine", required=True, help="where it was trained, in words")
    add("--weights", type=Path, default=COMPACT_WEIGHTS, metavar="FOLDER", help="the package's")
    args = parser.parse_args(argv)
    ship(args.run, args.weights, read_json(args.figures), args.machine)
    print(args.weights)


if __name__ == "__main__":
    main()
