"""The commands as a shell sees them: exit codes, one-line errors, and the files they leave."""

import _thread
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import files_below, same_bits, tiny_flux
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_flux import write_tiny_flux

import fluxkern
from benchmarks import compact
from fluxkern import checkpoint, cli, ops
from fluxkern.cli import main
from fluxkern.compact import train
from fluxkern.compact.optimise import Optimised
from fluxkern.compact.recipe import FOLDER, RECIPES, VaeRecipe, read_recipe
from fluxkern.model.int8 import is_int8
from fluxkern.pipeline import COMPACT

ROOT = Path(__file__).parents[1]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PROMPT = "a red circle on a blue background"
SMALL = ("--height", "32", "--width", "48", "--steps", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_tiny_flux(folder, guidance=True)
    return folder / "flux"


@pytest.fixture
def fluxkern_at(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder: exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        capsys.readouterr()
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def generate(fluxkern_at, model):
    def run(*argv):
        return fluxkern_at("generate", "--model", model, *SMALL, *argv)

    return run


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def about(path):
    return json.loads(Image.open(path).text["fluxkern"])


def assert_refused(result, code, says):
    found, out, err = result
    assert found == code, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("fluxkern: error: ")
    assert says in err


# generate


def test_generate_writes_a_picture_and_prints_its_path(generate, tmp_path):
    code, out, err = generate(PROMPT, "--output", "picture.png", "--seed", 3)
    assert (code, out, err) == (0, "picture.png\n", "")
    assert files_below(tmp_path) == ["picture.png"]
    picture = pixels("picture.png")
    assert picture.shape == (32, 48, 3)
    assert picture.std() > 5  # a picture, not one grey


def test_generate_writes_how_the_picture_was_made_into_it(generate, model):
    options = ("--negative-prompt", "a star", "--true-cfg-scale", 2, "--guidance-scale", 5)
    assert generate(PROMPT, "--output", "a.png", "--seed", 3, *options)[0] == 0
    found = about("a.png")
    versions, backends = found.pop("versions"), found.pop("backends")
    assert found == {
        "prompt": PROMPT,
        "negative_prompt": "a star",
        "seed": 3,
        "size": [48, 32],
        "steps": 2,
        "guidance_scale": 5.0,
        "true_cfg_scale": 2.0,
        "max_sequence_length": 32,
        "dtype": "float32",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "model": "flux",
        "revision": None,
        "weights_hash": checkpoint.weights_hash(model),
    }
    assert versions["fluxkern"] == fluxkern.__version__
    assert versions["torch"] == torch.__version__
    assert versions.keys() == {"fluxkern", "torch", "transformers", "python"}
    assert backends == {choice.op: choice.chosen for choice in fluxkern.explain()}
    readable = Image.open("a.png").text["parameters"].splitlines()
    assert readable[:2] == [PROMPT, "Negative prompt: a star"]
    assert "Steps: 2" in readable[2] and "Seed: 3" in readable[2] and "Size: 48x32" in readable[2]


def test_generate_draws_in_int8_and_says_so(generate):
    assert generate(PROMPT, "--output", "a.png", "--seed", 3)[0] == 0
    code, out, err = generate(PROMPT, "--output", "b.png", "--seed", 3, "--dtype", "int8")
    assert (code, out, err) == (0, "b.png\n", "")
    assert (about("b.png")["dtype"], about("b.png")["device"]) == ("int8", "cpu")
    assert 0 < np.abs(pixels("a.png") - pixels("b.png")).max()
    assert np.abs(pixels("a.png") - pixels("b.png")).mean() < 3


def test_environment_and_folders_of_the_user_are_not_written_into_the_picture(
    generate, model, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    assert generate(PROMPT, "--output", "a.png")[0] == 0
    content = Path("a.png").read_bytes()
    assert b"hf_secret" not in content
    assert str(model.parent).encode() not in content


def test_the_same_seed_draws_the_same_picture_to_the_bit_and_another_seed_another(generate):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert generate(PROMPT, "--output", f"{name}.png", "--seed", seed)[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert (pixels("a.png") != pixels("c.png")).any()


def test_a_seed_that_was_not_given_is_said_and_draws_the_picture_again(generate):
    code, out, err = generate(PROMPT)
    seed = err.split()[-1]
    assert (code, out, err) == (0, f"fluxkern-{seed}.png\n", f"fluxkern: seed {seed}\n")
    assert about(out.strip())["seed"] == int(seed)
    assert generate(PROMPT, "--seed", seed, "--output", "again.png")[0] == 0
    assert Path("again.png").read_bytes() == Path(out.strip()).read_bytes()


def test_each_picture_of_a_run_can_be_drawn_alone(generate, tmp_path):
    Path("prompts.txt").write_text("a ring\n\n  \n圆 and круг 🟢\r\na star", encoding="utf-8")
    code, out, err = generate("--prompts", "prompts.txt", "--output", "many.png", "--seed", 5)
    assert (code, out, err) == (0, "many-1.png\nmany-2.png\nmany-3.png\n", "")
    assert [about(f"many-{i}.png")["seed"] for i in (1, 2, 3)] == [5, 6, 7]
    prompts = [about(f"many-{i}.png")["prompt"] for i in (1, 2, 3)]
    assert prompts == ["a ring", "圆 and круг 🟢", "a star"]
    assert generate(prompts[1], "--seed", 6, "--output", "alone.png")[0] == 0
    assert Path("alone.png").read_bytes() == Path("many-2.png").read_bytes()


def test_a_batch_is_its_pictures_one_by_one_within_one_level(generate, tmp_path):
    (tmp_path / "folder").mkdir()
    code, out, _ = generate(PROMPT, "--batch", 2, "--seed", 5, "--output", "folder")
    assert (code, out) == (0, "folder/fluxkern-5-1.png\nfolder/fluxkern-5-2.png\n")
    assert generate(PROMPT, "--seed", 6, "--output", "alone.png")[0] == 0
    batch, alone = pixels("folder/fluxkern-5-2.png"), pixels("alone.png")
    assert np.abs(batch - alone).max() <= 1
    assert about("folder/fluxkern-5-2.png") == about("alone.png")


def test_prompts_are_read_from_standard_input(generate, monkeypatch, tmp_path):
    (tmp_path / "lines").write_text("a ring\n")
    with open("lines") as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        assert generate("--prompts", "-", "--output", "a.png", "--seed", 1)[0] == 0
    assert about("a.png")["prompt"] == "a ring"


def test_a_prompt_is_never_a_path_and_its_control_characters_reach_no_terminal(generate, tmp_path):
    prompt = "../../x.png\x1b[31m\x07\u202e@/etc/passwd " + "star " * 100
    code, out, err = generate(prompt, "--output", "a.png", "--seed", 1)
    assert (code, out) == (0, "a.png\n")
    assert files_below(tmp_path) == ["a.png"]
    lines = err.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["fluxkern:", "warning:", "CLIP"],
        ["fluxkern:", "warning:", "T5"],
    ]
    assert all(line.isprintable() for line in lines)
    assert about("a.png")["prompt"] == prompt
    assert "\\x1b[31m\\x07\\u202e@" in Image.open("a.png").text["parameters"]


def test_control_characters_in_an_error_are_escaped(generate):
    assert_refused(generate(PROMPT, "--output", "\x1b[2J.txt"), 2, "\\x1b[2J.txt")


def test_a_picture_that_exists_is_written_over_only_by_force(generate, tmp_path):
    Path("a.png").write_text("mine")
    assert_refused(generate(PROMPT, "--output", "a.png"), 2, "a.png exists already; --force")
    assert Path("a.png").read_text() == "mine"
    code, out, _ = generate(PROMPT, "--output", "a.png", "--force", "--seed", 1)
    assert (code, out) == (0, "a.png\n")
    assert pixels("a.png").shape == (32, 48, 3)
    Path("many-2.png").write_text("mine")
    assert_refused(generate(PROMPT, "--output", "many.png", "--batch", 2), 2, "many-2.png exists")
    assert files_below(tmp_path) == ["a.png", "many-2.png"]


def test_an_option_without_effect_is_warned_of_in_one_line(generate):
    code, _, err = generate(PROMPT, "--negative-prompt", "x", "--seed", 1, "--output", "a.png")
    assert code == 0
    assert err.startswith("fluxkern: warning: negative_prompt has no effect")
    assert err.count("\n") == 1
    assert about("a.png")["negative_prompt"] is None


def test_the_progress_bar_counts_pictures(generate, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, _, err = generate(PROMPT, "--batch", 2, "--seed", 1)
    assert code == 0
    assert "pictures 1-2/2: 100%" in err
    assert "Loading" not in err


BAD_ARGUMENTS = {
    "--height 100": "--height must be a multiple of 16",
    "--width 0": "--width must be",
    "--width 8208": "--width must be",
    "--steps 0": "--steps must be",
    "--steps -3": "--steps must be",
    "--steps 1001": "--steps must be",
    "--steps x": "--steps",
    "--batch 0": "--batch must be",
    "--seed -1": "--seed must be",
    "--max-sequence-length 513": "--max-sequence-length must be",
    "--true-cfg-scale nan": "--true-cfg-scale must be",
    "--guidance-scale inf": "--guidance-scale must be",
    "--dtype int4": "--dtype",
    "--device tpu": "--device",
    "--nonsense": "--nonsense",
    "--prompts file": "got both",
    "--revision main": "--revision needs",
    "--output a.jpg": "--output must be a .png file",
    "--output none/a.png": "no folder none",
    "--output none/": "no folder none",
    "--model ./none": "neither a file or folder here nor an id",
}


@pytest.mark.parametrize("words", BAD_ARGUMENTS)
def test_a_bad_argument_is_refused_in_one_line(generate, tmp_path, words):
    assert_refused(generate(PROMPT, *words.split()), 2, BAD_ARGUMENTS[words])
    assert files_below(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("generate a --batch 1001", "--batch must be a whole number from 1 to 1000, got 1001"),
        (
            "generate a --batch 99999999999999999999",
            "--batch must be a whole number from 1 to 1000",
        ),
        ("generate a --steps 1001", "--steps must be a whole number from 1 to 1000"),
        ("train vae --threads 1000000000", "--threads must be from 1 to 1024, got 1000000000"),
        ("bench --threads 1025", "--threads must be from 1 to 1024"),
        ("tune --rounds 1000000000", "--rounds must be from 3 to 10000"),
        ("generate --prompts /dev/zero", "--prompts /dev/zero: larger than 67108864 bytes"),
        ("generate --prompts long.txt", "--prompts must have at most 1048576 characters"),
        ("generate --prompts many.txt --batch 1000", "at most 100000 pictures, 101000 were asked"),
        ("generate --prompts lines.txt", "--prompts lines.txt: holds more than 100000 prompts"),
    ],
)
def test_counts_have_bounds(fluxkern_at, command, says):
    Path("long.txt").write_text("x" * (2**20 + 1))
    Path("many.txt").write_text("a\n" * 101)
    Path("lines.txt").write_text("ab\n\n" * 100_001)
    assert_refused(fluxkern_at(*command.split()), 2, says)


def test_a_prompt_of_spaces_is_printed_in_time_that_grows_with_its_length():
    for text in ("a" + " " * 2**20 + "b", "a" + " \n" * 2**19 + "b", "\n" * 2**20, "\x1b" * 2**18):
        start = time.process_time()
        assert "\n" not in cli._printable(text)
        assert time.process_time() - start < 5
    assert cli._printable("  a \n\n  b\nc  ") == "a b c"


def test_a_gpu_that_is_not_there_is_refused(generate):
    assert_refused(generate(PROMPT, "--device", "cuda"), 2, "no CUDA GPU")


def test_a_command_is_needed(fluxkern_at):
    assert_refused(fluxkern_at(), 2, "COMMAND")
    assert_refused(fluxkern_at("draw"), 2, "draw")


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"\n  \n\n", 2, "holds no prompt"),
        (b"", 2, "holds no prompt"),
        (b"caf\xe9\n", 2, "not UTF-8"),
        (None, 1, "No such file"),
    ],
    ids=["blank", "empty", "latin-1", "missing"],
)
def test_a_file_without_prompts_is_refused(generate, tmp_path, content, code, says):
    if content is not None:
        Path("prompts").write_bytes(content)
    before = files_below(tmp_path)
    assert_refused(generate("--prompts", "prompts"), code, says)
    assert files_below(tmp_path) == before


def test_no_prompt_at_all_is_refused_and_an_empty_one_is_drawn(generate):
    assert_refused(generate(), 2, "got neither")
    assert_refused(generate("\udc80"), 2, "not valid Unicode")
    assert generate("", "--output", "a.png", "--seed", 1)[0] == 0
    assert about("a.png")["prompt"] == ""


def pickled(folder):
    (folder / WEIGHTS).rename((folder / WEIGHTS).with_suffix(".bin"))


def cut_short(folder):
    with open(folder / WEIGHTS, "r+b") as file:
        file.truncate(20_000)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def fill(folder):
    edit_json(folder / "transformer" / "config.json", in_channels=384, out_channels=64)


def fill_pipeline(folder):
    edit_json(folder / "model_index.json", _class_name="FluxFillPipeline")


def lora(folder):
    save_file({"transformer.x_embedder.lora_A.weight": torch.zeros(2, 2)}, folder / WEIGHTS)


def one_tensor_less(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["proj_out.bias"]
    save_file(tensors, folder / WEIGHTS)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (pickled, "pickle"),
        (cut_short, "damaged or cut short"),
        (empty, "model_index.json"),
        (fill, "FLUX.1 Fill"),
        (fill_pipeline, "FluxFillPipeline"),
        (lora, "is a LoRA"),
        (one_tensor_less, "proj_out.bias"),
    ],
)
def test_a_model_that_is_not_one_is_refused(fluxkern_at, model, tmp_path, spoil, says):
    shutil.copytree(model, tmp_path / "model")
    spoil(tmp_path / "model")
    before = files_below(tmp_path)
    assert_refused(fluxkern_at("generate", PROMPT, "--model", "model", *SMALL), 2, says)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lora.safetensors", "is a LoRA"),
        ("flux.safetensors", "must be a diffusers folder"),
        ("flux.ckpt", "is a pickle"),
    ],
)
def test_a_single_file_is_not_a_model_to_draw_with(fluxkern_at, tmp_path, name, says):
    key = "x.lora_A.weight" if name.startswith("lora") else "img_in.weight"
    save_file({key: torch.zeros(2, 2)}, tmp_path / name)
    assert_refused(fluxkern_at("generate", PROMPT, "--model", name), 2, says)
    assert files_below(tmp_path) == [name]


def test_a_nan_weight_is_warned_of_in_one_line(fluxkern_at, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    tensors["proj_out.bias"][3] = float("nan")
    save_file(tensors, tmp_path / "model" / WEIGHTS)
    code, out, err = fluxkern_at("generate", "", "--model", "model", *SMALL, "--seed", 1)
    assert (code, out) == (0, "fluxkern-1.png\n")
    assert "NaN or an infinity (final_layer.linear.bias)" in err.splitlines()[0]
    assert all(line.startswith("fluxkern: warning: ") for line in err.splitlines())


@contextmanager
def disk_of(size):
    """No file may grow beyond `size` bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_leaves_nothing_behind(generate, tmp_path):
    with disk_of(1000):
        result = generate(PROMPT, "--output", "a.png", "--seed", 1)
    assert_refused(result, 1, "a.png cannot be written: File too large")
    assert files_below(tmp_path) == []


def test_a_full_disk_leaves_the_picture_that_force_would_have_replaced(generate, tmp_path):
    Path("a.png").write_text("mine")
    with disk_of(1000):
        result = generate(PROMPT, "--output", "a.png", "--seed", 1, "--force")
    assert_refused(result, 1, "cannot be written")
    assert files_below(tmp_path) == ["a.png"]
    assert Path("a.png").read_text() == "mine"


@contextmanager
def interrupt():
    """Ctrl-C after a second."""
    timer = threading.Timer(1.0, _thread.interrupt_main)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def test_an_interrupt_ends_a_run_without_a_trace(generate, tmp_path):
    long = ("--steps", 1000, "--height", 512, "--width", 512)
    with interrupt():
        result = generate(PROMPT, "--output", "a.png", "--seed", 1, *long)
    assert result == (130, "", "fluxkern: interrupted\n")
    assert files_below(tmp_path) == []


def test_what_generate_changes_in_transformers_and_warnings_is_put_back(generate):
    from transformers.utils import logging

    def settings():
        return logging.get_verbosity(), logging.is_progress_bar_enabled(), warnings.showwarning

    before = settings()
    assert generate(PROMPT, "--seed", 1)[0] == 0
    assert generate(PROMPT, "--seed", 1)[0] == 2
    assert settings() == before


# env


def test_env_as_json_holds_every_op_with_its_reasons(fluxkern_at):
    code, out, err = fluxkern_at("env", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    expected = {c.op: {"chosen": c.chosen, "reasons": c.reasons} for c in fluxkern.explain()}
    assert found["ops"] == expected
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["cores"] == os.cpu_count()
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["compiled_kernels"] == ops.compiled_kernels()


def test_env_shows_every_op_and_why_no_kernel_runs(fluxkern_at):
    code, out, err = fluxkern_at("env")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    for choice in fluxkern.explain():
        assert lines[choice.op].split()[1] == choice.chosen
        for backend, reason in choice.reasons.items():
            assert reason is None or f"{backend}: {reason}" in lines[choice.op]
    for name, reason in ops.compiled_kernels().items():
        assert f"{name}: {reason or 'loaded'}" in out
    assert lines["torch"].split() == ["torch", torch.__version__]


def test_env_says_which_measured_table_is_ignored(tmp_path: Path):
    folder = tmp_path / "fluxkern/measured"
    folder.mkdir(parents=True)
    (folder / "some-gpu.json").write_text("{")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "fluxkern.cli", "env"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("measured table")]
    assert f"{folder / 'some-gpu.json'}: not a table of `fluxkern tune`" in line


def test_help_does_not_wait_for_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "fluxkern" / "cli.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "PIL", "transformers", "tqdm"}
    for command in ("generate", "env", "convert", "train"):
        assert command in done.stdout


# convert


def test_convert_there_and_back_is_the_identity(fluxkern_at, tmp_path):
    checkpoint.save_flux(tiny_flux(), tmp_path / "flux")
    there = fluxkern_at("convert", "flux", "flux.safetensors", "--to", "bfl")
    assert there == (0, "flux.safetensors\n", "")
    assert "double_blocks.0.img_attn.qkv.weight" in load_file("flux.safetensors")
    back = fluxkern_at("convert", "flux.safetensors", "back", "--to", "diffusers")
    assert back == (0, "back\n", "")
    name = Path(WEIGHTS).name
    assert same_bits(load_file(Path("back") / name), load_file(Path("flux") / name))


def test_convert_writes_over_what_exists_only_by_force(fluxkern_at, tmp_path):
    checkpoint.save_flux(tiny_flux(), tmp_path / "flux.safetensors", format="bfl")
    (tmp_path / "out").mkdir()
    command = ("convert", "flux.safetensors", "out", "--to", "diffusers")
    assert_refused(fluxkern_at(*command), 2, "out exists already; --force")
    assert files_below(tmp_path / "out") == []
    assert fluxkern_at(*command, "--force")[0] == 0
    assert "config.json" in files_below(tmp_path / "out")


def test_convert_refuses_what_is_no_checkpoint_and_leaves_nothing(fluxkern_at, tmp_path):
    save_file({"x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"PK\x03\x04 pretending")
    for source, says in (("lora", "LoRA"), ("junk", "pickle"), ("none", "not a file")):
        command = ("convert", f"{source}.safetensors", "new/out", "--to", "diffusers")
        assert_refused(fluxkern_at(*command), 2, says)
    assert files_below(tmp_path) == ["junk.safetensors", "lora.safetensors"]


def test_generate_takes_weights_from_files(fluxkern_at):
    fluxkern_at("convert", "compact", "int8.safetensors", "--to", "bfl", "--dtype", "int8")
    command = ["generate", PROMPT, "--seed", 3, "--steps", 1, "--dtype", "int8"]
    made = fluxkern_at(*command, "--output", "b.png", "--weights", "int8.safetensors")
    assert made == (0, "b.png\n", made[2])
    assert fluxkern_at(*command, "--output", "c.png")[0] == 0
    assert np.array_equal(*(np.asarray(Image.open(name)) for name in ("b.png", "c.png")))
    assert about("b.png")["weights_hash"] != about("c.png")["weights_hash"]
    Path("no.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert_refused(fluxkern_at(*command, "--weights", "no.safetensors"), 2, "git-lfs pointer")


def test_convert_writes_int8(fluxkern_at):
    command = ("convert", "compact-base", "int8.safetensors", "--to", "bfl", "--dtype", "int8")
    assert fluxkern_at(*command) == (0, "int8.safetensors\n", "")
    assert is_int8(checkpoint.load_flux("int8.safetensors", int8=True))
    assert load_file("int8.safetensors")["single_blocks.0.linear1.weight"].dtype == torch.int8
    command = ("convert", "compact-base", "folder", "--to", "diffusers", "--dtype", "int8")
    assert_refused(fluxkern_at(*command), 2, "dtype int8 is for a transformer or T5 to bfl")


def test_convert_writes_a_compact_model_by_its_name_in_both_layouts(fluxkern_at):
    for target, to in (("out", "diffusers"), ("flux.safetensors", "bfl")):
        assert fluxkern_at("convert", "compact-base", target, "--to", to) == (0, f"{target}\n", "")
    names = {path.name for path in COMPACT["compact-base"].iterdir()} - {"dev", "schnell"}
    assert {path.name for path in Path("out").iterdir()} == names
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (Path("out"), COMPACT["compact"]))
    assert same_bits(ours, theirs)
    assert "double_blocks.0.img_attn.qkv.weight" in load_file("flux.safetensors")
    command = ("convert", "compact-base", "out", "--to", "diffusers")
    assert_refused(fluxkern_at(*command), 2, "out exists already; --force")
    assert fluxkern_at(*command, "--force")[0] == 0


# train

SMALLEST = {"pictures": 4, "paths": 4, "batch_size": 2, "evaluate_every": 100, "teacher_steps": 4}


def write_recipes(folder, seed=1):
    """The recipes of the package with the smallest numbers, five steps for the transformer."""
    for command in RECIPES:
        recipe = tomllib.loads((FOLDER / f"{command}.toml").read_text()) | {"seed": seed}
        lines = [f"{name} = {json.dumps(recipe.pop(name))}" for name in ("seed", "start")]
        for stage, values in recipe.items():
            smallest = {name: SMALLEST.get(name, value) for name, value in values.items()}
            smallest["steps"] = 5 if stage == "flow" else 2
            lines += [f"[{stage}]", *(f"{k} = {json.dumps(v)}" for k, v in smallest.items())]
        (folder / f"{command}.toml").write_text("\n".join(lines))


# the state is written after the second step; the third is done when the process is killed
KILLED = """
import os, signal, sys
from fluxkern.cli import main
from fluxkern.compact import train
from fluxkern.compact.optimise import Optimised

train.JUDGED.update(flow=2, vae=2)
update = Optimised.update

def update_or_die(optimised, *loss):
    if optimised.path.name == "flow.safetensors":
        train.SAVE_EVERY = 0 if optimised.step < 2 else 1e9
        if optimised.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    return update(optimised, *loss)

Optimised.update = update_or_die
for stage in ("vae", "flow"):
    code = main(["train", stage, "--config", f"{sys.argv[1]}/{stage}.toml", *sys.argv[2:]])
sys.exit(code)
"""


def train_command(folder, run, stage):
    config = ("--config", str(folder / f"{stage}.toml"))
    return ["train", stage, *config, "--out", str(folder / run), "--threads", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the run `whole`, and `parted`, killed in the middle and started again."""
    folder = tmp_path_factory.mktemp("train")
    write_recipes(folder)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = ["--out", str(folder / "parted"), "--threads", "1"]
    command = [sys.executable, "-c", KILLED, str(folder), *options]
    killed = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:  # fewer pictures are judged, all stages run
        for name in ("flow", "vae"):
            patch.setitem(train.JUDGED, name, 2)
        for stage in ("vae", "flow", "distill"):
            assert main(train_command(folder, "whole", stage)) == 0
        _, err = killed.communicate(timeout=300)
        assert killed.returncode == -signal.SIGKILL, err.decode()
        with safe_open(folder / "parted" / "flow.safetensors", "pt") as state:
            assert state.metadata()["step"] == "2"
        assert main(train_command(folder, "parted", "flow")) == 0
    torch.set_num_threads(threads)
    return folder


def test_a_training_killed_and_resumed_is_the_one_that_was_not_to_the_bit(trained):
    whole, parted = trained / "whole" / "weights", trained / "parted" / "weights"
    assert files_below(whole) == files_below(parted)
    files = [name for name in files_below(whole) if (whole / name).is_file()]
    assert WEIGHTS in files
    for name in files:
        assert (whole / name).read_bytes() == (parted / name).read_bytes(), name


def test_generate_draws_with_what_train_made_by_the_compact_models_defaults(trained, fluxkern_at):
    size = ("--height", 16, "--width", 16, "--seed", 1, "--output", "a.png")
    code, out, err = fluxkern_at("generate", PROMPT, "--model", trained / "whole/weights", *size)
    assert (code, out, err) == (0, "a.png\n", "")
    found = about("a.png")
    assert (found["steps"], found["true_cfg_scale"], found["guidance_scale"]) == (16, 2.0, None)
    assert found["negative_prompt"] == ""


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_generate_draws_with_the_students_that_train_distilled(
    trained, fluxkern_at, monkeypatch, name
):
    monkeypatch.setitem(COMPACT, f"compact-{name}", trained / "whole" / name)
    size = ("--height", 16, "--width", 16, "--seed", 1)
    for i, model in enumerate((f"compact-{name}", trained / "whole" / name)):
        options = ("--model", model, "--output", f"{i}.png")
        assert fluxkern_at("generate", PROMPT, *options, *size) == (0, f"{i}.png\n", "")
        found = about(f"{i}.png")
        usual = found["steps"], found["true_cfg_scale"], found["guidance_scale"]
        assert usual == ((16, 1.0, 3.5) if name == "dev" else (4, 1.0, None))
    assert (pixels("0.png") == pixels("1.png")).all()


def test_a_compact_model_that_is_not_in_the_package_is_refused(fluxkern_at, tmp_path, monkeypatch):
    monkeypatch.setitem(COMPACT, "compact-dev", tmp_path / "none")
    says = "compact-dev is not in this package"
    assert_refused(fluxkern_at("generate", PROMPT, "--model", "compact-dev"), 2, says)
    assert_refused(fluxkern_at("convert", "compact-dev", "out", "--to", "diffusers"), 2, says)
    assert files_below(tmp_path) == []


@pytest.mark.build
def test_the_benchmark_measures_what_train_and_distill_made(trained, tmp_path):
    folders = {"base": "weights", "dev": "dev", "schnell": "schnell"}
    options = [f"--{name}={trained / 'whole' / folder}" for name, folder in folders.items()]
    few = ["--count", "2", "--rounds", "1", "--threads", "1", "--steps", "20"]
    files = ["--json", str(tmp_path / "compact.json"), "--sheets", str(tmp_path / "sheets")]
    compact.main([*options, *few, *files])
    assert len(list((tmp_path / "sheets").iterdir())) == 8
    rows = {r["measure"]: r for r in json.loads((tmp_path / "compact.json").read_text())["rows"]}
    bounded = [row for row in rows.values() if row["bound"] is not None]
    assert len(rows) == 32 and len(bounded) == 14
    for name in folders:
        assert rows[f"{name}: levels between our picture and diffusers'"]["value"] <= 1
    error = rows["dev: relative L2 of its velocity to the guided teacher's"]["value"]
    assert 0 <= error < 1  # the student began as the teacher


def test_train_prints_the_folder_of_finished_weights_again(trained, fluxkern_at):
    code, out, _ = fluxkern_at(*train_command(trained, "whole", "flow"))
    assert (code, out) == (0, f"{trained / 'whole' / 'weights'}\n")


def test_train_refuses_another_recipe_in_the_same_folder(trained, fluxkern_at, tmp_path):
    write_recipes(tmp_path, seed=2)
    command = ("train", "flow", "--out", trained / "whole", "--config", "flow.toml")
    assert_refused(fluxkern_at(*command), 2, "seed is 1 there, got 2")


@pytest.mark.parametrize(("stage", "first"), [("flow", "vae"), ("distill", "flow")])
def test_train_says_which_stage_comes_first(fluxkern_at, stage, first):
    refused = fluxkern_at("train", stage, "--out", "run")
    assert_refused(refused, 2, f"is missing: `fluxkern train {first}` comes first")


def test_train_refuses_bad_input_before_it_makes_a_folder(fluxkern_at, tmp_path):
    (tmp_path / "bad.toml").write_text("seed = ")
    assert_refused(fluxkern_at("train", "vae", "--config", "bad.toml"), 2, "not a TOML file")
    assert_refused(fluxkern_at("train", "flow", "--config", "none.toml"), 1, "No such file")
    assert_refused(
        fluxkern_at("train", "vae", "--threads", "0"), 2, "--threads must be from 1 to 1024"
    )
    if not torch.cuda.is_available():
        assert_refused(fluxkern_at("train", "vae", "--device", "cuda"), 2, "--device must be cpu")
    assert files_below(tmp_path) == ["bad.toml"]


def test_an_interrupted_training_says_how_it_goes_on(fluxkern_at, tmp_path):
    with interrupt():
        code, out, err = fluxkern_at("train", "vae", "--out", "run")
    assert (code, out) == (130, "")
    last = err.splitlines()[-1]
    assert last == "fluxkern: interrupted; the same command goes on from there"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_asked_to_stop_saves_the_step_it_is_in(tmp_path, number):
    write_recipes(tmp_path)
    run = train.VaeRun(tmp_path / "run", read_recipe(VaeRecipe, tmp_path / "vae.toml"))
    weight = torch.nn.Parameter(torch.zeros(2))
    optimised = Optimised(tmp_path / "state.safetensors", {"w": weight}, 0.1, 10, 0.5)

    def backward(step):
        weight.grad = torch.ones(2)
        if step == 3:
            signal.raise_signal(number)
        return 1.0

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        run.fit("stage", optimised, backward, dict, 100)
    assert signal.getsignal(number) == before
    with safe_open(tmp_path / "state.safetensors", "pt") as state:
        assert state.metadata()["step"] == "4"
        assert torch.equal(state.get_tensor("parameter.w"), weight)
