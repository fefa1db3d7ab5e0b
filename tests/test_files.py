"""Files appear whole or not at all, whoever is killed; what is not ours stays."""

import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest
import torch
from checkpoint_files import files_below, tiny_autoencoder, tiny_flux
from crash_points import CAN_COUNT, Judge, Scenario, in_child, read_state
from safetensors.torch import save_file

from fluxkern import _files
from fluxkern._files import ALL, new_folder, write_files, write_tensors
from fluxkern.checkpoint import load_flux, save_autoencoder, save_flux
from fluxkern.cli import main
from fluxkern.pipeline import COMPACT, FluxPipeline

HERE = Path(__file__).parent
MINE = ("thesis.tex", "transformer/notes.md", "tokenizer/vocab.txt", "data/x.safetensors")
OURS = re.compile(r"ours.*|below/ours")


def text(value: str):
    return lambda path: path.write_text(value)


def replace(folder: Path, **names: str) -> None:
    with new_folder(folder, OURS) as unfinished:
        for name, value in names.items():
            (unfinished / name).write_text(value)


def contents(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_text() for p in files}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder of our files and of others."""
    folder = tmp_path / "mixed"
    (folder / "below").mkdir(parents=True)
    for name in ("ours", "ours-too", "theirs", "below/ours", "below/theirs"):
        (folder / name).write_text("old")
    (folder / "link").symlink_to("theirs")
    return folder


# a folder takes another's place


@pytest.fixture(params=["exchange", "two steps"])
def steps(request, monkeypatch):
    """The two ways in which folders change places."""
    if request.param == "two steps":
        monkeypatch.setattr(_files, "_exchange", lambda a, b: False)


def test_our_files_are_replaced_and_others_stay(mixed, steps):
    before = (mixed / "theirs").stat()
    replace(mixed, ours="new")
    expected = {"ours": "new", "theirs": "old", "below/theirs": "old", "link": "old"}
    assert contents(mixed) == expected
    assert (mixed / "link").is_symlink()
    assert (mixed / "theirs").stat().st_ino == before.st_ino
    assert files_below(mixed.parent) == sorted(
        ["mixed", "mixed/below", *map("mixed/{}".format, expected)]
    )


def test_a_link_in_the_place_of_our_file_goes_and_what_it_led_to_stays(tmp_path, mixed):
    (tmp_path / "elsewhere").write_text("precious")
    (mixed / "ours").unlink()
    (mixed / "ours").symlink_to(tmp_path / "elsewhere")
    replace(mixed, ours="new")
    assert not (mixed / "ours").is_symlink()
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_a_folder_that_is_a_link_is_replaced_where_it_leads(tmp_path, mixed):
    (tmp_path / "link").symlink_to("mixed")
    replace(tmp_path / "link", ours="new")
    assert (tmp_path / "link").is_symlink()
    assert contents(mixed)["ours"] == "new"


def test_a_failure_leaves_the_old_folder_and_nothing_else(mixed, steps):
    before = contents(mixed)
    with pytest.raises(ZeroDivisionError), new_folder(mixed, OURS) as unfinished:
        (unfinished / "ours").write_text("half")
        raise ZeroDivisionError
    assert contents(mixed) == before
    assert [p.name for p in mixed.parent.iterdir()] == ["mixed"]


def test_a_failure_takes_away_the_folders_that_were_made_for_it(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a" / "b" / "c"):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        write_files(tmp_path / "a" / "b", {"name": lambda path: 1 / 0})
    assert files_below(tmp_path) == []


def test_a_folder_that_may_hold_nothing_is_not_replaced(mixed, tmp_path):
    with pytest.raises(ValueError, match="must be new or empty"), new_folder(mixed):
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match="must be a folder, got a file"),
        new_folder(tmp_path / "file", ALL),
    ):
        pass
    with pytest.raises(ValueError, match="must be new or empty"), new_folder(tmp_path / "late"):
        replace(tmp_path / "late", ours="the first one's")
    assert contents(tmp_path / "late") == {"ours": "the first one's"}


def test_the_working_folder_is_not_replaced_under_the_feet_of_who_is_there(mixed, monkeypatch):
    monkeypatch.chdir(mixed / "below")
    with pytest.raises(ValueError, match="holds the working folder"):
        replace(mixed, ours="new")
    assert contents(mixed)["ours"] == "old"


@pytest.mark.skipif(not os.path.ismount("/dev"), reason="a mount point")
def test_a_mount_point_is_refused_in_one_line():
    with pytest.raises(ValueError, match="/dev is a mount point"):
        replace(Path("/dev"), ours="new")


def test_a_folder_may_be_written_in_the_place_of_the_one_that_is_being_made(tmp_path):
    with new_folder(tmp_path / "outer", ALL) as unfinished:
        with new_folder(unfinished, ALL) as inner:
            (inner / "name").write_text("x")
        write_files(unfinished, {"other": text("y")})
    assert contents(tmp_path) == {"outer/name": "x", "outer/other": "y"}


# killed processes


def killed_between_the_two_steps(folder: Path) -> None:
    def work() -> None:
        _files._exchange = lambda a, b: False
        real = os.replace

        def second(a: Path, b: Path) -> None:
            if Path(b).name == folder.name and Path(a).name == "new":
                os.kill(os.getpid(), signal.SIGKILL)
            real(a, b)

        os.replace = second
        replace(folder, ours="new")

    os.waitpid(in_child(work), 0)


def test_what_a_process_killed_between_the_two_steps_moved_away_comes_back(mixed):
    before = contents(mixed)
    killed_between_the_two_steps(mixed)
    assert not mixed.exists()
    write_files(mixed.parent, {"other": text("x")})
    assert contents(mixed) == before
    assert sorted(p.name for p in mixed.parent.iterdir()) == ["mixed", "other"]


def test_a_run_leaves_alone_what_a_live_one_is_writing(tmp_path):
    with new_folder(tmp_path / "slow") as unfinished:
        (unfinished / "part").write_text("x")
        write_files(tmp_path, {"quick": text("y")})
        replace(tmp_path / "other", ours="z")
        assert (unfinished / "part").read_text() == "x"
    assert contents(tmp_path) == {"slow/part": "x", "quick": "y", "other/ours": "z"}


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_only_folders_of_the_same_user_and_no_links_are_swept(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / ".fluxkern-planted.tmp").symlink_to("precious")
    (tmp_path / ".fluxkern-theirs.tmp").mkdir()
    os.chown(tmp_path / ".fluxkern-theirs.tmp", 54321, -1)
    write_files(tmp_path, {"name": text("x")})
    assert (tmp_path / "precious").is_dir() and (tmp_path / ".fluxkern-theirs.tmp").is_dir()


def test_nothing_is_taken_from_where_a_link_in_a_planted_folder_leads(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters").write_text("mine")
    (tmp_path / "home" / "old").symlink_to(".")
    for name, link in {"1": "files", "2": "files/old"}.items():
        planted = tmp_path / "unpacked" / f".fluxkern-{name}.tmp" / link
        planted.parent.mkdir(parents=True)
        planted.symlink_to(tmp_path / "home")
    write_files(tmp_path / "unpacked", {"name": text("x")})
    assert contents(tmp_path) == {"home/letters": "mine", "unpacked/name": "x"}


def test_a_save_killed_anywhere_leaves_the_old_one_or_the_new_one(seed):
    points = ("--points", "10") if CAN_COUNT else ()
    command = [sys.executable, HERE / "crash_points.py", *points, "--kills", "2"]
    done = subprocess.run([*command, "--seed", str(seed)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1].removeprefix("all "))
    assert counts["kills"] > 0


@pytest.mark.sanitize
def test_a_save_killed_at_every_call_leaves_the_old_one_or_the_new_one(seed):
    command = [sys.executable, HERE / "crash_points.py", "--kills", "20", "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_judge_of_killed_saves_sees_one_that_mixes(tmp_path):
    def save(path: Path, value: int) -> None:
        for name in "ab":
            save_file({name: torch.full((2,), value)}, path.with_name(name))
        path.touch()

    def read(path: Path) -> tuple[float, ...]:
        return sum((read_state(path.with_name(name)) for name in "ab"), ())

    judge = Judge(Scenario(save, read, "state"), tmp_path)
    judge.keep_old()

    def kill(work) -> bool:  # behind the first of the two files
        save_file({"a": torch.full((2,), 2)}, judge.path.with_name("a"))
        return True

    judge(kill)
    assert judge.counts["mixed"] == 1


# several writers


def test_two_writers_of_one_folder_leave_one_of_the_two(tmp_path):
    def save(value: float) -> None:
        model = tiny_flux()
        for parameter in model.parameters():
            parameter.data.fill_(value)
        for _ in range(5):
            save_flux(model, tmp_path / "flux", max_shard_size="200KB")

    threads = [threading.Thread(target=save, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {
        float(x) for p in load_flux(tmp_path / "flux").state_dict().values() for x in p.aminmax()
    }
    assert len(found) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["flux"]


def test_writers_of_other_names_in_one_folder_do_not_meet(tmp_path):
    def write(worker: int) -> None:
        for i in range(100):
            write_files(tmp_path, {f"{worker}-{i}": text("x")})
            replace(tmp_path / f"folder-{worker}", ours=str(i))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))  # raises what they raised
    names = {f"{worker}-{i}" for worker in range(4) for i in range(100)}
    assert contents(tmp_path) == dict.fromkeys(names, "x") | {
        f"folder-{worker}/ours": "99" for worker in range(4)
    }


def test_of_two_that_make_a_file_anew_the_second_is_refused(tmp_path):
    def late(path: Path) -> None:
        path.write_text("second")
        write_files(tmp_path, {"name": text("first")}, new=True)

    with pytest.raises(FileExistsError, match="exists already"):
        write_files(tmp_path, {"name": late}, new=True)
    assert contents(tmp_path) == {"name": "first"}


def test_two_writers_wait_for_each_other_at_the_end(tmp_path):
    held = _files._lock(tmp_path, wait=True)
    thread = threading.Thread(target=write_files, args=(tmp_path, {"name": text("x")}))
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive() and files_below(tmp_path) == []
    os.close(held)
    thread.join()
    assert contents(tmp_path) == {"name": "x"}


def test_what_was_written_in_a_folder_that_is_replaced_meanwhile_stays(tmp_path):
    folder, kept, ended = tmp_path / "folder", set(), threading.Event()
    folder.mkdir()

    def write() -> None:
        for i in range(60):
            with suppress(FileNotFoundError):  # its unfinished file went with the old folder
                write_files(folder, {str(i): text("x")})
                kept.add(str(i))
        ended.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not ended.is_set():
        with suppress(shutil.Error):  # an unfinished file of the other went while it was linked
            replace(folder, ours="new")
    thread.join()
    assert len(kept) > 20 and kept <= {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("write", ["file", "folder"])
def test_who_does_not_let_go_of_a_folder_is_not_waited_for_without_end(
    tmp_path, monkeypatch, write
):
    monkeypatch.setattr(_files, "PATIENCE", 0.2)
    holder = "import time; print(flush=True); time.sleep(60)"
    command = ["flock", str(tmp_path), sys.executable, "-c", holder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as other:
        other.stdout.readline()
        with pytest.raises(TimeoutError, match="another process has locked it for 0.2 s"):
            if write == "file":
                write_files(tmp_path, {"name": text("x")})
            else:
                replace(tmp_path / "new", ours="x")
        os.killpg(other.pid, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


# permissions


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_modes(folder: Path, umask: int) -> None:
    for path in [folder, *folder.rglob("*")]:
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_what_is_saved_has_the_permissions_of_the_umask(tmp_path, umask):
    save_flux(tiny_flux(), tmp_path / "new" / "flux", max_shard_size="200KB")
    save_autoencoder(tiny_autoencoder(), tmp_path / "new" / "vae")
    save_flux(tiny_flux(), tmp_path / "new" / "flux.safetensors", format="bfl")
    write_files(tmp_path / "new", {"state": lambda path: write_tensors(path, {"a": torch.ones(2)})})
    assert (
        main(["convert", "compact-base", str(tmp_path / "new" / "compact"), "--to", "diffusers"])
        == 0
    )
    FluxPipeline.from_pretrained("compact").save_pretrained(tmp_path / "new" / "pipeline")
    assert_modes(tmp_path / "new", umask)


def test_a_folder_that_is_replaced_keeps_its_permissions(mixed):
    mixed.chmod(0o750)
    replace(mixed, ours="new")
    assert stat.S_IMODE(mixed.stat().st_mode) == 0o750


def test_a_package_that_may_not_be_written_is_converted_into_a_folder_that_may(
    tmp_path, monkeypatch
):
    store = tmp_path / "store"
    with redirect_stdout(io.StringIO()):
        assert main(["convert", "compact-base", str(store), "--to", "diffusers"]) == 0
        for path in (store, *store.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        monkeypatch.setitem(COMPACT, "compact-base", store)
        assert main(["convert", "compact-base", str(tmp_path / "out"), "--to", "diffusers"]) == 0
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "out").rglob("*"))


def test_converting_by_force_deletes_nothing_that_is_not_its_own(tmp_path):
    out = tmp_path / "out"
    for name in MINE:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    (out / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors").write_text("old")
    with redirect_stdout(io.StringIO()):
        assert main(["convert", "compact-base", str(out), "--to", "diffusers", "--force"]) == 0
        assert main(["convert", "compact-base", str(out / "a.safetensors"), "--to", "bfl"]) == 0
    mine = [p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()]
    mine = {name for name in mine if (out / name).stat().st_size == 4}
    assert mine == {
        "thesis.tex",
        "transformer/notes.md",
        "tokenizer/vocab.txt",
        "data/x.safetensors",
    }
    assert not list(out.rglob("*-of-*"))
    FluxPipeline.from_pretrained(out)
