"""What belongs to one call does not live on the model: threads call one model at once, and each output is that of the
call alone; what would change a call half way raises."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lora_lite as ll
import tiny_llm
from lora_lite.runtime.call import turns
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Snapshot, toy

LIMIT = 60.0


class Meeting:
    """Lets every thread that runs the model stop inside its call until all of them have come there."""

    def __init__(self, model: nn.Module, module: nn.Module, parties: int) -> None:
        self.barrier = threading.Barrier(parties, timeout=LIMIT)
        self.handle = module.register_forward_hook(self.wait)

    def wait(self, *_: object) -> None:
        self.barrier.wait()

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


class Stopped:
    """A call of the model in another thread that waits inside it."""

    def __init__(self, model: nn.Module, module: nn.Module, x: torch.Tensor) -> None:
        self.model, self.x, self.output = model, x, None
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.handle = module.register_forward_hook(self.wait)
        self.thread = threading.Thread(target=self.run)

    def wait(self, *_: object) -> None:
        if threading.current_thread() is self.thread:
            self.inside.set()
            assert self.go_on.wait(LIMIT)

    @torch.no_grad()
    def run(self) -> None:
        self.output = self.model(self.x)

    def __enter__(self) -> Stopped:
        self.thread.start()
        assert self.inside.wait(LIMIT)
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self.thread.join()
        self.handle.remove()


def all_at_once(works: list[Callable[[], object]]) -> list[BaseException]:
    errors: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return errors


def adapted(cfg: ll.AdapterConfig | None = None) -> nn.Module:
    model = toy()
    for i, name in enumerate("ab"):
        ll.attach(model, cfg or ll.LoRAConfig(r=3, alpha=7), name=name)
        randomise(model, name, seed=i)
    ll.activate(model, "a")
    return model


X = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(2))


def positioned(positions: str) -> tuple[nn.Module, list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """A language model whose adapter edits some tokens, batches padded differently, and what each gives alone."""
    model = tiny_llm.model()
    ll.attach(model, ll.LoReFTConfig(r=2, positions=positions))
    randomise(model)
    g, inputs = torch.Generator().manual_seed(0), []
    for n in (3, 5, 4, 2):
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[1, n:] = 0
        inputs.append({"input_ids": torch.randint(1, 30, (2, 6), generator=g), "attention_mask": mask})
    with torch.no_grad():
        return model.eval(), inputs, [model(**one, use_cache=False).logits for one in inputs]


@pytest.mark.parametrize("positions", ["f1+l1", "prompt"])
def test_each_call_has_its_own_positions(positions):
    model, inputs, want = positioned(positions)
    got: list[torch.Tensor | None] = [None] * len(inputs)

    @torch.no_grad()
    def work(i: int) -> None:
        got[i] = model(**inputs[i], use_cache=False).logits

    with Meeting(model, model.get_input_embeddings(), len(inputs)):
        assert not all_at_once([lambda i=i: work(i) for i in range(len(inputs))])
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_many_calls_at_once():
    model, inputs, want = positioned("f1+l1")
    wrong: list[int] = []

    @torch.no_grad()
    def work(i: int) -> None:
        for k in range(30):
            at = (i + k) % len(inputs)
            if not torch.equal(model(**inputs[at], use_cache=False).logits, want[at]):
                wrong.append(k)

    assert not all_at_once([lambda i=i: work(i) for i in range(4)])
    assert not wrong


def test_each_thread_has_its_own_prompts():
    model, inputs, _ = positioned("prompt")
    lengths, got = [(1, 2), (2, 1), (2, 2), (1, 1)], {}

    @torch.no_grad()
    def work(i: int) -> None:
        with ll.prompt(model, lengths[i]):
            got[i] = model(**inputs[i], use_cache=False).logits

    with Meeting(model, model.get_input_embeddings(), 4):
        assert not all_at_once([lambda i=i: work(i) for i in range(4)])
    together = dict(got)
    for i in range(4):
        work(i)
        assert torch.equal(together[i], got[i])
    with torch.no_grad(), ll.prompt(model, (1, 2)):  # around a thread that has no block itself
        found = []
        assert not all_at_once([lambda: found.append(torch.no_grad()(model)(**inputs[0], use_cache=False).logits)])
        assert torch.equal(found[0], got[0])


VERBS: dict[str, Callable[[nn.Module], object]] = {
    "activate": lambda m: ll.activate(m, "b"),
    "active": lambda m: ll.active(m, "b").__enter__(),
    "rows": lambda m: ll.rows(m, ["a", "b", None]).__enter__(),
    "attach": lambda m: ll.attach(m, ll.LoRAConfig(r=2), name="c"),
    "combine": lambda m: ll.combine(m, {"a": 1.0, "b": 0.5}, name="c"),
    "detach": lambda m: ll.detach(m, "a"),
    "detach all": lambda m: ll.detach(m),
    "rename": lambda m: ll.rename(m, "a", "c"),
    "merge": lambda m: ll.merge(m),
    "restore_dtype": lambda m: ll.adapters(m)["a"].restore_dtype(),
    "load_adapter_state_dict": lambda m: ll.load_adapter_state_dict(m, "a", ll.adapter_state_dict(m, "b")),
}


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_changes_while_another_thread_is_in_a_call(verb):
    model = adapted()
    with torch.no_grad():
        want = model(X)
    before = Snapshot(model, X)
    with Stopped(model, model.layers[0], X) as call:
        with pytest.raises(ll.SelectionError, match="another thread"):
            VERBS[verb](model)
    assert torch.equal(call.output, want)
    assert not (d := before.difference(model)), d
    VERBS[verb](model)


def test_the_end_of_a_block_leaves_a_running_call_alone():
    model = adapted()
    with torch.no_grad(), ll.active(model, "b"):
        want = model(X)
    with ll.active(model, "b"):
        call = Stopped(model, model.layers[0], X).__enter__()
    call.__exit__()
    assert torch.equal(call.output, want)


def test_outputs_are_of_one_selection_while_another_thread_selects():
    model, wanted = adapted(), {}
    for name in "ab":
        with torch.no_grad(), ll.active(model, name):
            wanted[name] = model(X)
    mixed, over = [], threading.Event()

    @torch.no_grad()
    def work() -> None:
        while not over.is_set():
            y = model(X)
            if not any(torch.equal(y, w) for w in wanted.values()):
                mixed.append(1)

    def select() -> None:
        for k in range(60):
            try:
                if k % 2:
                    ll.activate(model, "ab"[k // 2 % 2])
                else:
                    with ll.active(model, "b"):
                        pass
            except ll.SelectionError:
                pass
        over.set()

    assert not all_at_once([work, work, select])
    assert not mixed


def test_calls_wait_for_a_verb_in_another_thread():
    model = adapted()
    state, seen = model._lora_lite_state, []
    state.changing = -1
    thread = threading.Thread(target=lambda: seen.append(torch.no_grad()(model)(X)))
    thread.start()
    thread.join(0.2)
    assert not seen
    state.changing = None
    thread.join(LIMIT)
    assert len(seen) == 1


def test_a_call_that_failed_does_not_run():
    model = adapted()

    def fail(*_: object) -> None:
        raise RuntimeError("boom")

    handle = model.layers[1].register_forward_pre_hook(fail)
    assert [str(e) for e in all_at_once([lambda: model(X)])] == ["boom"]
    with pytest.raises(RuntimeError, match="boom"):
        model(X)
    handle.remove()
    ll.activate(model, "b")
    with torch.no_grad():
        part, whole = model.layers[0](X), model(X)
        with ll.active(model, "b"):
            assert torch.equal(whole, model(X)) and torch.equal(part, model.layers[0](X))


def test_a_block_inside_a_call_ends_with_the_block():
    """A forward that runs a reference pass itself."""
    model = adapted()
    with torch.no_grad():
        want = model(X)

    def reference(*_: object) -> None:
        with ll.active(model, None):
            model.layers[1].up(X)

    model.layers[0].register_forward_pre_hook(reference)
    with torch.no_grad():
        assert torch.equal(model(X), want)


def test_weights_that_a_broken_call_left_before_the_stored_ones():
    """Ctrl-C inside a layer: no hook of torch's runs after it."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for leave in ("detach", "another thread"):
        model = adapted(ll.HiRAConfig(r=3))
        layer = model.layers[0].up
        with torch.no_grad():
            want = model(X)
        stored = layer.weight
        handle = layer.register_forward_pre_hook(interrupted)
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            model(X)
        handle.remove()
        assert layer.weight is not stored
        if leave == "detach":
            ll.detach(model)
        else:
            got = []
            assert not all_at_once([lambda m=model, out=got: out.append(torch.no_grad()(m)(X))])
            assert torch.equal(got[0], want)
        assert layer.weight is stored and layer not in turns._holders
