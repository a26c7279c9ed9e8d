"""What every folder stands on: errors that name the extra, whole files, modes put back, provenance."""

import copy
import os

import pytest
import torch
from torch import nn

from tdlib import memory
from tdlib.errors import FileError, MemoryLimitError, TdlibError, needs, unknown
from tdlib.files import write_atomic
from tdlib.network import Provenance, attach, evaluating, fingerprint, provenance


def test_of_many_valid_names_only_the_nearest_are_listed():
    message = str(unknown("model", "net7x", [f"net{i}" for i in range(1000)]))
    assert message.startswith("unknown model 'net7x'. Nearest of the 1000: net7") and len(message) < 100


def test_a_missing_package_names_the_extra():
    assert needs("os.path", "train") is os.path
    with pytest.raises(TdlibError, match=r"this needs nowhere, which .* pip install 'tdlib\[book\]'"):
        needs("nowhere.inside", "book")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_atomic(path, b"one", memoryview(b"two"))
    assert path.read_bytes() == b"onetwo"

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"cannot write .*No space left.*unchanged"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"onetwo" and list(tmp_path.iterdir()) == [path]


def test_every_module_gets_its_mode_back_also_after_an_error():
    net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    net[1].eval()
    with pytest.raises(RuntimeError), evaluating(net):
        assert not any(module.training for module in net.modules())
        raise RuntimeError
    assert net.training and net[0].training and not net[1].training


def test_provenance_stays_with_the_network_and_its_copies():
    net = nn.Linear(2, 2)
    assert provenance(net) == Provenance()
    attach(net, Provenance())
    provenance(net).report["seconds"] = 3.0
    other = copy.deepcopy(net)
    provenance(other).report["seconds"] = 4.0
    assert provenance(net).report == {"seconds": 3.0}
    assert net.state_dict().keys() == {"weight", "bias"}


def test_what_needs_more_memory_than_there_is_is_refused_with_the_way_out():
    memory.require(0.5 * memory.free(), "this", "never")
    with pytest.raises(MemoryLimitError, match=r"^the ring needs .*80 % of what is free.*: split it"):
        memory.require(0.9 * memory.free() + 2**30, "the ring", "split it")
    with pytest.raises(MemoryLimitError, match=r"3 GiB .*, 2 GiB may be used \(the limit given\)"):
        memory.require(3 * 2**30, "this", "do less", limit=2 * 2**30)


def test_a_container_s_share_bounds_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{2**20}\n")
    (tmp_path / "memory.stat").write_text(f"anon {2**18}\nfile {2**30}\n")
    assert memory.free() == 2**20 - 2**18
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free() > 2**20


def test_a_fingerprint_is_of_names_and_values():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    same = copy.deepcopy(net)
    assert fingerprint(net) == fingerprint(same) and len(fingerprint(net)) == 64
    with torch.no_grad():
        same[0].weight[0, 0] += 1e-6
    assert fingerprint(net) != fingerprint(same)
    assert fingerprint(net) != fingerprint(copy.deepcopy(net).double())
    same = copy.deepcopy(net)
    same[1].running_mean[0] = 1
    assert fingerprint(net) != fingerprint(same)
