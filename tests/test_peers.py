"""Other libraries beside ours: absent, right, wrong, or installed and not running."""

import sys
from pathlib import Path

import pytest

from fluxkern import bench

PACKAGE, SHAPE = "comfy-kitchen", "one stream of FLUX's width"  # the peers take one stream
RIGHT = """
import torch

def adaln(x, scale, shift):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package of the peer's name, with this source."""

    def install(source: str) -> None:
        (tmp_path / "comfy_kitchen.py").write_text(source)
        about = tmp_path / "comfy_kitchen-9.9.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 9.9\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "comfy_kitchen", raising=False)

    yield install
    sys.modules.pop("comfy_kitchen", None)


def compared() -> bench.Comparison:
    return bench.measure("norm_modulate", SHAPE, "fp32", rounds=3, only=("eager", PACKAGE))


def test_a_peer_that_is_not_installed_is_listed_as_absent():
    if bench.peers.installed()["quack-kernels"] is not None:
        pytest.skip("quack-kernels is installed")
    assert bench.peers.installed().keys() >= {PACKAGE, "liger-kernel", "xformers", "torchao"}
    assert bench.peers.installed()["quack-kernels"] is None


def test_a_peer_that_nobody_asked_for_is_not_loaded(installed):
    installed("import no_such_module")
    found = bench.measure("norm_modulate", SHAPE, "fp32", rounds=0, only=("eager",))
    assert set(found.verified) == {"eager"} and not found.failed


def test_a_peer_that_is_installed_is_timed_in_turn(installed):
    installed(RIGHT)
    found = compared()
    assert bench.peers.installed()[PACKAGE] == "9.9"
    assert found.row(PACKAGE).times["eager"] > 0 and not found.failed


@pytest.mark.parametrize(
    "source", ["import no_such_module", RIGHT.replace("return", "raise RuntimeError('x') or")]
)
def test_a_peer_that_is_installed_and_does_not_run_is_a_failure(installed, source: str):
    installed(source)
    found = compared()
    assert found.row(PACKAGE) is None and found.row("eager") is not None
    assert set(found.failed) == {PACKAGE}


def test_a_wrong_peer_is_not_timed(installed):
    installed(RIGHT.replace("(1 + scale)", "scale"))
    found = compared()
    assert found.row(PACKAGE) is None and "max error must be" in found.skipped[PACKAGE]


def test_a_peer_without_a_backward_is_not_asked_for_one(installed):
    installed(RIGHT)
    found = bench.measure(
        "norm_modulate", SHAPE, "fp32", "backward", rounds=0, only=("eager", PACKAGE)
    )
    assert set(found.verified) == {"eager"}
