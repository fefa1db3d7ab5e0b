"""The command line: generate, env, bench, tune, convert, train."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import platform
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

    from .model.transformer import FluxConfig

PROMPTS_LIMIT = 2**26  # bytes
MAX_PICTURES = 100_000  # of a run
MAX_THREADS = 1024
MAX_ROUNDS = 10_000
STEPS, GUIDANCE = 28, 3.5  # of a guidance-distilled model, as in diffusers
BENCH_SUITES = ("ops", "products", "blocks", "step", "parts", "pipeline", "quality", "scaling")
DTYPES = ("float32", "bfloat16", "float16", "int8")
PACKAGES = (
    "fluxkern",
    "torch",
    "triton",
    "transformers",
    "diffusers",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "numpy",
    "pillow",
)
CPU_FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512", "avx_vnni", "amx", "asimd", "sve")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)  # main() says it in one line


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of fluxkern.

    Args:
        argv: the arguments after the program's name; None is those of the process.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad usage or bad input, 130 interrupted.
    """
    try:
        with _warnings_in_one_line():
            args = _parser().parse_args(argv)
            args.run(args)
            sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ValueError as error:
        return _fail(2, error)
    except (OSError, RuntimeError, ImportError) as error:
        return _fail(1, error)
    except MemoryError as error:
        return _fail(1, f"out of memory {error}")
    except KeyboardInterrupt as interrupt:
        _say(str(interrupt) or "interrupted")
        return 130


def _fail(code: int, reason: object) -> int:
    _say(f"error: {str(reason) or type(reason).__name__}")
    return code


def _say(message: str) -> None:
    print(f"fluxkern: {_printable(message)}", file=sys.stderr)


def _printable(text: str) -> str:
    """One line without control characters: they are shown as escapes."""
    text = " ".join(line.strip() for line in text.split("\n") if line.strip())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    def show(message: Warning | str, *_: object, **__: object) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(sys.stderr):  # a bar makes room
            _say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fluxkern", description="Pictures from prompts with FLUX.1.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_env(commands)
    _add_bench(commands)
    _add_tune(commands)
    _add_convert(commands)
    _add_train(commands)
    return parser


def _add_command(commands: Any, run: Any, name: str, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    command.set_defaults(run=run)
    return command


# generate


def _add_generate(commands: Any) -> None:
    command = _add_command(commands, _generate, "generate", "Draw pictures and write them as PNG.")
    add = command.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what to draw")
    add("--prompts", metavar="FILE", help='a file with one prompt a line; "-" is standard input')
    add(
        "--model",
        default="compact",
        help="compact (the default), compact-base, -dev, -schnell, a diffusers folder or ORG/NAME",
    )
    add("--revision", help="branch, tag or commit of ORG/NAME")
    add(
        "--weights",
        action="append",
        default=[],
        metavar="FILE",
        help="a .safetensors, .sft or .gguf file in the place of weights of the folder; repeatable",
    )
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="a LoRA, a .safetensors file or ORG/NAME, and how much it counts, 1; repeatable",
    )
    add("--negative-prompt", metavar="TEXT", help="what to lead away from")
    add("--true-cfg-scale", type=float, metavar="S", help="two-pass guidance; compact: 2, else 1")
    add("--guidance-scale", type=float, metavar="G", help=f"distilled guidance; {GUIDANCE}")
    add("--steps", type=int, metavar="N", help=f"schnell: 4, compact: 16, else {STEPS}")
    add("--seed", type=int, metavar="N", help="of the first picture, the next has N + 1; random")
    add("--height", type=int, metavar="H", help="pixels, a multiple of 16; the model's own")
    add("--width", type=int, metavar="W", help="the same")
    add("--batch", type=int, default=1, metavar="N", help="pictures for each prompt, 1")
    add("--max-sequence-length", type=int, metavar="N", help="tokens T5 reads, the model's own")
    add(
        "--dtype",
        choices=DTYPES,
        help="of all weights; bfloat16 on a GPU, float32 on a CPU; int8: of the blocks'",
    )
    add("--device", choices=("cpu", "cuda"), help="cuda where there is a GPU, else cpu")
    add("--output", metavar="PATH", help="a .png file or a folder; ./fluxkern-SEED.png")
    add("--force", action="store_true", help="write over pictures that exist")


def _generate(args: argparse.Namespace) -> None:
    prompts = _prompts(args)
    _check_generate(args, prompts)
    loras = [_lora(given) for given in args.lora]
    given, args.seed = args.seed, _seed(args.seed)
    outputs = _outputs(args, len(prompts) * args.batch)

    from . import checkpoint
    from .pipeline import FluxPipeline, folder_of

    files = checkpoint.parts_in(args.weights)
    folder = folder_of(args.model, args.revision, tuple(files))
    _fill_defaults(args, folder, files.get("transformer", folder / "transformer"))
    with _quiet_transformers():
        pipe = FluxPipeline.from_pretrained(
            folder, weights=args.weights, dtype=_dtype(args), device=args.device
        )
        args.max_sequence_length = args.max_sequence_length or pipe.text_encoder.max_sequence_length
        facts = _facts(args, folder) | _load_loras(pipe, loras)
        if given is None:
            _say(f"seed {args.seed}")
        for i, prompt in enumerate(prompts):
            first = i * args.batch
            images = _draw(args, pipe, prompt, first, len(outputs))
            for number, image in enumerate(images, first):
                about = {"prompt": prompt, "seed": args.seed + number, "size": list(image.size)}
                _save_png(image, outputs[number], _png_info(about | facts), args.force)
                print(outputs[number], flush=True)


def _lora(given: str) -> tuple[Path, float]:
    """The file of FILE[:SCALE] and the scale."""
    from . import checkpoint
    from .pipeline import check_finite

    path, colon, scale = given.rpartition(":")
    try:
        number = float(scale) if colon else None
    except ValueError:
        number = None  # the colon is the path's
    if number is None:
        path, number = given, 1.0
    return checkpoint.lora_file(path), check_finite(f"--lora {path}: the scale", number)


def _load_loras(pipe: Any, loras: Sequence[tuple[Path, float]]) -> dict[str, Any]:
    """Loads them, and gives what a PNG says of them; the rest of a path says where, not what."""
    from . import checkpoint

    for n, (path, scale) in enumerate(loras):
        pipe.load_lora(path, scale, str(n))
    about = [
        {"file": path.name, "hash": checkpoint.weights_hash(path), "scale": scale}
        for path, scale in loras
    ]
    return {"loras": about} if about else {}


def _seed(given: int | None) -> int:
    if given is None:
        return random.SystemRandom().randrange(2**32)
    if not 0 <= given < 2**62:
        raise ValueError(f"--seed must be from 0 to 2**62 - 1, got {given}")
    return given


def _prompts(args: argparse.Namespace) -> list[str]:
    if (args.prompt is None) == (args.prompts is None):
        found = "neither" if args.prompt is None else "both"
        raise ValueError(f"PROMPT or --prompts FILE must be given, got {found}")
    prompts = [args.prompt]
    if args.prompts is not None:
        file = sys.stdin.fileno() if args.prompts == "-" else args.prompts
        with open(file, "rb", closefd=args.prompts != "-") as lines:
            text = lines.read(PROMPTS_LIMIT + 1)
        if len(text) > PROMPTS_LIMIT:
            raise ValueError(f"--prompts {args.prompts}: larger than {PROMPTS_LIMIT} bytes")
        try:
            lines = io.StringIO(text.decode("utf-8-sig"), newline=None)
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts {args.prompts} is not UTF-8 text: {error}") from None
        found = (line.rstrip("\n") for line in lines if line.strip())
        prompts = list(islice(found, MAX_PICTURES + 1))
        if len(prompts) > MAX_PICTURES:
            raise ValueError(f"--prompts {args.prompts}: holds more than {MAX_PICTURES} prompts")
        if not prompts:
            raise ValueError(f"--prompts {args.prompts} holds no prompt, only blank lines")
    return prompts


def _check_generate(args: argparse.Namespace, prompts: list[str]) -> None:
    """Everything that can be known before a model is loaded."""
    import torch

    from . import pipeline
    from .model.text_encoder import T5_LIMIT, check_texts

    check_texts("PROMPT" if args.prompts is None else "--prompts", prompts)
    check_texts("--negative-prompt", [args.negative_prompt or ""])
    for option, value in (("--height", args.height), ("--width", args.width)):
        if value is not None:
            pipeline.check_size(option, value)
    counts = {
        "--steps": (args.steps, pipeline.MAX_STEPS),
        "--batch": (args.batch, pipeline.MAX_IMAGES),
        "--max-sequence-length": (args.max_sequence_length, T5_LIMIT),
    }
    for option, (value, most) in counts.items():
        if value is not None:
            pipeline.check_count(option, value, most)
    scales = {"--true-cfg-scale": args.true_cfg_scale, "--guidance-scale": args.guidance_scale}
    for option, value in scales.items():
        if value is not None:
            pipeline.check_finite(option, value)
    here = args.model in pipeline.COMPACT or Path(args.model).exists()
    if args.revision is not None and here:
        raise ValueError(f"--revision needs a --model of the hub, got {args.model}")
    on_gpu = torch.cuda.is_available() and args.dtype != "int8"
    args.device = args.device or ("cuda" if on_gpu else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device must be cpu where torch finds no CUDA GPU, got cuda")
    if args.device == "cuda" and args.dtype == "int8":
        raise ValueError("--device must be cpu with --dtype int8, got cuda")
    args.dtype = args.dtype or str(pipeline.default_dtype(args.device)).removeprefix("torch.")


def _outputs(args: argparse.Namespace, count: int) -> list[Path]:
    """Where the pictures go, one name for each; checked before any time is spent."""
    given = args.output or "."
    folder, stem = Path(given), f"fluxkern-{args.seed}"
    if not folder.is_dir() and not given.endswith(os.sep):
        if folder.suffix.lower() != ".png":
            raise ValueError(f"--output must be a .png file or a folder that exists, got {given}")
        folder, stem = folder.parent, folder.stem
    if not folder.is_dir():
        raise ValueError(f"--output: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "--output cannot be written", str(folder))
    if count > MAX_PICTURES:
        raise ValueError(f"a run makes at most {MAX_PICTURES} pictures, {count} were asked for")
    digits = len(str(count))
    names = [f"{stem}-{i:0{digits}}" for i in range(1, count + 1)] if count > 1 else [stem]
    outputs = [folder / f"{name}.png" for name in names]
    for path in outputs:
        _check_free(path, args.force)
    return outputs


def _check_free(path: Path, force: bool) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path} is not a valid Unicode name") from None
    if path.is_dir():
        raise ValueError(f"{path} must be a file, got a folder")
    if os.path.lexists(path) and not force:
        raise ValueError(f"{path} exists already; --force writes over it")


def _config(folder: Path, transformer: Path) -> FluxConfig:
    from . import checkpoint

    if folder.is_file():
        checkpoint.read_header(folder)  # a LoRA and a pickle are refused by name
        raise ValueError(
            f"--model must be a diffusers folder with its text encoders, got {folder}; "
            f"a file of weights is given by --weights"
        )
    checkpoint.check_model_index(folder)
    return checkpoint.flux_config(transformer)


def _fill_defaults(args: argparse.Namespace, folder: Path, transformer: Path) -> None:
    config = _config(folder, transformer)
    steps, true_cfg_scale, guidance_scale = _usual(folder, config)
    args.steps = steps if args.steps is None else args.steps
    if args.true_cfg_scale is None:
        args.true_cfg_scale = true_cfg_scale
    if config.guidance_embed:
        args.guidance_scale = guidance_scale if args.guidance_scale is None else args.guidance_scale
    elif args.guidance_scale is not None:
        warnings.warn("--guidance-scale has no effect: this model takes none", stacklevel=1)
        args.guidance_scale = None


def _usual(folder: Path, config: FluxConfig) -> tuple[int, float, float]:
    """Steps, scale of two-pass guidance and distilled guidance that a model is used with."""
    from . import checkpoint, compact
    from .model.sampling import ScheduleConfig

    name = checkpoint.variant(replace(config, guidance_embed=False))  # dev is schnell then
    steps, guidance, cfg = STEPS, GUIDANCE, 1.0
    if name == "compact":
        steps, cfg = compact.STEPS, compact.GUIDANCE
    if config.guidance_embed:
        return steps, 1.0, guidance
    schedule = checkpoint.read_json(folder / "scheduler" / "scheduler_config.json")
    if not ScheduleConfig.from_diffusers(schedule).use_dynamic_shifting or name == "schnell":
        return compact.FEW_STEPS, 1.0, guidance
    return steps, cfg, guidance


def _dtype(args: argparse.Namespace) -> Any:
    import torch

    return args.dtype if args.dtype == "int8" else getattr(torch, args.dtype)


def _draw(args: argparse.Namespace, pipe: Any, prompt: str, first: int, count: int) -> list[Image]:
    """The pictures of one prompt, each from a generator of its own."""
    import torch
    from tqdm import tqdm

    last = first + args.batch
    title = f"picture {last}/{count}" if args.batch == 1 else f"pictures {first + 1}-{last}/{count}"
    seeds = range(args.seed + first, args.seed + last)
    with tqdm(total=args.steps, desc=title, unit="step", disable=None) as bar:

        def on_step(*_: object) -> None:
            bar.update()

        return pipe(
            prompt,
            negative_prompt=args.negative_prompt,
            true_cfg_scale=args.true_cfg_scale,
            height=args.height,
            width=args.width,
            num_inference_steps=args.steps,
            guidance_scale=GUIDANCE if args.guidance_scale is None else args.guidance_scale,
            num_images_per_prompt=args.batch,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            callback_on_step_end=on_step,
            max_sequence_length=args.max_sequence_length,
            progress=False,
        ).images


def _facts(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What a PNG says of how it was made, but for prompt, seed and size."""
    from . import checkpoint, ops
    from .pipeline import COMPACT

    here = Path(args.model).exists()  # the rest of a path says who and where, not what
    on_hub = not here and args.model not in COMPACT
    return {
        "negative_prompt": (args.negative_prompt or "") if args.true_cfg_scale > 1 else None,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "true_cfg_scale": args.true_cfg_scale,
        "max_sequence_length": args.max_sequence_length,
        "dtype": args.dtype,
        "device": args.device,
        "model": Path(args.model).resolve().name if here else args.model,
        "revision": folder.name if on_hub else None,
        "weights_hash": checkpoint.weights_hash(folder, checkpoint.parts_in(args.weights)),
        "backends": {choice.op: choice.chosen for choice in ops.explain()},
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("fluxkern", "torch", "transformers")},
    }


def _version(package: str) -> str | None:
    if package == "fluxkern":
        from . import __version__

        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _png_info(about: dict[str, Any]) -> PngInfo:
    from PIL.PngImagePlugin import PngInfo

    width, height = about["size"]
    lines = [_printable(about["prompt"])]
    if about["negative_prompt"]:
        lines.append(f"Negative prompt: {_printable(about['negative_prompt'])}")
    lines.append(
        f"Steps: {about['steps']}, True CFG scale: {about['true_cfg_scale']}, "
        f"Guidance scale: {about['guidance_scale']}, Seed: {about['seed']}, "
        f"Size: {width}x{height}, Model: {about['model']}, "
        f"Model hash: {about['weights_hash']}, Version: fluxkern {about['versions']['fluxkern']}"
    )
    info = PngInfo()
    info.add_itxt("fluxkern", json.dumps(about))
    info.add_itxt("parameters", "\n".join(lines))
    return info


def _save_png(image: Image, path: Path, info: PngInfo, force: bool) -> None:
    from ._files import write_files

    def write(unfinished: Path) -> None:
        image.save(unfinished, format="PNG", pnginfo=info)

    try:
        write_files(path.parent, {path.name: write}, new=not force)
    except FileExistsError:  # it came while we drew
        raise ValueError(f"{path} exists already; --force writes over it") from None
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None


# env


def _add_env(commands: Any) -> None:
    command = _add_command(commands, _env, "env", "Say what runs here and why.")
    command.add_argument("--json", action="store_true", help="for a program to read")


def _env(args: argparse.Namespace) -> None:
    found = _environment()
    print(json.dumps(found, indent=2) if args.json else "\n".join(_environment_lines(found)))


def _environment() -> dict[str, Any]:
    import torch

    from . import ops

    return {
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in PACKAGES},
        "system": platform.platform(),
        "cpu": _cpu(),
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "gpus": _gpus(),
        "compiled_kernels": ops.compiled_kernels(),
        "measured_tables": ops.measured.problems(),
        "FLUXKERN_BACKEND": os.environ.get("FLUXKERN_BACKEND") or None,
        "ops": {
            choice.op: {"chosen": choice.chosen, "reasons": choice.reasons}
            for choice in ops.explain()
        },
    }


def _cpu() -> dict[str, Any]:
    import torch

    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)
    words = flags[1].split() if flags else []
    return {
        "model": model[1] if model else platform.processor() or None,
        "architecture": platform.machine(),
        "instruction_sets": [word for word in words if word.startswith(CPU_FLAGS)],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", path.read_text()) if path.exists() else None
    return match[1] if match else None


def _gpus() -> list[dict[str, Any]]:
    import torch

    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(i)
        capability = f"{gpu.major}.{gpu.minor}"
        gpus.append({"name": gpu.name, "capability": capability, "memory": gpu.total_memory})
    return gpus


def _environment_lines(found: dict[str, Any]) -> Iterator[str]:
    cpu = found["cpu"]
    for name, version in found["versions"].items():
        yield f"{name:18} {version or 'not installed'}"
    yield f"{'system':18} {found['system']}"
    yield f"{'cpu':18} {cpu['model']} ({cpu['architecture']})"
    yield f"{'':18} {cpu['cores']} cores, {cpu['threads']} threads of torch"
    yield f"{'':18} {' '.join(cpu['instruction_sets'])}"
    for gpu in found["gpus"]:
        memory = f"{gpu['memory'] / 2**30:.0f} GiB"
        yield f"{'gpu':18} {gpu['name']}, compute capability {gpu['capability']}, {memory}"
    if not found["gpus"]:
        yield f"{'gpu':18} none that torch can use"
    yield f"{'driver':18} {found['driver'] or 'none'}"
    yield f"{'cuda of torch':18} {found['cuda'] or 'none: a CPU build'}"
    for i, (name, reason) in enumerate(found["compiled_kernels"].items()):
        yield f"{'' if i else 'compiled kernels':18} {name}: {reason or 'loaded'}"
    for problem in found["measured_tables"]:
        yield f"{'measured table':18} {problem}"
    yield f"{'FLUXKERN_BACKEND':18} {found['FLUXKERN_BACKEND'] or 'not set'}"
    yield ""
    yield f"{'op':44} {'backend':10} why not the others"
    for op, choice in found["ops"].items():
        why = "; ".join(f"{name}: {reason}" for name, reason in choice["reasons"].items() if reason)
        yield f"{op:44} {choice['chosen'] or '-':10} {why}"


def _check_between(option: str, value: int | None, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        raise ValueError(f"{option} must be from {least} to {most}, got {value}")


# bench


def _add_bench(commands: Any) -> None:
    summary = "Measure ops, blocks and pipeline on this machine; needs a checkout of fluxkern."
    command = _add_command(commands, _bench, "bench", summary)
    add = command.add_argument
    add("--suite", nargs="+", choices=BENCH_SUITES, help="some; all")
    add("--shape", nargs="+", metavar="SHAPE", help="flux-512, on a GPU flux-1024 to -2048-batch-4")
    add("--threads", type=int, metavar="N", help="of torch; as many as there are cores")
    add("--json", metavar="FILE", help="the results; benchmarks/results/MACHINE/")
    add("--plots", metavar="DIR", help="draw what was measured there")
    add(
        "--compare",
        nargs="+",
        metavar="FILE",
        help="results, or a folder: what a fresh run changes",
    )
    add("--profile", metavar="FILE", help="a Chrome trace of one step, .json.gz, and its table")
    add("--report", action="store_true", help="measure nothing, write docs/performance.md")


def _bench(args: argparse.Namespace) -> None:
    _check_between("--threads", args.threads, 1, MAX_THREADS)
    if args.compare is not None and len(args.compare) > 2:
        raise ValueError(f"--compare must be one file or two, got {len(args.compare)}")
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "suite.py").is_file():
        raise ValueError("the benchmarks are not part of the package: run this in a checkout")
    command = [sys.executable, "-m", "benchmarks.suite"]
    for option in ("suite", "shape"):
        given = getattr(args, option) or []
        command += [f"--{option}"] * bool(given) + given
    command += ["--threads", str(args.threads)] if args.threads is not None else []
    for option in ("json", "plots", "profile", "compare"):
        given = getattr(args, option) or []
        paths = [given] if isinstance(given, str) else given
        command += [f"--{option}"] * bool(paths) + [str(Path(path).absolute()) for path in paths]
    command += ["--report"] * args.report
    status = subprocess.run(command, cwd=root).returncode
    if status:
        raise RuntimeError(f"the benchmarks ended with exit status {status}, see above")


# tune


def _add_tune(commands: Any) -> None:
    summary = "Measure which backend of each op is fastest on this device; ops obey it."
    command = _add_command(commands, _tune, "tune", summary)
    add = command.add_argument
    add("--op", nargs="+", metavar="OP", help="all that have more than one backend")
    add("--shape", nargs="+", metavar="SHAPE", help="flux-512 and compact, on a GPU flux-1024 too")
    add("--dtype", nargs="+", metavar="DTYPE", help="fp32 and bf16")
    add("--device", choices=("cpu", "cuda"), help="cuda where there is a GPU, else cpu")
    add("--rounds", type=int, metavar="N", help="samples of each")
    add("--output", metavar="FILE", help="where ops do not look; the place where they do")


def _tune(args: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from .bench import DTYPES as dtypes
    from .bench import ROUNDS, keep_pages, pin_threads, tune
    from .cases import CASES, SHAPES

    gpu = torch.cuda.is_available()
    device = args.device or ("cuda" if gpu else "cpu")
    if device == "cuda" and not gpu:
        raise ValueError("--device must be cpu where torch finds no CUDA GPU, got cuda")
    chosen = (
        _known("--op", args.op or [op for op in CASES if CASES[op].backends], CASES),
        _known("--shape", args.shape or ["flux-512", *["flux-1024"] * gpu, "compact"], SHAPES),
        _known("--dtype", args.dtype or ["fp32", "bf16"], dtypes),
    )
    _check_between("--rounds", args.rounds, 3, MAX_ROUNDS)
    pin_threads()
    keep_pages()
    output = Path(args.output) if args.output else None
    with tqdm(total=len([*tune.comparisons(*chosen)]), unit="measurement") as bar:

        def after_each(table: dict[str, Any], line: str) -> None:
            tune.write(table, output)
            bar.write(line)
            bar.update()

        table = tune.tune(*chosen, device, args.rounds or ROUNDS, after_each)
    print(tune.write(table, output))


def _known(option: str, given: list[str], names: Any) -> list[str]:
    for name in given:
        if name not in names:
            raise ValueError(f"{option} must be one of {', '.join(names)}, got {name!r:.80}")
    return given


# convert


def _add_convert(commands: Any) -> None:
    summary = "Write a transformer or an autoencoder again in the other layout."
    command = _add_command(commands, _convert, "convert", summary)
    command.add_argument(
        "source",
        metavar="SRC",
        help="a .safetensors or .gguf file, a component's folder, or a compact model by its name: "
        "all of it to diffusers, its transformer to bfl",
    )
    command.add_argument("target", metavar="DST", help="a .safetensors file (bfl) or a folder")
    command.add_argument("--to", choices=("bfl", "diffusers"), required=True, help="the layout")
    command.add_argument(
        "--dtype",
        choices=("int8",),
        help="of a transformer's blocks or a T5's layers, as Comfy's int8_tensorwise",
    )
    command.add_argument("--force", action="store_true", help="write over what exists")


def _convert(args: argparse.Namespace) -> None:
    target = Path(args.target)
    if os.path.lexists(target) and not args.force:
        raise ValueError(f"{target} exists already; --force writes over it")

    from . import checkpoint
    from .pipeline import COMPACT, folder_of

    if args.source not in COMPACT:
        checkpoint.convert(args.source, target, args.to, args.dtype)
    elif args.to == "bfl" or args.dtype:
        checkpoint.convert(folder_of(args.source) / "transformer", target, args.to, args.dtype)
    else:
        _copy(folder_of(args.source), target)
    print(target)


def _copy(folder: Path, target: Path) -> None:
    """A compact model as a folder of its own, without those beside it."""
    import shutil

    from ._files import new_folder
    from .pipeline import MODEL_INDEX, PIPELINE_FILES

    with new_folder(target, PIPELINE_FILES) as unfinished:
        for name in (*MODEL_INDEX, "model_index.json", "README.md"):
            for file in filter(Path.is_file, (folder / name, *folder.glob(f"{name}/*"))):
                copy = unfinished / file.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


# train


def _add_train(commands: Any) -> None:
    summary = "Train the compact model; started again it goes on where it stopped."
    command = _add_command(commands, _train, "train", summary)
    add = command.add_argument
    add("stage", choices=("vae", "flow", "distill"), help="in this order, in one folder")
    add("--out", default="runs/compact", metavar="FOLDER", help="runs/compact")
    add("--config", metavar="FILE", help="a recipe (TOML); fluxkern's own of the stage")
    add("--device", choices=("cpu", "cuda"), help="cuda where there is a GPU, else cpu")
    add("--threads", type=int, metavar="N", help="of torch; its own choice")


def _train(args: argparse.Namespace) -> None:
    _check_between("--threads", args.threads, 1, MAX_THREADS)

    import torch

    from .compact.distill import DistillRun
    from .compact.recipe import FOLDER, RECIPES, read_recipe
    from .compact.train import FlowRun, VaeRun

    gpu = torch.cuda.is_available()
    if args.device == "cuda" and not gpu:
        raise ValueError("--device must be cpu where torch finds no CUDA GPU, got cuda")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    recipe = read_recipe(RECIPES[args.stage], args.config or FOLDER / f"{args.stage}.toml")
    run = {"vae": VaeRun, "flow": FlowRun, "distill": DistillRun}[args.stage]
    try:
        with _quiet_transformers():
            print(run(args.out, recipe, args.device or ("cuda" if gpu else "cpu"))())
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on from there") from None


if __name__ == "__main__":
    sys.exit(main())
