"""What was written before stays readable until the new is there whole: files and folders, killed processes, full disks,
places that cannot be written to, links, modes."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.io import places
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import toy

posix = pytest.mark.skipif(os.name != "posix", reason="kills, links and modes of POSIX")
X = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))


def adapted(r: int = 3, seed: int = 0, whole: bool = False) -> nn.Module:
    model = toy()
    more = {"train_modules": ("head",)} if whole else {"target_names": ("up",)}
    ll.attach(model, ll.LoRAConfig(r=r, alpha=7, **more))
    randomise(model, seed=seed)
    return model


def output(folder: Path) -> torch.Tensor:
    model = toy()
    ll.load(model, folder)
    return model(X)


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


class Kill:
    """Ends this process at the n-th line of `io/places.py` that it runs."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename != places.__file__:
            return None
        if event == "line":
            self.n -= 1
            if self.n == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def killed(act, n: int) -> bool:
    """Whether a copy of this process did not live to the end of `act`, being killed at line n."""
    pid = os.fork()
    if pid == 0:
        try:
            sys.settrace(Kill(n))
            act()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@posix
@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("whole", [False, True], ids=["same config", "another config"])
def test_a_process_that_is_killed_leaves_the_old_or_the_new_folder(whole, step, tmp_path):
    """The second adapter has another rank and other modules: its tensors beside the old config would not load."""
    first = tmp_path / "first"
    ll.export(adapted(), first)
    (first / "README.md").write_text("mine")
    (first / "more").mkdir()
    (first / "more" / "notes.txt").write_text("mine too")
    old, second = output(first), adapted(5 if whole else 3, seed=1, whole=whole)
    new = second.eval()(X)
    ll.export(second, tmp_path / "never killed")
    seen = set()
    for n in range(1, 1000, step):
        folder = tmp_path / f"{n}"
        shutil.copytree(first, folder)
        ended = killed(lambda folder=folder: ll.export(second, folder), n)
        now = output(folder)
        if torch.equal(now, old):
            seen.add("old")
        else:
            torch.testing.assert_close(now, new, atol=1e-6, rtol=0)
            seen.add("new")
        assert (folder / "README.md").read_text() == "mine"
        assert (folder / "more" / "notes.txt").read_text() == "mine too"
        if not ended:
            break
        shutil.rmtree(folder)
    assert seen == {"old", "new"} and n > 30
    assert listing(folder) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "more"]


def test_exported_again_after_more_training_only_the_tensors_change(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "_swap", None)
    for seed in (1, 2):
        model = adapted(seed=seed)
        ll.export(model, tmp_path / "x")
        torch.testing.assert_close(output(tmp_path / "x"), model.eval()(X), atol=1e-6, rtol=0)


@pytest.mark.parametrize("fail", [None, 1, 2])
def test_without_an_exchange_of_folders_the_old_one_is_moved_away(fail, tmp_path, monkeypatch):
    """As on systems other than Linux; a failure on the way takes it back."""
    monkeypatch.setattr(places, "exchange", lambda a, b: False)
    folder = tmp_path / "x"
    ll.export(adapted(), folder)
    (folder / "mine").write_text("1")
    old, model, rename, calls = output(folder), adapted(5, seed=1, whole=True), Path.rename, []

    def failing(self, to):
        calls.append(to)
        if len(calls) == fail:
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    if fail:
        with pytest.raises(ll.FileError, match="could not be written"):
            ll.export(model, folder)
        assert torch.equal(output(folder), old)
    else:
        ll.export(model, folder)
        torch.testing.assert_close(output(folder), model.eval()(X), atol=1e-6, rtol=0)
    assert listing(tmp_path) == ["x"] and "mine" in listing(folder)


@posix
def test_many_who_write_one_folder_at_once(tmp_path, monkeypatch):
    """As ranks do that all export: one after the other, everyone succeeds, and what lies there at the end is one of
    theirs, whole."""
    import time
    from concurrent.futures import ThreadPoolExecutor

    put, inside = places._put, []

    def slowly(*words) -> None:
        inside.append(1)
        time.sleep(2e-3)
        assert len(inside) == 1, "two at once"
        put(*words)
        inside.pop()

    monkeypatch.setattr(places, "_put", slowly)

    def write(n: int) -> None:
        with places.replaced_folder(tmp_path / "new", "adapter") as folder:
            for name in ("adapter", "config", "card"):
                (folder / name).write_text(str(n))

    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            shutil.rmtree(tmp_path / "new", ignore_errors=True)
            list(pool.map(write, range(16)))
            assert listing(tmp_path) == ["new"]
            assert listing(tmp_path / "new") == ["adapter", "card", "config"]
            assert len({p.read_text() for p in (tmp_path / "new").iterdir()}) == 1


def test_what_somebody_writes_meanwhile_is_kept(tmp_path, monkeypatch):
    folder, exchange = tmp_path / "x", places.exchange
    ll.export(adapted(), folder)

    def later(a, b):
        (folder / "late").write_text("late")
        return exchange(a, b)

    monkeypatch.setattr(places, "exchange", later)
    ll.export(adapted(5, whole=True), folder)
    assert (folder / "late").read_text() == "late"


# ---- full disks, and places where nothing can be written

VERBS = {"save": lambda m, at: ll.save(m, at / "a.safetensors"), "export": lambda m, at: ll.export(m, at / "folder")}


@posix
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("size", [0, 1000, 6000])
def test_a_full_disk_keeps_the_old_file(verb, size, tmp_path):
    import resource

    act, place = VERBS[verb], tmp_path / ("a.safetensors" if verb == "save" else "folder")
    act(adapted(), tmp_path)
    old, before = output(place), listing(tmp_path)
    other = adapted(30, seed=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(ll.FileError, match="could not be written"):
            act(other, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.equal(output(place), old) and listing(tmp_path) == before
    act(other, tmp_path)
    torch.testing.assert_close(output(place), other.eval()(X), atol=1e-5, rtol=0)


@posix
@pytest.mark.parametrize("verb", VERBS)
def test_places_where_nothing_can_be_written(verb, tmp_path):
    model = adapted()
    (tmp_path / "file").write_text("mine")
    for at in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc"), tmp_path / ("x" * 300), tmp_path / "\0"):
        with pytest.raises(ll.FileError):
            VERBS[verb](model, at)
    assert listing(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"
    (tmp_path / "a.safetensors").mkdir()
    (tmp_path / "folder").write_text("mine")
    with pytest.raises(ll.FileError):
        VERBS[verb](model, tmp_path)
    assert (tmp_path / "folder").read_text() == "mine"


@posix
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_that_may_only_be_read(verb, tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(ll.FileError, match="could not be written"):
            VERBS[verb](adapted(), tmp_path)
    finally:
        tmp_path.chmod(0o755)
    assert not listing(tmp_path)


@posix
def test_names_as_long_as_the_system_allows(tmp_path):
    path = ll.save(adapted(), tmp_path / ("x" * 243 + ".safetensors"))
    assert listing(tmp_path) == [path.name]


@posix
def test_no_device_is_replaced():
    os.mkfifo(path := Path(os.environ.get("TMPDIR", "/tmp")) / f"fifo-{os.getpid()}.safetensors")
    try:
        with pytest.raises(ll.FileError, match="is no file"):
            ll.save(adapted(), path)
        with pytest.raises(ll.FileError, match="is no file"):
            ll.load(toy(), path)
        assert path.is_fifo()
    finally:
        path.unlink()


# ---- links and modes


@posix
def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    real = ll.save(adapted(), tmp_path / "elsewhere" / "real.safetensors")
    link = tmp_path / "link.safetensors"
    link.symlink_to(real)
    model = adapted(seed=4)
    ll.save(model, link)
    assert link.is_symlink() and torch.equal(output(real), model.eval()(X))
    link.unlink()
    link.symlink_to(tmp_path / "not there yet" / "new.safetensors")
    ll.save(model, link)
    assert link.is_symlink() and (tmp_path / "not there yet" / "new.safetensors").is_file()
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(ll.FileError):
        ll.save(model, link)
    with pytest.raises(ll.FileError):
        ll.load(model, link, name="b")
    folder, other = ll.export(model, tmp_path / "folder"), tmp_path / "other"
    other.symlink_to(folder)
    second = adapted(5, seed=5, whole=True)
    ll.export(second, other)
    assert other.is_symlink()
    torch.testing.assert_close(output(folder), second.eval()(X), atol=1e-6, rtol=0)


@posix
def test_what_is_replaced_gives_its_mode(tmp_path):
    path, folder = ll.save(adapted(), tmp_path / "a"), ll.export(adapted(), tmp_path / "folder")
    modes = {path: 0o640, folder: 0o750, folder / "adapter_config.json": 0o604, path.parent / "folder" / "x": 0o611}
    (folder / "x").write_text("mine")
    for at, mode in modes.items():
        at.chmod(mode)
    other = adapted(5, seed=5, whole=True)
    ll.save(other, path)
    ll.export(other, folder)
    assert {at: at.stat().st_mode & 0o777 for at in modes} == modes


# ---- what a file holds is what was saved


def test_every_flipped_bit_of_the_numbers_is_noticed(tmp_path):
    path = ll.save(adapted(), tmp_path / "x")
    whole = path.read_bytes()
    at = 8 + int.from_bytes(whole[:8], "little")
    assert len(whole) - at == 2 * 4 * (3 * 12 + 20 * 3)
    model = toy()
    for i in range(0, 8 * (len(whole) - at), 31):
        flipped = bytearray(whole)
        flipped[at + i // 8] ^= 1 << i % 8
        path.write_bytes(flipped)
        with pytest.raises(ll.FileError, match=r"lora_[AB]|not finite"):
            ll.load(model, path)
    path.write_bytes(whole)
    ll.load(model, path)


def test_tensors_that_changed_places_are_noticed(tmp_path):
    from safetensors.torch import load_file, save_file

    path = ll.save(adapted(), tmp_path / "x")
    tensors = load_file(path)
    from lora_lite.io.header import read_header

    a, b = "layers.0.up.lora_A", "layers.1.up.lora_A"
    swapped = {**tensors, a: tensors[b], b: tensors[a]}
    import json

    save_file(swapped, path, {"lora_lite": json.dumps(read_header(path))})
    with pytest.raises(ll.FileError, match="checksum"):
        ll.load(toy(), path)


def test_a_file_without_checksums_still_loads(tmp_path):
    import json

    from safetensors.torch import load_file, save_file

    from lora_lite.io.header import read_header

    model = adapted()
    path = ll.save(model, tmp_path / "x")
    head = copy.deepcopy(read_header(path))
    for entry in head["targets"].values():
        del entry["crc32"]
    save_file(load_file(path), path, {"lora_lite": json.dumps(head)})
    assert torch.equal(output(path), model.eval()(X))
