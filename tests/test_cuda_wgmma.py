"""The attention of sm_90a, on a CPU and, where there is one, on a GPU of compute capability 9.0."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from planted_kernels import ROOT, planted_programs, source_without
from torch import Tensor

from fluxkern import ops, reference
from fluxkern.cases import CASES, Maker, Sizes
from fluxkern.ops import Backend, attention, attention_lse, measured
from fluxkern.ops.attention import hopper
from fluxkern.testing import assert_accurate, gradients

EMULATOR, GPU = "cuda-wgmma-emulator", "cuda-wgmma"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
every_backend = pytest.mark.parametrize("backend", [EMULATOR, GPU])
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def device_of(backend: str) -> str:
    """Skips where the machine has none."""
    if reason := ops.why_not("attention", backend):
        pytest.skip(f"{backend}: {reason}")
    return "cuda" if backend == GPU else "cpu"


def heads(backend: str, length: int, dim: int, dtype: torch.dtype, scale: float = 1) -> Tensor:
    drawn = torch.randn(1, length, 2, dim, dtype=torch.float64, device=device_of(backend))
    return (scale * drawn).to(dtype)


def assert_right(backend: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    truth = reference.attention_lse(q.double(), k.double(), v.double())
    own = reference.attention_lse(q, k, v)
    found = attention_lse(q, k, v, backend=backend)
    for name, *three in zip(("out", "lse"), found, truth, own, strict=True):
        assert_accurate(*three, what=name)
    assert torch.equal(attention(q, k, v, backend=backend), found[0])


# results


@every_dtype
@pytest.mark.parametrize("dim", [64, 128, 72, 8])
@pytest.mark.parametrize("scale", [1, 12], ids=["scores of one", "scores of twelve"])
@every_backend
def test_sums_over_many_tiles_of_keys(backend: str, scale: float, dim: int, dtype: torch.dtype):
    """Scores of twelve leave the top behind by more than the slack again and again."""
    q = heads(backend, 70, dim, dtype, scale)
    k, v = heads(backend, 717, dim, dtype), heads(backend, 717, dim, dtype)
    assert_right(backend, q, k, v)


@pytest.mark.parametrize("queries, keys", [(1, 1), (129, 128), (64, 129), (257, 255), (128, 256)])
@every_backend
def test_any_length_is_taken(backend: str, queries: int, keys: int):
    q = heads(backend, queries, 64, torch.bfloat16)
    k, v = (heads(backend, keys, 64, torch.bfloat16) for _ in range(2))
    assert_right(backend, q, k, v)


SIZES = {
    "FLUX's heads": Sizes(1, 2, 5, 3072, 24, 128, skip=0, spare=0),
    "rows that are longer": Sizes(2, 3, 130, 128, 2, 64, skip=3, spare=24),
    "one of each": Sizes(1, 0, 1, 8, 1, 8, skip=0, spare=0),
    "empty batch": Sizes(0, 1, 2, 64, 1, 64),
}


@every_dtype
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", hopper.OPS)
@every_backend
def test_views_of_a_projection_are_taken(backend: str, op: str, size: str, dtype: torch.dtype):
    args = CASES[op].inputs(Maker(SIZES[size], dtype, device_of(backend))).values()
    wide = (t.double() for t in args)
    names = ("truth", "own", "found")
    calls = (getattr(reference, op)(*wide), getattr(reference, op)(*args))
    found = dict(zip(names, (*calls, getattr(ops, op)(*args, backend=backend)), strict=True))
    for name in names:
        found[name] = found[name] if isinstance(found[name], tuple) else (found[name],)
    for o, t, r in zip(found["found"], found["truth"], found["own"], strict=True):
        assert_accurate(o, t, r)


@every_backend
def test_every_output_is_written_and_the_same_bits_come_twice(backend: str):
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory holds NaN
    try:
        q, k, v = (heads(backend, 150, 128, torch.bfloat16) for _ in range(3))
        once, again = (attention_lse(q, k, v, backend=backend) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(once, again, strict=True):
        assert not a.isnan().any() and torch.equal(a, b)


@every_backend
def test_nan_stays_in_its_row_of_queries(backend: str):
    q, k, v = (heads(backend, 140, 64, torch.bfloat16) for _ in range(3))
    expected = attention(q, k, v, backend=backend)
    q[:, 7] = math.nan
    out = attention(q, k, v, backend=backend)
    others = torch.arange(140) != 7
    assert out[:, 7].isnan().all() and torch.equal(out[:, others], expected[:, others])


@every_backend
def test_a_key_of_minus_infinite_score_has_no_weight(backend: str):
    q = heads(backend, 3, 64, torch.bfloat16).abs()
    k, v = (heads(backend, 199, 64, torch.bfloat16) for _ in range(2))
    k[:, :136, :, 0] = -math.inf  # a whole tile, and more
    rest = attention(q, k[:, 136:], v[:, 136:], backend=backend)
    torch.testing.assert_close(attention(q, k, v, backend=backend), rest)


@every_backend
def test_gradients_are_those_of_the_op(backend: str):
    args = dict(zip("qkv", (heads(backend, 9, 64, torch.bfloat16) for _ in range(3)), strict=True))
    dout = (torch.randn_like(args["q"]),)
    wide = {name: t.double() for name, t in args.items()}
    truth = gradients(reference.attention, wide, (dout[0].double(),))
    own = gradients(reference.attention, args, dout)
    found = gradients(lambda q, k, v: attention(q, k, v, backend=backend), args, dout)
    for o, t, r in zip(found, truth, own, strict=True):
        assert_accurate(o, t, r)


@every_backend
def test_rope_attention_has_its_gradients_too(backend: str):
    """The norm, the rotation and the backward are those of the kernels beside it."""
    device = device_of(backend)
    sizes = Sizes(1, 0, 9, heads=2, head_dim=64, skip=0, spare=0)
    args = CASES["rope_attention"].inputs(Maker(sizes, torch.bfloat16))
    args = {n: a.to(device) if isinstance(a, Tensor) else a for n, a in args.items()}
    wide = {n: a.double() if isinstance(a, Tensor) else a for n, a in args.items()}
    dout = torch.randn(args["q"].shape, device=device)
    found = gradients(partial(ops.rope_attention, backend=backend), args, (dout,))
    truth = gradients(reference.rope_attention, wide, (dout.double(),))
    own = gradients(reference.rope_attention, args, (dout,))
    for o, t, r in zip(found, truth, own, strict=True):
        assert_accurate(o, t, r)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", [GPU])
def test_a_graph_holds_it(backend: str):
    q, k, v = (heads(backend, 150, 128, torch.bfloat16) for _ in range(3))
    expected = attention(q, k, v, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, backend=backend)
    graph.replay()
    assert torch.equal(out, expected)


# what it does not take


def odd_rows(q: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:2], 2, q.shape[3] + 1)[..., : q.shape[3]].copy_(q)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda q: q.float(), "takes bfloat16 and float16, got torch.float32"),
        (lambda q: q[..., :10], "takes D of 8, 16, ... 128, got 10"),
        (lambda q: q[:, :, :, None].expand(1, 5, 2, 3, 64).reshape(1, 5, 2, 192), "got 192"),
        (lambda q: q[:, :0], "takes at least one key"),
        (odd_rows, r"rows at multiples of 16 bytes, got q with strides \(650, 130, 65, 1\)"),
        (lambda q: q[:, :1].expand(1, 5, 2, 64), "rows at multiples of 16 bytes"),
        (lambda q: torch.cat([q, q], -1)[..., 1:65], "rows at multiples of 16 bytes"),
    ],
)
@every_backend
def test_what_it_does_not_take_is_refused_by_reason(backend: str, change: Callable, reason: str):
    q = change(heads(backend, 5, 64, torch.bfloat16))
    with pytest.raises(NotImplementedError, match=f"{backend}: .*{reason}"):
        attention(q, q, q, backend=backend)


def test_the_launcher_refuses_what_it_does_not_take_too():
    q = odd_rows(heads(EMULATOR, 5, 64, torch.bfloat16))
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.ops.fluxkern_cuda_wgmma_emulator.attention(q, q, q, q.new_empty(q.shape))


# when it is chosen


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable) -> dict[str, Path]:
    """Of the user's tables and the package's; its kernels stand for cuda's on this CPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(measured, "PACKAGE", tmp_path / "package")
    not_shown = partial(hopper.not_shown_faster, "attention")
    plant("attention", Backend("cuda", reference.attention))
    plant("attention", Backend(GPU, reference.attention, unnamed=not_shown))
    measured.forget()
    yield {"user": measured.user_folder(), "package": measured.PACKAGE}
    measured.forget()


def chosen() -> str | None:
    q = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)
    return ops.explain("attention", q, q, q)[0].chosen


def place(folder: Path, times: dict[str, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = measured.device_name(torch.device("cpu"))
    digest = {"attention": measured.digests("attention", times)}
    table = {"order": {"attention": {"bfloat16": {"10": times}}}, "digest": digest}
    (folder / measured.file_name(name)).write_text(json.dumps(table))
    measured.forget()


FASTER = {GPU: 1.0, "cuda": 2.0}


def test_without_a_result_it_is_not_chosen(folders: dict[str, Path]):
    assert chosen() == "cuda"


def test_a_users_table_does_not_choose_it(folders: dict[str, Path]):
    place(folders["user"], FASTER)
    assert chosen() == "cuda"
    line = str(ops.explain("attention", *(torch.zeros(1, 4, 2, 64).bfloat16(),) * 3)[0])
    assert f"{GPU}: no result of this device in the package shows it right and faster" in line


@pytest.mark.parametrize(
    "times, expected",
    [
        (FASTER, GPU),
        ({"cuda": 1.0, GPU: 2.0}, "cuda"),
        ({GPU: 1.0}, "cuda"),  # alone it is not shown faster
    ],
)
def test_a_result_in_the_package_chooses_it_where_it_is_faster(
    folders: dict[str, Path], times: dict[str, float], expected: str
):
    place(folders["package"], times)
    assert chosen() == expected


# waits, fences and barriers


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    return planted_programs("attention_wgmma", tmp_path_factory.mktemp("attention_wgmma"))


def planted(code: str, instead: str = "") -> str:
    return source_without("attention_wgmma", code, 0, instead)


WAITS = {  # what is left out, and what is said of it
    "for q": ("wait_for(memory.q_full, 0);", "a block has ended before its copies"),
    "for the first keys": ("wait_for(memory.k_full[0], 0);", "more arrive than"),
    "for keys": ("wait_for(memory.k_full[k.stage], k.parity);", "more arrive than"),
    "for values": ("wait_for(memory.v_full[v.stage], v.parity);", "more arrive than"),
    "for room for keys": (
        "wait_for(memory.k_empty[place.stage], place.parity ^ 1);",
        "more arrive than",
    ),
    "for room for values": (
        "wait_for(memory.v_empty[place.stage], place.parity ^ 1);",
        "more arrive than",
    ),
    "for scores": ("wait_for_products<1>();", "written while it is under way"),
    "for barriers": ("__syncthreads();", "a barrier is used before it is begun"),
    "for a fence": ("begin_products();", "a product has begun without a fence"),
    "for a lane's rows": ("__syncwarp();", "depends on the order of blocks and threads"),
}
QUICK = ("for q", "for scores")


def test_the_kernel_gives_the_sums_in_double(program: Callable):
    done = program((ROOT / "csrc/cuda/attention_wgmma.cu").read_text())
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    "wait",
    [w if w in QUICK else pytest.param(w, marks=pytest.mark.sanitize) for w in WAITS],
)
def test_a_wait_that_is_left_out_is_seen(program: Callable, wait: str):
    code, said = WAITS[wait]
    done = program(planted(code))
    assert done.returncode and said in done.stdout, done.stdout


RELEASE = "release(memory.v_empty[v.stage]);"
SETTLE = "wait_for_products<0>();\n            sums_settled();\n            "
LEADING = "matrix_at(address_of(v.chunks), KEYS * ATOM_ROW,"
CHANGES = {
    "values given back while they are multiplied": (SETTLE + RELEASE, RELEASE + SETTLE),
    "weights rounded over those that are multiplied": (
        "exponentiate();\n            wait_for_products<0>();",
        "exponentiate();\n            round_scores();\n            wait_for_products<0>();",
    ),
    "another leading offset": (LEADING, LEADING.replace("KEYS", "ATOM_ROWS")),
    "the tail of keys not masked": ("if (left < KEYS) mask(left);", ""),
    "the turn not announced": ("if (group == 1 && keys > KEYS) announce", "if (false) announce"),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_order_or_layout_is_seen(program: Callable, change: str):
    assert program(planted(*CHANGES[change])).returncode
