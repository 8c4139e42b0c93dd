"""`ll.AdapterStore`: a folder of adapters, the least recently used of which leave the model."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing.case import randomise

N = 5


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


@pytest.fixture
def folder(tmp_path):
    """Adapters a0 to a4, the last one in PEFT's layout; what each makes of `X` alone."""
    made, want = model(), {}
    for i in range(N):
        ll.attach(made, ll.LoRAConfig(r=2, alpha=3, target_names=("0", "2")), name=f"a{i}")
        randomise(made, f"a{i}", seed=i, scale=0.5)
        with torch.no_grad():
            want[f"a{i}"] = made(X)
        if i < N - 1:
            ll.save(made, tmp_path / f"a{i}.safetensors", f"a{i}")
        else:
            ll.export(made, tmp_path / f"a{i}", name=f"a{i}")
    return tmp_path, want


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def run(m, x=X):
    with torch.no_grad():
        return m(x)


def test_adapters_come_when_they_are_used_and_the_oldest_leave(folder):
    place, want = folder
    m = model()
    bare = run(m)
    store = ll.AdapterStore(m, place, resident=2)
    assert store.names() == [f"a{i}" for i in range(N)]
    for name in ("a0", "a1", "a0", "a2", "a4"):
        with store.active(name):
            assert torch.allclose(run(m), want[name], atol=1e-6)
        assert torch.equal(run(m), bare)
    assert store.resident == ["a2", "a4"] == list(ll.adapters(m))
    assert (store.hits, store.misses, store.evictions) == (1, 4, 2)
    with store.rows(["a4", None, "a3", "a4"]):
        mixed = run(m)
    for i, name in enumerate(("a4", None, "a3", "a4")):
        assert torch.allclose(mixed[i], (bare if name is None else want[name])[i], atol=1e-6)
    assert store.resident == ["a4", "a3"]
    store.close()
    assert not ll.adapters(m) and torch.equal(run(m), bare)


def test_a_hit_makes_an_adapter_the_most_recent(folder):
    m = model()
    store = ll.AdapterStore(m, folder[0], resident=2)
    for name in ("a0", "a1", "a0", "a2"):
        with store.active(name):
            pass
    assert store.resident == ["a0", "a2"]


def test_other_adapters_stay_and_the_selection_is_as_before(folder):
    m = model()
    ll.attach(m, ll.LoRAConfig(r=3, alpha=2, target_names=("0",)), name="mine")
    randomise(m, "mine")
    mine = run(m)
    store = ll.AdapterStore(m, folder[0], resident=1)
    for name in ("a0", "a1"):
        with store.active(name):
            assert torch.allclose(run(m), folder[1][name], atol=1e-6)
        assert torch.equal(run(m), mine)
    assert list(ll.adapters(m)) == ["mine", "a1"]
    ll.detach(m, "a1")  # by hand: it is loaded again
    with store.active("a1"):
        assert torch.allclose(run(m), folder[1]["a1"], atol=1e-6)


def test_what_cannot_be_had_raises_and_changes_nothing(folder):
    place, m = folder[0], model()
    store = ll.AdapterStore(m, place, resident=2)
    with store.active("a0"):
        pass
    (place / "bad.safetensors").write_bytes(b"no adapter")
    for names, error, match in (
        (["a1", "bad"], ll.FileError, "bad.safetensors"),
        (["a1", "b7"], ll.FileError, "holds no adapter 'b7'"),
        (["../a1"], ll.FileError, "holds no adapter"),
        (["a0", "a1", "a2"], ll.SelectionError, "resident=3"),
    ):
        with pytest.raises(error, match=match), store.rows(names):
            pass
        assert store.resident == ["a0"] == list(ll.adapters(m))
    ll.save(model_with("a3"), place / "bad.safetensors", "a3")  # mended: it is read again
    with store.active("bad"):
        pass
    with pytest.raises(ll.ConfigError, match="at least 1"):
        ll.AdapterStore(m, place, resident=0)
    with pytest.raises(ll.FileError, match="is no folder"):
        ll.AdapterStore(m, place / "none")


def model_with(name: str) -> nn.Module:
    m = model()
    ll.attach(m, ll.LoRAConfig(r=2, alpha=3, target_names=("0",)), name=name)
    return m


def test_a_changed_file_is_read_again_after_evict(folder):
    place, want = folder
    m = model()
    store = ll.AdapterStore(m, place)
    with store.active("a0"):
        pass
    (place / "a1.safetensors").replace(place / "a0.safetensors")
    store.evict("a0")
    with store.active("a0"):
        assert torch.allclose(run(m), want["a1"], atol=1e-6)


def test_threads_take_turns_each_under_its_own_selection(folder):
    place, want = folder
    m = model()
    store, wrong = ll.AdapterStore(m, place, resident=2), []

    def serve(k: int) -> None:
        for i in range(12):
            name = f"a{(k * 3 + i) % N}"
            store.prefetch([f"a{(k * 3 + i + 1) % N}"])
            try:
                with store.active(name):
                    if not torch.allclose(run(m), want[name], atol=1e-6):
                        wrong.append((k, i))
            except Exception as e:
                wrong.append((k, i, repr(e)))

    threads = [threading.Thread(target=serve, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert store.hits + store.misses == 48 and len(store.resident) == 2
    store.close()


def test_files_are_read_while_a_block_runs(folder):
    m = model()
    store = ll.AdapterStore(m, folder[0])
    with store.active("a0"):
        store.prefetch(["a1"])
        record, _ = store._reading["a1"].result(timeout=60)  # which would never come if reading waited for the turn
        assert record.name == "a1" and list(ll.adapters(m)) == ["a0"]
    with store.active("a1"):
        assert torch.allclose(run(m), folder[1]["a1"], atol=1e-6)


def test_a_block_inside_a_block_may_use_what_is_there_only(folder):
    m = model()
    store = ll.AdapterStore(m, folder[0], resident=2)
    with store.active("a0"):
        pass
    with store.active("a1"):
        with store.active("a0"):
            assert torch.allclose(run(m), folder[1]["a0"], atol=1e-6)
        with pytest.raises(ll.SelectionError, match="leave the block"), store.active("a2"):
            pass
        assert torch.allclose(run(m), folder[1]["a1"], atol=1e-6)
