"""docs/how-flux-works.md and its translation: names, links, figures, the program behind them."""

import ast
import json
import re
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch

from examples.how_flux_works import __main__ as program
from examples.how_flux_works import blocks, common, guidance, path, text, vae
from fluxkern import FluxPipeline, ops, reference
from fluxkern.compact.distill import EVEN, guided, unguided
from fluxkern.model.autoencoder import AutoEncoder, AutoEncoderConfig
from fluxkern.model.transformer import CONFIGS, Flux, Stream

ROOT = program.DOCS.parent
PAGES = {page.name: page.read_text() for page in program.PAGES}
FIGURES = json.loads((program.FOLDER / "figures.json").read_text())
each_page = pytest.mark.parametrize("page", PAGES)
SMALL = common.Size(steps=2, pictures=1, rounds=1, canvas=192)


@cache
def defined() -> dict[str, set[str]]:
    """Class or "" -> the names that fluxkern defines in it, or anywhere."""
    found: dict[str, set[str]] = {"": set()}
    for file in (ROOT / "fluxkern").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).update(names_in(node))
            found[""] |= {node.name} if hasattr(node, "name") and node.name else set()
            found[""] |= {node.arg} if isinstance(node, ast.arg) else set()
            if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                found[""].add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found


def names_in(node: ast.ClassDef) -> set[str]:
    """Methods, fields and attributes that a class gives itself."""
    found = {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
    for child in ast.walk(node):
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            found.add(child.target.id)
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            found.add(child.attr)
    return found


@cache
def modules() -> set[str]:
    """Names of modules in the transformer and the VAE, in full and without what leads to them."""
    with torch.device("meta"):
        found = [Flux(replace(CONFIGS["compact"], guidance_embed=True))]
        found.append(AutoEncoder(AutoEncoderConfig()))
    full = [name.split(".") for model in found for name, _ in model.named_modules()]
    return {".".join(parts[i:]) for parts in full for i in range(len(parts))}


def is_known(name: str) -> bool:
    """Whether a name in code type is a file, a checkpoint, a module or something defined."""
    if "/" in name and (ROOT / name).exists():
        return True
    if name in common.CHECKPOINTS or name in modules():
        return True
    first, _, rest = name.partition(".")
    return rest in defined().get(first, ()) if rest else first in defined()[""]


def code_names(page: str) -> Counter:
    """What is set in code type, outside blocks of code and tables that the program fills."""
    page = re.sub(r"```.*?```", "", page, flags=re.S)
    page = re.sub(r"<!--rows.*?-->\n(\|.*\n\|.*\n)(\|.*\n)*", r"\1", page)
    page = re.sub(r"<!--=\w+-->.*?<!--/-->", "", page)
    return Counter(re.findall(r"`([^`]+)`", page))


@each_page
def test_every_name_in_code_type_exists_in_the_code(page):
    elsewhere = {"code type", "代码字体", "x + gate * y"}
    elsewhere |= {"src/flux/util.py", "openai/clip-vit-large-patch14", "google/t5-v1_1-xxl"}
    names = set(code_names(PAGES[page])) - elsewhere
    assert len(names) > 60
    assert [name for name in names if not is_known(name)] == []


def test_an_invented_name_is_not_known():
    invented = (
        "Flux.workspace",
        "get_sigmas",
        "FluxPipeline.encode",
        "double_blocks.7",
        "fluxkern/x.py",
    )
    assert not any(map(is_known, invented))


@each_page
def test_links_and_pictures_lead_to_files(page):
    links = re.findall(r"!?\[[^]]*\]\(([^)]+)\)", PAGES[page])
    local = [link for link in links if not link.startswith("https://")]
    assert len(local) > 15
    assert [link for link in local if not (program.DOCS / link).is_file()] == []


def test_every_picture_is_shown_in_both_pages():
    files = {file.name for file in program.FOLDER.glob("*.png")}
    for page in PAGES.values():
        assert set(re.findall(r"\(how-flux-works/([\w-]+\.png)\)", page)) == files
    assert sum(file.stat().st_size for file in program.FOLDER.iterdir()) < 1.5e6


def test_the_translation_has_the_same_parts():
    """Headings, pictures, figures, tables, blocks of code and names in code type."""
    english, chinese = PAGES.values()
    for part in (r"^(#+) ", r"\((how-flux-works/\S+)\)", r"^(```)", r"^\|(-)"):
        assert len(re.findall(part, english, re.M)) == len(re.findall(part, chinese, re.M)), part
    fields = r"<!--(?:=|rows=)(\w+)-->"
    assert sorted(re.findall(fields, english)) == sorted(re.findall(fields, chinese))
    names = [code_names(page) for page in (english, chinese)]
    assert names[0].keys() ^ names[1].keys() == {"code type", "代码字体"}
    assert (
        re.findall(r"```\n(.+?)```", english, re.S)[1:]
        == re.findall(r"```\n(.+?)```", chinese, re.S)[1:]
    )


@each_page
def test_the_figures_of_the_page_are_those_that_were_measured(page):
    assert program.filled(PAGES[page], FIGURES) == PAGES[page]
    changed = FIGURES | {"flux_tflop": "75.0"}
    assert program.filled(PAGES[page], changed) != PAGES[page]


def test_the_figures_were_measured_on_the_shipped_weights():
    """Other weights ask for `python -m examples.how_flux_works` and a look at its pictures."""
    assert FIGURES["weights"] == program.weights()


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return common.base()


def test_a_convolution_is_the_sum_over_its_window(pipe, tmp_path):
    assert float(vae.convolution(pipe, SMALL, tmp_path)["conv_error"]) < 1e-5


def test_the_encoder_is_equivariant_to_whole_cells_and_to_no_others(pipe):
    x = vae.on_canvas(common.drawings(vae.SCENES[:1]), 256)
    with torch.no_grad():
        still, ground = pipe.vae.encode(x), pipe.vae.encode(x[:, :, :1, :1].expand_as(x))
        whole, odd = (pipe.vae.encode(torch.roll(x, shift, -1)) for shift in (8, 3))
    assert vae.shift_error(whole, still, ground, 8, 8) < 1e-3
    assert vae.shift_error(odd, still, ground, 3, 8) > 0.1


def test_recorded_attention_sums_to_one_and_changes_nothing(pipe):
    with text.recorded_attention() as found:
        recorded = common.trajectory(pipe, [common.PROMPT], 2).places[-1]
    assert len(found) == 2 * len(text.block_names(pipe))
    assert all(torch.allclose(w.sum(-1), torch.ones(())) for w in found)
    assert common.relative(common.trajectory(pipe, [common.PROMPT], 2).places[-1], recorded) < 1e-5
    assert ops.attention is not reference.attention


def test_the_chord_of_a_straight_path_is_the_path():
    sigmas = torch.linspace(1, 0, 5)
    start, end = torch.randn(2, 1, 3, 4)
    places = torch.stack([t * start + (1 - t) * end for t in sigmas])
    straight = common.Trajectory(sigmas, places)
    assert path.length(straight) == pytest.approx(1)
    assert float(path.bend(straight).max()) < 1e-6
    assert torch.allclose(straight.estimates, end.expand(4, 1, 3, 4), atol=1e-5)


def test_a_closed_gate_adds_nothing_and_is_opened_again(pipe):
    original = Stream.add
    found = common.trajectory(pipe, [common.PROMPT], 2)
    added, changed = blocks.worth(pipe, [common.PROMPT], found, len(blocks.branch_names(pipe)))
    assert all(a > 0 for a in added) and all(c > 0 for c in changed)
    assert Stream.add is original


def test_guidance_is_measured_on_every_checkpoint_there_is(pipe, tmp_path):
    """On students that have learned nothing yet: a copy that takes w, and one that does not."""
    flux = guided(pipe.transformer, 0)
    parts = (pipe.vae, pipe.text_encoder)
    found = {
        "compact-base": pipe,
        "compact-dev": FluxPipeline(flux, *parts, pipe.schedule, pipe.default_size),
        "compact-schnell": FluxPipeline(unguided(flux, 3.0), *parts, EVEN, pipe.default_size),
    }
    rows = guidance.compare(found, SMALL, tmp_path)["rows"]["guidance"]
    passes = {(row[0], row[1]): int(row[3]) for row in rows}
    assert passes[("`compact-base`", "3")] == 2 * SMALL.steps
    assert passes[("`compact-base`", "1")] == passes[("`compact-dev`", "3")] == SMALL.steps
    assert passes[("`compact-schnell`", "–")] == guidance.FEW
    error = {row[1]: float(row[-1].removesuffix(" %")) for row in rows if "dev" in row[0]}
    assert error["1"] < 0.1 < error["5"]  # w changes nothing in this student
    assert {file.name for file in tmp_path.iterdir()} == {"guidance.png", "guidance-cost.png"}
