"""Damages checkpoint files and loads them.

    python tests/fuzz_files.py [--loads N] [--pipelines N] [--seed N] [--case N]

Each case changes one file of a small checkpoint: bytes, its length, a value of its JSON, or what
stands in its place. It must then be refused in one line, or be read as others read it. Counts what
is not so, processes that ended, cases of over 20 s of CPU time or over 6 GB, and files left behind;
exits with 1 where there is one. A case is drawn from (seed, number): `--case` runs one again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from checkpoint_files import same_bits, tiny_autoencoder, tiny_flux
from safetensors.torch import load_file
from tiny_flux import write_tiny_flux
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast
from transformers.utils import logging

from fluxkern import FluxPipeline, checkpoint
from fluxkern.checkpoint import configs
from fluxkern.model.text_encoder import TextEncoder

SECONDS, MEMORY = 20, 6 * 2**30
PROMPT = "a red circle on a blue background, 圆"
NUMBERS = (
    -1,
    0,
    1,
    2,
    7,
    10**5,
    2**31,
    2**63,
    10**40,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
)
TEXTS = ("", "x", "../../x", "/etc/passwd", "\x00", "é" * 300)
HOSTILE = (*NUMBERS, *TEXTS, None, True, [], [1], [[]] * 50, {}, {"a": 1})
STAND_INS = ("/dev/zero", "/", "nowhere", "..")
FAULTS = ("traceback", "several lines", "ended", "time", "memory", "left", "another meaning")


# what is loaded, and how others read it


@dataclass(frozen=True)
class Target:
    """A checkpoint, how it is loaded, and whether what was loaded is what others read."""

    write: Callable[[Path], object]
    load: Callable[[Path], Any]
    same: Callable[[Any, Path], bool]


def stored(path: Path) -> dict[str, torch.Tensor]:
    index = path / checkpoint.INDEX
    if path.is_file():
        return load_file(path)
    if not index.exists():
        return load_file(path / "diffusion_pytorch_model.safetensors")
    shards = set(json.loads(index.read_bytes())["weight_map"].values())
    return {name: t for shard in shards for name, t in load_file(path / shard).items()}


def same_folder(model: Any, path: Path, config: dict[str, Any], state: dict[str, Any]) -> bool:
    """The tensors to the bit, and the fields of the config that a model has."""
    data = json.loads((path / "config.json").read_bytes())
    fields = [key for key in config if data.get(key) is not None and not key.startswith("_")]
    return same_bits(state, stored(path)) and all(data[key] == config[key] for key in fields)


def same_flux(model: Any, path: Path) -> bool:
    config = configs.flux_config_to_diffusers(model.config)
    return same_folder(model, path, config, checkpoint.flux_to_diffusers(model.state_dict()))


def same_autoencoder(model: Any, path: Path) -> bool:
    config = configs.autoencoder_config_to_diffusers(model.config)
    return same_folder(model, path, config, checkpoint.autoencoder_to_diffusers(model.state_dict()))


def same_bfl(model: Any, path: Path) -> bool:
    prefix = "model.diffusion_model."
    found = {name.removeprefix(prefix): t for name, t in stored(path).items()}
    return same_bits(model.state_dict(), found)


def draw(path: Path) -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(path)
    small = {"height": 32, "width": 32, "num_inference_steps": 1, "progress": False}
    pipe(PROMPT, output_type="latent", **small)
    return pipe


def same_pipeline(pipe: FluxPipeline, path: Path) -> bool:
    ours = embeddings(pipe.text_encoder)
    same = same_flux(pipe.transformer, path / "transformer")
    same &= same_autoencoder(pipe.vae, path / "vae")
    return same and (close(ours, original()) or close(ours, embeddings(others(path))))


@torch.no_grad()
def embeddings(encoder: TextEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    return encoder.encode([PROMPT])


def close(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> bool:
    """Up to the order of sums, which follows from where a file's tensors lie in memory."""
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def others(path: Path) -> TextEncoder:
    """The text encoders as transformers alone reads them."""
    return TextEncoder(
        CLIPTextModel.from_pretrained(path / "text_encoder", dtype=torch.float32),
        CLIPTokenizer.from_pretrained(path / "tokenizer"),
        T5EncoderModel.from_pretrained(path / "text_encoder_2", dtype=torch.float32),
        T5TokenizerFast.from_pretrained(path / "tokenizer_2"),
    )


@cache
def original() -> tuple[torch.Tensor, torch.Tensor]:
    return embeddings(others(CORPUS[0] / "pipeline" / "flux"))


CORPUS: list[Path] = []  # the folder of what is damaged, once it is made
LOADS = {
    "flux": Target(
        lambda path: checkpoint.save_flux(tiny_flux(), path, max_shard_size="700KB"),
        checkpoint.load_flux,
        same_flux,
    ),
    "flux-one": Target(
        lambda path: checkpoint.save_flux(tiny_flux(depth=1), path), checkpoint.load_flux, same_flux
    ),
    "bfl.safetensors": Target(
        lambda path: checkpoint.save_flux(tiny_flux(depth=1), path, format="bfl"),
        checkpoint.load_flux,
        same_bfl,
    ),
    "vae": Target(
        lambda path: checkpoint.save_autoencoder(tiny_autoencoder(), path),
        checkpoint.load_autoencoder,
        same_autoencoder,
    ),
}
PIPELINE = Target(
    lambda path: write_tiny_flux(path, guidance=True), lambda path: draw(path), same_pipeline
)


# damage


def changed_json(data: bytes, rng: random.Random) -> bytes:
    """One value of a JSON text changed, renamed, removed or doubled."""
    value = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys if len(keys) < 60 else rng.sample(list(keys), 60):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(value)
    if not places:
        return data + b" "
    node, key = rng.choice(places)
    kind = rng.choice(("replace", "replace", "nudge", "remove", "rename"))
    if kind == "nudge" and type(node[key]) in (int, float):
        node[key] = node[key] * rng.choice((2, -1, 1000)) + rng.choice((0, 1))
    elif kind == "remove":
        del node[key]
    elif kind == "rename" and isinstance(node, dict):
        node[rng.choice(("x", "_x", key + "2", key[:-1]))] = node.pop(key)
    else:
        node[key] = rng.choice(HOSTILE)
    return json.dumps(value).encode()


def changed_header(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = changed_json(data[8 : 8 + length], rng)
    if rng.random() < 0.3:
        return struct.pack("<Q", rng.choice((0, length + 1, 2**63, 2**40))) + data[8:]
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    out, size = bytearray(data), len(data)
    head = min(size, 4096)
    kind = rng.choice(("flip", "flip", "cut", "grow", "drop", "zero", "empty"))
    at = rng.randrange(rng.choice((head, size)) or 1)
    if kind == "flip" and size:
        for _ in range(rng.randint(1, 8)):
            out[rng.randrange(rng.choice((head, size)))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del out[at:]
    elif kind == "grow":
        out += rng.randbytes(rng.randint(1, 100))
    elif kind == "drop":
        del out[at : at + rng.randint(1, 64)]
    elif kind == "zero":
        out[at : at + 16] = bytes(len(out[at : at + 16]))
    elif kind == "empty":
        out.clear()
    return bytes(out)


def stand_in(path: Path, rng: random.Random) -> None:
    path.unlink()
    kind = rng.choice(("gone", "link", "fifo", "folder"))
    if kind == "link":
        path.symlink_to(rng.choice(STAND_INS))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()


def damage(root: Path, rng: random.Random) -> Path:
    """Changes one file; returns which."""
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    path = rng.choice(files)
    if rng.random() < 0.05:
        stand_in(path, rng)
        return path
    data = path.read_bytes()
    change = changed_bytes
    if path.suffix == ".json" and rng.random() < 0.8:
        change = changed_json
    elif path.suffix == ".safetensors" and rng.random() < 0.5:
        change = changed_header
    path.unlink()  # its bytes are shared with the corpus
    path.write_bytes(change(data, rng))
    return path


# cases


def link_or_copy(source: Path, target: Path) -> None:
    if source.is_file():
        os.link(source, target)
    else:
        shutil.copytree(source, target, copy_function=os.link)


def listing(root: Path) -> list[Path]:
    return sorted(root.rglob("*"))


def run_case(seed: int, number: int, name: str, target: Target, place: Path) -> tuple[str, str]:
    """(what came of it, in words); the outcome is "refused", "read" or one of FAULTS."""
    rng = random.Random(f"{seed}:{number}")
    source = CORPUS[0] / name
    source = source / "flux" if (source / "flux").exists() else source
    path = place / name
    link_or_copy(source, path)
    where = damage(path, rng).relative_to(place)
    before, begin = listing(place), time.process_time()
    try:
        outcome, words = judged(target, path)
    finally:
        left = listing(place) != before
        shutil.rmtree(place)
        place.mkdir()
    if time.process_time() - begin > SECONDS:
        outcome = "time"
    return ("left" if left else outcome), f"{where}: {words}"


def judged(target: Target, path: Path) -> tuple[str, str]:
    try:
        loaded = target.load(path)
    except ValueError as error:
        text = str(error)
        return ("several lines" if "\n" in text or len(text) > 4000 else "refused"), text[:300]
    except MemoryError as error:
        return "memory", str(error)
    except BaseException:
        return "traceback", traceback.format_exc()[-1500:]
    try:
        same = target.same(loaded, path)
    except BaseException:
        return "another meaning", f"others do not read it: {traceback.format_exc()[-800:]}"
    return ("read" if same else "another meaning"), "loaded"


def worker(cases: range, seed: int, targets: dict[str, Target], log: Path, place: Path) -> None:
    """Runs cases in this process and notes each before and after; a silent end is seen there."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # panics of libraries in Rust
    names = sorted(targets)
    with open(log, "w") as notes:
        for number in cases:
            signal.alarm(6 * SECONDS)  # of wall time; a machine may be busy
            name = names[number % len(names)]
            print(json.dumps([number]), file=notes, flush=True)
            outcome, words = run_case(seed, number, name, targets[name], place)
            print(json.dumps([number, outcome, words]), file=notes, flush=True)


def run(count: int, seed: int, targets: dict[str, Target], folder: Path) -> Counter[str]:
    """All cases, in one process as long as none ends it."""
    found: Counter[str] = Counter()
    first = 0
    while first < count:
        log, place = folder / "log", folder / "place"
        place.mkdir(exist_ok=True)
        child = os.fork()
        if not child:
            try:
                worker(range(first, count), seed, targets, log, place)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        notes = [json.loads(line) for line in log.read_text().splitlines()]
        for number, *rest in notes:
            if rest:
                found[rest[0]] += 1
                if rest[0] in FAULTS:
                    print(f"case {number}: {rest[0]}: {rest[1]}", flush=True)
        first = notes[-1][0] + 1
        if len(notes[-1]) == 1:
            ended = "time" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == 14 else "ended"
            found[ended] += 1
            print(f"case {notes[-1][0]}: {ended}, status {status}", flush=True)
        shutil.rmtree(place)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", type=int, default=20_000, help="cases of single models")
    parser.add_argument("--pipelines", type=int, default=1_500, help="cases of whole pipelines")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="drawn")
    parser.add_argument("--case", type=int, help="one alone, of the kind whose count is not 0")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"seed: {args.seed}", flush=True)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        CORPUS.append(Path(name) / "corpus")
        for count, targets in ((args.loads, LOADS), (args.pipelines, {"pipeline": PIPELINE})):
            if not count:
                continue
            for target in targets:
                CORPUS[0].mkdir(exist_ok=True)
                targets[target].write(CORPUS[0] / target)
            if args.case is not None:
                one, place = sorted(targets)[args.case % len(targets)], Path(name) / "place"
                place.mkdir()
                print(*run_case(args.seed, args.case, one, targets[one], place))
                return 0
            found = run(count, args.seed, targets, Path(name))
            print(*targets, json.dumps(found), flush=True)
            total += found
    print("all", json.dumps({key: total[key] for key in ("refused", "read", *FAULTS)}))
    return int(any(total[fault] for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
