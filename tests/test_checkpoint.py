"""Checkpoints that are damaged, crafted, cut off or have nowhere to go: what was good stays good, and what is bad is named."""
import contextlib
import errno
import json
import math
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from small import files, net
from torch import nn

import arc_nb.engine.checkpoint as checkpoint_room
import arc_nb.engine.saver as saver_room
from arc_nb.engine.checkpoint import (FORMAT, best_good, listed, newest_good, prune, read_checkpoint, sealed, sweep, verify,
                                      write_checkpoint)
from arc_nb.engine.onefile import write_one
from arc_nb.engine.packing import pack, read_file, unpack, write_file
from arc_nb.engine.saver import Saver

FORMATS = Path(__file__).parent / "formats"


def trained() -> dict[str, Any]:
    "The state of a small training."
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(5, 4)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3, "random": torch.get_rng_state()}


def same(a: Any, b: Any) -> bool:
    "Whether two nests of values have the same types and the same bits."
    if type(a) is not type(b): return False
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    if not isinstance(a, torch.Tensor): return a == b or (a != a and b != b)
    raw = lambda t: t.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def spoil(data: bytes, place: int, rng: random.Random) -> list[bytes]:
    "The bytes with one bit turned over, and with another byte in its place."
    bit, other = data[place] ^ 1 << rng.randrange(8), (data[place] + rng.randrange(1, 256)) % 256
    return [data[:place] + bytes([byte]) + data[place + 1:] for byte in (bit, other)]


# ---- what comes back ----

def saved_and_read(state: Any, folder: Path) -> list[Any]:
    "The state from a checkpoint, from a compressed one, from one in the background, from one in one file, and from a file."
    paths = [write_checkpoint(folder, state, {"step": 1}, compress) for compress in (False, True)]
    saver = Saver(folder, last=99)
    saver.save(state, {"step": 1})
    saver.wait()
    assert saver.take_error() is None
    paths += [saver.latest, write_one(folder / "one.pt", state, {"step": 1})]
    return [read_checkpoint(path)[0] for path in paths] + [read_file(write_file(folder / "file", state))]


VALUES = {
    "plain": {"a": None, "b": True, "c": -5, "d": 10**40, "e": "word \u00e9 \ud800 \x00", "f": b"\x00\xff", "g": [], "h": (), "i": {}},
    "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan, 1e16, 2.0],
    "complex": [1 + 2j, complex(math.inf, -0.0)],
    "nested": {"tuple": (1, (2, [3, (4,)])), "list": [{"x": (1,)}]},
    "keys": {0: {"exp_avg": torch.ones(2)}, 1: {}, (1, "a"): 2, None: 3, 2.5: 4, b"k": 5, True + 7: 6},
    "dtypes": [torch.ones(3).to(dtype) for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
        torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128)],
    "shapes": [torch.tensor(3.5), torch.empty(0), torch.empty(2, 0, 3), torch.ones(1, 1), torch.tensor(1 + 1j),
               torch.arange(24).view(2, 3, 4)],
    "not contiguous": [torch.arange(6).view(2, 3).T, torch.arange(10)[::3], torch.arange(10.0)[::3][1:2],
                       torch.ones(3).expand(2, 3), torch.randn(2, 4, 4, 3).permute(0, 3, 1, 2)],
    "views": (lambda t: [t[:5], t[3:8], t])(torch.arange(10.0)),
    "conjugate": [torch.tensor([1 + 2j, 3 - 1j]).conj(), torch.tensor([1 + 2j]).conj().imag],
    "special": [torch.tensor([math.inf, -math.inf, math.nan, -0.0])],
    "names": {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}, "__metadata__": torch.full((1,), 2.0), "": torch.full((1,), 3.0),
              "tensor": {"dict": 1}},
}


@pytest.mark.parametrize("name", VALUES)
def test_what_is_saved_comes_back_with_its_types_and_bits(name: str, tmp_path: Path):
    for state in ({"value": VALUES[name]}, {"model": {"value": VALUES[name]}}):
        for back in saved_and_read(state, tmp_path): assert same(back, state), (back, state)


def test_a_trained_state_goes_back_into_model_and_optimizer(tmp_path: Path):
    state = trained()
    for back in saved_and_read(state, tmp_path):
        assert list(back) == list(state) and same(back["optimizer"], state["optimizer"]) and same(back["model"], dict(state["model"]))
        model = net(seed=1)
        model.load_state_dict(back["model"])
        torch.optim.AdamW(model.parameters()).load_state_dict(back["optimizer"])


def test_numpy_and_subclasses_come_back_as_plain_types(tmp_path: Path):
    state = {"array": np.arange(3)[::-1], "zero": np.array(2.5), "frozen": np.broadcast_to(np.float32(1), (2,)), "number": np.float32(0.5),
             "flag": np.bool_(True), "counts": Counter("aab"), "ordered": OrderedDict(b=1, a=2), "size": torch.Size([1, 2])}
    for back in saved_and_read(state, tmp_path):
        assert same(back, {"array": torch.tensor([2, 1, 0]), "zero": torch.tensor(2.5, dtype=torch.float64), "frozen": torch.ones(2),
                           "number": 0.5, "flag": True, "counts": {"a": 2, "b": 1}, "ordered": {"b": 1, "a": 2}, "size": (1, 2)})


def test_tied_weights_are_stored_once_and_come_back_as_one(tmp_path: Path):
    weight = nn.Parameter(torch.randn(50, 50))
    state = {"ema": {"shared": weight}, "model": {"embed": weight, "head": weight, "view": weight.T}}
    for back in saved_and_read(state, tmp_path):
        model = back["model"]
        assert model["head"] is model["embed"] is back["ema"]["shared"]
        assert model["view"] is not model["embed"] and model["view"].equal(weight.T)
    path = newest_good(tmp_path)
    assert (path / "model.safetensors").stat().st_size < 2.2 * weight.nbytes and (path / "state.safetensors").stat().st_size < 100
    twins = nn.ModuleDict({"embed": nn.Linear(50, 50, bias=False), "head": nn.Linear(50, 50, bias=False)})
    twins["head"].weight = twins["embed"].weight
    path = write_checkpoint(tmp_path, {"model": twins.state_dict()}, {"step": 9})
    expected = twins["head"].weight.detach().clone()
    with torch.no_grad(): twins["head"].weight.zero_()
    safetensors.torch.load_model(twins, path / "model.safetensors")
    assert twins["head"].weight is twins["embed"].weight and twins["head"].weight.equal(expected)


def test_weights_can_be_read_by_safetensors_alone(tmp_path: Path):
    state = net().to(torch.bfloat16).state_dict() | {"count": torch.tensor(3), "none": torch.empty(0, 2)}
    path = write_checkpoint(tmp_path, {"model": state, "step": 1}, {"step": 1})
    alone = safetensors.torch.load_file(path / "model.safetensors")
    assert alone.keys() == state.keys() and all(same(alone[k], state[k]) for k in state)
    assert safetensors.torch.load_file(path / "state.safetensors") == {}
    assert safetensors.torch.load_file(write_file(tmp_path / "one", {"model": state})).keys() == {f"model.{k}" for k in state}


@pytest.mark.parametrize("value, words", [
    (lambda: 0, "callbacks.0.thing is a function"), (torch.eye(2).to_sparse(), "not dense"), (torch.empty(2, device="meta"), "not dense"),
    (np.array([None]), "an array of object"), (Path("x"), "PosixPath"), ({1, 2}, "a set"), (torch.float32, "a dtype"),
    (nn.Linear(1, 1), "a Linear"), ({Path("a"): 1}, "is a PosixPath"), (np.datetime64("2020-01-01"), "a date"),
    (np.array(["word"]), "an array of <U4")])
def test_what_cannot_be_stored_is_named_by_its_place(value: Any, words: str, tmp_path: Path):
    state = {"callbacks": [{"thing": value}]}
    saver = Saver(tmp_path / "checkpoints")
    for save in (lambda: write_file(tmp_path / "file", state), lambda: write_checkpoint(tmp_path / "direct", state, {"step": 1}),
                 lambda: saver.save(state, {"step": 1})):
        with pytest.raises(TypeError, match="callbacks.0.thing") as error: save()
        assert words in str(error.value) and "a file holds" in str(error.value)
    assert files(tmp_path) <= {"direct"} and not saver.busy and saver.take_error() is None


def test_metadata_are_plain_json_and_hold_versions(tmp_path: Path):
    path = write_checkpoint(tmp_path, {"model": {}}, {"step": 3, "monitors": {"valid_loss": math.nan}, "note": "a"})
    text = (path / "metadata.json").read_text()
    assert "NaN" not in text
    _, metadata = read_checkpoint(path)
    assert metadata["step"] == 3 and metadata["format"] == FORMAT and metadata["monitors"] == {"valid_loss": None}
    assert metadata["versions"].keys() >= {"arc_nb", "python", "torch", "numpy", "platform"} and best_good(tmp_path) is None
    for bad in ({}, {"step": "3"}):
        with pytest.raises(ValueError, match="lacks the step"): write_checkpoint(tmp_path, {}, bad)
    with pytest.raises(TypeError): Saver(tmp_path).save({}, {"step": 1, "bad": print})


def test_compression_saves_room_where_there_is_some(tmp_path: Path):
    state = {"model": {"weight": torch.zeros(100_000)}}
    plain, packed = [write_checkpoint(tmp_path, state, {"step": 1}, compress) for compress in (False, True)]
    size = lambda path: sum(p.stat().st_size for p in path.iterdir())
    assert size(packed) < 0.05 * size(plain) and same(read_checkpoint(packed)[0], state)


# ---- one flipped byte ----

@pytest.mark.parametrize("compress", [False, True])
def test_one_flipped_byte_anywhere_in_a_checkpoint_is_found(compress: bool, tmp_path: Path):
    rng = random.Random(compress)
    older = write_checkpoint(tmp_path, trained(), {"step": 1}, compress)
    path = write_checkpoint(tmp_path, trained(), {"step": 2, "monitors": {"valid_loss": 0.5}}, compress)
    contents = {p: p.read_bytes() for p in sorted(path.iterdir())}
    assert len(contents) == 5
    places = [(p, k) for p, data in contents.items() for k in rng.sample(range(len(data)), 40)]  # 200
    places += [(p, k) for p, data in contents.items() if p.name == "manifest.json" for k in range(len(data))]
    for file, place in places:
        for bad in spoil(contents[file], place, rng):
            file.write_bytes(bad)
            for read in (verify, read_checkpoint):
                with pytest.raises(ValueError, match=str(file)): read(path)
        file.write_bytes(contents[file])
    verify(path)
    for file, data in contents.items():
        file.write_bytes(spoil(data, rng.randrange(len(data)), rng)[0])
        with pytest.warns(RuntimeWarning, match=f"{path.name} is left out.*{file.name}"): assert newest_good(tmp_path) == older
        file.write_bytes(data)
    assert newest_good(tmp_path) == path


def test_a_file_that_is_cut_missing_longer_or_another_is_found(tmp_path: Path):
    path = write_checkpoint(tmp_path, trained(), {"step": 1})
    other = write_checkpoint(tmp_path, trained() | {"step": 5}, {"step": 2})
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for bad in (b"", good[:-1], good + b"\0", good + b" ", good[:len(good) // 2], b"\0" * len(good), None):
            file.unlink() if bad is None else file.write_bytes(bad)
            with pytest.raises(ValueError, match=str(file)): verify(path)
        file.write_bytes(good)
    for name in ("metadata.json", "state.json"):
        good = (path / name).read_bytes()
        shutil.copy(other / name, path / name)
        with pytest.raises(ValueError, match=name): verify(path)
        (path / name).write_bytes(good)
    shutil.copy(other / "manifest.json", path)
    with pytest.raises(ValueError, match="damaged"): verify(path)


@pytest.mark.parametrize("state", [{"model": net().state_dict(), "settings": {"loss": "mse"}, "best": -math.inf}, {}])
def test_one_flipped_byte_anywhere_in_a_file_is_found(state: dict, tmp_path: Path):
    rng = random.Random(0)
    path = write_file(tmp_path / "model", state)
    good = path.read_bytes()
    for place in range(len(good)):
        for bad in spoil(good, place, rng):
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=str(path)): read_file(path)
    for bad in (b"", good[:-1], good + b"\0", good[:50], good[:100]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=str(path)): read_file(path)
    path.write_bytes(good)
    assert same(read_file(path), state | ({"model": dict(state["model"])} if state else {}))


# ---- files that would run code ----

class Evil:
    "Makes a folder when it is unpickled."
    def __init__(self, marker: Path): self.marker = marker
    def __reduce__(self): return os.mkdir, (str(self.marker),)


def gifts(marker: Path, home: Path) -> list[bytes]:
    "Pickles that make a folder: bare, in torch's zip and in its older format, as the whole and as a part."
    found = [pickle.dumps(Evil(marker), protocol) for protocol in (0, 2, 5)]
    for inside in (Evil(marker), {"format": 1, "model": Evil(marker), "step": 1}, {"format": 2, "model": {"weight": Evil(marker)}}):
        for how in (True, False):
            torch.save(inside, home / "gift", _use_new_zipfile_serialization=how)
            found.append((home / "gift").read_bytes())
    with pytest.raises(FileNotFoundError): marker.rmdir()
    pickle.loads(found[0])
    marker.rmdir()  # the gifts work
    return found


def forged(path: Path) -> None:
    "A manifest that fits the files as they are now."
    from hashlib import sha256
    contents = {p.name: p.read_bytes() for p in path.iterdir() if p.name != "manifest.json"}
    entries = {name: {"bytes": len(data), "sha256": sha256(data).hexdigest()} for name, data in contents.items()}
    (path / "manifest.json").write_text(sealed({"format": FORMAT, "number": 1, "files": entries}))


@pytest.mark.parametrize("compress", [False, True])
def test_a_crafted_pickle_in_place_of_any_file_of_a_checkpoint_runs_nothing(compress: bool, tmp_path: Path):
    marker = tmp_path / "code-ran"
    path = write_checkpoint(tmp_path / "checkpoints", trained(), {"step": 1}, compress)
    contents = {p: p.read_bytes() for p in path.iterdir()}
    for gift in gifts(marker, tmp_path):
        for file in contents:
            file.write_bytes(gift)
            with pytest.raises(ValueError): read_checkpoint(path)
            if file.name != "manifest.json":
                forged(path)
                with pytest.raises(ValueError, match=str(path)): read_checkpoint(path)
                with pytest.warns(RuntimeWarning) if file.name == "metadata.json" else contextlib.nullcontext(): best_good(path.parent)
                prune(path.parent, last=1)
            for p, data in contents.items(): p.write_bytes(data)
            assert not marker.exists()
    read_checkpoint(path)


def test_a_crafted_pickle_in_place_of_a_file_runs_nothing(tmp_path: Path):
    marker = tmp_path / "code-ran"
    for gift in gifts(marker, tmp_path):
        (tmp_path / "model").write_bytes(gift)
        for read in (read_file, read_checkpoint):
            with pytest.raises(ValueError, match=str(tmp_path / "model")): read(tmp_path / "model")
        assert not marker.exists()


@pytest.mark.parametrize("structure", ['{"os.system": "true"}', '{"tensor": "nothing"}', '{"tuple": 5}', '{"items": [[{"dict": {}}, 1]]}',
                                       "[" * 100_000, '{"float": "1; 2"}', '{"bytes": 3}', "{}", '{"complex": ["a"]}'])
def test_crafted_json_is_refused(structure: str, tmp_path: Path):
    path = write_checkpoint(tmp_path, {"model": {}}, {"step": 1})
    (path / "state.json").write_text(structure)
    forged(path)
    with pytest.raises(ValueError, match=str(path)): read_checkpoint(path)


@pytest.mark.parametrize("header", [
    {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, {"a": {"dtype": "os", "shape": [1], "data_offsets": [0, 4]}},
    {"a": 5}, [], 7,
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, -4]}}, None])
def test_crafted_headers_are_refused(header: Any, tmp_path: Path):
    path = write_checkpoint(tmp_path, {"model": {}}, {"step": 1})
    text = json.dumps(header).encode()
    length = (1 << 63) if header is None else len(text)
    for data in (b"", b"\0" * 4):
        (path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text + data)
        forged(path)
        with pytest.raises(ValueError, match=str(path)): read_checkpoint(path)


def test_a_manifest_reaches_no_other_folder(tmp_path: Path):
    path = write_checkpoint(tmp_path, {"model": {}}, {"step": 1})
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../secret"] = manifest["files"].pop("state.json")
    (path / "manifest.json").write_text(sealed(manifest))
    with pytest.raises(ValueError, match="manifest.json is damaged"): verify(path)


# ---- killed ----

def kill(count: int, tmp_path: Path, call: Any) -> None:
    print(call(sys.executable, Path(__file__).with_name("killed_saves.py"), tmp_path, str(count)))


def test_a_writer_that_is_killed_leaves_the_newest_good_one(tmp_path: Path, call: Any): kill(9, tmp_path, call)


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_the_newest_good_one_50_times(tmp_path: Path, call: Any): kill(50, tmp_path, call)


def test_what_a_killed_writer_leaves_is_never_taken_for_a_checkpoint(tmp_path: Path):
    good = write_checkpoint(tmp_path, {"model": {}}, {"step": 1})
    shutil.copytree(good, tmp_path / ".tmp-1-2")
    shutil.copytree(good, tmp_path / ".tmp-removed-step-00000009")
    assert listed(tmp_path) == [good] and [p.name for p in sweep(tmp_path)] == [".tmp-1-2", ".tmp-removed-step-00000009"]
    assert files(tmp_path) == {good.name, *(f"{good.name}/{p.name}" for p in good.iterdir())}
    assert sweep(tmp_path / "nowhere") == [] and listed(tmp_path / "nowhere") == [] and newest_good(tmp_path / "nowhere") is None


# ---- nowhere to go ----

def tried(saver: Saver, step: int, state: dict | None = None) -> Exception | None:
    "The error of one save; it leaves nothing half-written, and the checkpoints before it are whole."
    before = listed(saver.folder)
    saver.save(state or {"model": {"weight": torch.randn(250_000)}}, {"step": step})  # a megabyte
    saver.wait()
    error = saver.take_error()
    assert not list(saver.folder.glob(".tmp*"))
    if error:
        assert listed(saver.folder) == before and saver.take_error() is None
        for path in before: verify(path)
    return error


def test_no_room_for_a_file(tmp_path: Path):
    saver = Saver(tmp_path)
    assert tried(saver, 1) is None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limit[1]))
    try: error = tried(saver, 2)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert isinstance(error, OSError) and error.errno == errno.EFBIG and saver.latest == newest_good(tmp_path)
    assert tried(saver, 3) is None and newest_good(tmp_path).name == "step-00000003"


@pytest.fixture
def disk(tmp_path: Path) -> Any:
    "A disk of 4 MB, and a function that makes it read-only; a folder that chmod protects where nothing may be mounted."
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    mounted = not os.getuid() and not subprocess.run(mount, capture_output=True).returncode
    def protect(on: bool) -> None:
        if mounted: subprocess.run(["mount", "-o", f"remount,{'ro' if on else 'rw'}", folder], check=True)
        else: folder.chmod(0o500 if on else 0o700)
    if not mounted and not os.getuid(): pytest.skip("root may write everywhere, and may mount nothing here")
    yield folder, protect, mounted
    protect(False)
    if mounted: subprocess.run(["umount", folder], check=True)


def test_a_full_disk(disk: Any):
    folder, _, mounted = disk
    if not mounted: pytest.skip("nothing may be mounted here")
    saver = Saver(folder, last=9)
    errors = [tried(saver, step) for step in range(1, 7)]
    assert errors[:4] == [None] * 4 and all(isinstance(e, OSError) and e.errno == errno.ENOSPC for e in errors[4:]), errors
    with pytest.raises(OSError, match="No space"): write_file(folder / "model", {"weight": torch.randn(500_000)})
    assert len(list(folder.iterdir())) == 4 and newest_good(folder) == saver.latest
    shutil.rmtree(listed(folder)[-1])
    assert tried(saver, 7) is None and newest_good(folder).name == "step-00000007"


def test_a_disk_that_may_not_be_written(disk: Any):
    folder, protect, _ = disk
    saver = Saver(folder)
    assert tried(saver, 1) is None
    protect(True)
    error = tried(saver, 2)
    assert isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES) and newest_good(folder) == saver.latest
    protect(False)
    assert tried(saver, 3) is None


def test_a_folder_that_is_gone(tmp_path: Path):
    saver = Saver(tmp_path / "run" / "checkpoints")
    (tmp_path / "run").mkdir()
    assert tried(saver, 1) is None
    shutil.rmtree(tmp_path / "run")
    assert isinstance(tried(saver, 2), FileNotFoundError) and not files(tmp_path)
    (tmp_path / "run").write_text("a file")
    assert isinstance(tried(saver, 3), OSError)
    (tmp_path / "run").unlink(); (tmp_path / "run").mkdir()
    assert tried(saver, 4) is None and newest_good(saver.folder) == saver.latest


@pytest.mark.parametrize("what", ["write_tensors", "flush_folder", "sealed"])
def test_a_write_that_fails_in_the_middle(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saver = Saver(tmp_path)
    assert tried(saver, 1) is None
    def fail(*given: Any) -> None:
        if what == "write_tensors": given[0].write(b"half")
        raise OSError(errno.EIO, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_room, what, fail)
        if what == "sealed": patch.setattr(checkpoint_room, "read_manifest", lambda path: {"number": 1})
        saver.save({"model": {"weight": torch.ones(9)}}, {"step": 2})
        saver.wait()
    error = saver.take_error()
    assert isinstance(error, OSError) and error.errno == errno.EIO and [p.name for p in listed(tmp_path)] == ["step-00000001"]
    assert not list(tmp_path.glob(".tmp*")) and tried(saver, 3) is None


# ---- which are kept ----

def several(folder: Path, losses: list[float | None]) -> list[Path]:
    "A checkpoint a loss."
    told = [{} if loss is None else {"monitors": {"valid_loss": loss}} for loss in losses]
    return [write_checkpoint(folder, {"model": {"step": torch.tensor(k)}}, {"step": k, **more}) for k, more in enumerate(told, start=1)]


def test_the_newest_goes_by_number_not_by_name_or_clock(tmp_path: Path):
    first, second, third = [write_checkpoint(tmp_path, {"model": {}}, {"step": step}) for step in (900, 5, 5)]
    os.utime(first, (2e9, 2e9))
    assert [p.name for p in listed(tmp_path)] == ["step-00000005-1", "step-00000005", "step-00000900"] and newest_good(tmp_path) == third
    assert [verify(p)["number"] for p in (first, second, third)] == [1, 2, 3]


def test_last_and_best_are_kept(tmp_path: Path):
    paths = several(tmp_path, [0.5, 0.1, 0.4, None, 0.1, 0.9, 0.8])
    assert best_good(tmp_path) == paths[1] and best_good(tmp_path, sign=1) == paths[5]
    assert set(prune(tmp_path, last=2, best=2)) == {paths[0], paths[2], paths[3]}
    assert set(listed(tmp_path)) == {paths[k] for k in (1, 4, 5, 6)} and prune(tmp_path, last=2, best=2) == []
    assert prune(tmp_path, last=1, best=0) == [paths[5], paths[4], paths[1]] and listed(tmp_path) == [paths[6]]
    with pytest.raises(ValueError, match="last=0"): prune(tmp_path, last=0)
    for bad in ({"last": 0}, {"best": -1}):
        with pytest.raises(ValueError, match="last is at least 1"): Saver(tmp_path, **bad)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "metadata.json", "state.json"])
def test_a_damaged_one_is_left_where_it_is(name: str, tmp_path: Path):
    paths = several(tmp_path, [0.1, 0.2, 0.3, 0.4])
    data = (paths[0] / name).read_bytes()
    (paths[0] / name).write_bytes(data[:-1] + b"x")
    named = pytest.warns(RuntimeWarning, match=f"step-00000001.*{name}")
    with named: assert best_good(tmp_path) == paths[1]
    with named if name == "manifest.json" else contextlib.nullcontext():  # it may be the newest: nobody knows
        assert newest_good(tmp_path) == paths[3]
    removed = prune(tmp_path, last=1, best=0)
    assert removed == [paths[2], paths[1]] and set(listed(tmp_path)) == {paths[0], paths[3]}
    assert (paths[0] / name).read_bytes() == data[:-1] + b"x"
    for p in paths[3].iterdir(): p.write_bytes(b"")
    with pytest.warns(RuntimeWarning) as caught: assert newest_good(tmp_path) is None
    assert len(caught) == 2 and len(listed(tmp_path)) == 2


def test_none_is_removed_before_the_newer_one_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    order: list[tuple[str, str]] = []
    def noted(what: str, function: Any) -> Any:
        return lambda path, *rest: (order.append((what, path.name)), function(path, *rest))[1]
    monkeypatch.setattr(saver_room, "verify", noted("verified", verify))
    monkeypatch.setattr(checkpoint_room, "remove", noted("removed", checkpoint_room.remove))
    saver = Saver(tmp_path, last=1, best=0)
    for step in (1, 2, 3): assert tried(saver, step) is None
    assert order == [("verified", "step-00000001"), ("verified", "step-00000002"), ("removed", "step-00000001"),
                     ("verified", "step-00000003"), ("removed", "step-00000002")]


def test_one_that_turns_out_damaged_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saver = Saver(tmp_path, last=1, best=0)
    assert tried(saver, 1) is None
    def bad(*given: Any) -> Path:
        path = write_checkpoint(*given)
        (path / "model.safetensors").write_bytes(b"the disk lies")
        return path
    monkeypatch.setattr(saver_room, "write_checkpoint", bad)
    saver.save({"model": {"weight": torch.ones(3)}}, {"step": 2})
    saver.wait()
    error = saver.take_error()
    assert isinstance(error, ValueError) and "step-00000002/model.safetensors is damaged" in str(error)
    assert saver.latest.name == "step-00000001"
    with pytest.warns(RuntimeWarning, match="step-00000002"): assert newest_good(tmp_path) == saver.latest
    monkeypatch.undo()
    assert tried(saver, 3) is None and {p.name for p in listed(tmp_path)} == {"step-00000003", "step-00000002"}


# ---- in the background ----

def test_what_is_saved_does_not_move_with_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hold = threading.Event()
    monkeypatch.setattr(saver_room, "write_checkpoint", lambda *given: (hold.wait(10), write_checkpoint(*given))[1])
    model, counts, metadata = net(), [1, 2], {"step": 1, "monitors": {"valid_loss": 1.0}}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(5, 4)).sum().backward(); optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "counts": counts}
    before = read_file(write_file(tmp_path / "before", state))
    saver = Saver(tmp_path / "checkpoints")
    saver.save(state, metadata)
    assert saver.busy and saver.stalled < 5
    optimizer.step(); counts.append(3); metadata["monitors"]["valid_loss"] = 2.0
    with torch.no_grad():
        for p in model.parameters(): p.fill_(7)
    hold.set()
    saver.wait()
    back, told = read_checkpoint(saver.latest)
    assert same(back, before) and told["monitors"]["valid_loss"] == 1.0 and not saver.busy and saver.seconds >= saver.stalled > 0


def test_one_save_at_a_time_and_its_buffers_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    running, most = [], []
    def slow(*given: Any) -> Path:
        running.append(1); most.append(len(running))
        time.sleep(0.1)
        path = write_checkpoint(*given)
        running.pop()
        return path
    monkeypatch.setattr(saver_room, "write_checkpoint", slow)
    saver = Saver(tmp_path, last=9, best=0)
    weight, places = torch.zeros(1000), set()
    for step in range(1, 5):
        weight += 1
        saver.save({"model": {"weight": weight}}, {"step": step})
        places.add(saver.host.buffers["model.weight"].data_ptr())
        assert saver.stalled > 0.08 or step == 1  # it waited for the one before
    saver.wait()
    assert most == [1] * 4 and len(places) == 1 and saver.take_error() is None
    assert [read_checkpoint(p)[0]["model"]["weight"][0].item() for p in listed(tmp_path)] == [4, 3, 2, 1]


def test_a_program_that_ends_waits_for_its_last_checkpoint(tmp_path: Path, call: Any):
    call(sys.executable, "-c", "import sys, torch\nfrom arc_nb.engine.saver import Saver\n"
         "Saver(sys.argv[1]).save({'model': {'weight': torch.ones(3_000_000)}}, {'step': 1})", tmp_path)
    assert [p.name for p in listed(tmp_path)] == ["step-00000001"] and verify(newest_good(tmp_path))


# ---- other formats ----

def test_there_is_a_checkpoint_and_a_model_of_every_format():
    names = {p.name.split(".")[0] for p in FORMATS.iterdir()}
    for number in range(1, FORMAT + 1): assert {f"{number}", f"{number}-model"} <= names


@pytest.mark.parametrize("name", ["1.pt", "2", "2.pt", "2-compressed"])
def test_checkpoints_of_every_format_are_read(name: str):
    state, metadata = read_checkpoint(FORMATS / name)
    assert metadata["format"] == int(name[0]) and (metadata["step"], metadata["epoch"]) == (state["step"], state["epoch"]) == (6, 2)
    model = net()
    model.load_state_dict(state["model"])
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(state["optimizer"])
    assert model[0].weight[0].tolist() == pytest.approx([0.0135, 0.2102, -0.3847, -0.3625], abs=1e-4)
    assert optimizer.state_dict()["state"][0]["step"] == 6 and state["random"]["torch"].dtype == torch.uint8
    assert same(state, read_checkpoint(FORMATS / "2")[0] | {"model": state["model"]})


@pytest.mark.parametrize("name", ["1-model.pt", "2-model.safetensors"])
def test_saved_models_of_every_format_are_read(name: str):
    saved = read_file(FORMATS / name)
    net().load_state_dict(saved["model"])
    assert saved["settings"]["loss"] == "cross_entropy" and saved["step"] == 6


def test_a_later_format_is_told_apart_from_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import arc_nb.engine.packing as packing_room
    for room in (packing_room, checkpoint_room): monkeypatch.setattr(room, "FORMAT", FORMAT + 1)
    path, file = write_checkpoint(tmp_path, {"model": {}}, {"step": 1}), write_file(tmp_path / "file", {})
    torch.save({"format": 3}, tmp_path / "old")
    monkeypatch.undo()
    for read, what in ((verify, path), (read_checkpoint, path), (read_file, file)):
        with pytest.raises(ValueError, match=f"has format {FORMAT + 1}, and this version reads up to {FORMAT}: update arc_nb"): read(what)
    for read in (read_file, read_checkpoint):
        with pytest.raises(FileNotFoundError, match="nowhere"): read(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="format"): read(tmp_path / "old")
    (tmp_path / "old").write_bytes(safetensors.torch.save({"a": torch.ones(1)}))
    with pytest.raises(ValueError, match="no file of arc_nb"): read_file(tmp_path / "old")
    structure, tensors = pack({"a": torch.ones(1)})
    assert same(unpack(structure, tensors), {"a": torch.ones(1)})
