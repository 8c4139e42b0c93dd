"""Rows belong to the batch of the whole model's call: a layer inside that sees another batch raises, or is told whose
its elements are; nothing is cut because it divides."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import toy

CFG = ll.LoRAConfig(r=3, alpha=7)


def adapted(model: nn.Module, *names: str) -> nn.Module:
    for i, name in enumerate(names or ("a", "b")):
        ll.attach(model.eval(), CFG, name=name)
        randomise(model, name, seed=i)
    return model


class Seeing(nn.Module):
    """Text with images: pixels (images, 8), owner (images,) is the text row of each."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.read, self.out = nn.Linear(8, 8), nn.Embedding(9, 8), nn.Linear(8, 5)

    def forward(self, ids, pixels, owner):
        return self.out(self.read(ids).sum(1).index_add(0, owner, self.see(pixels)))


def seen(tokens: int = 3):
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 9, (2, tokens), generator=g)
    return ids, torch.randn(4, 8, generator=g), torch.tensor([0, 0, 0, 1])


@pytest.mark.parametrize("tokens", [3, 2])  # with 2 the images are as many as the tokens of the batch
def test_images_are_no_rows(tokens):
    model, inputs = adapted(Seeing()), seen(tokens)
    with torch.no_grad(), ll.rows(model, ["a", "b"]), pytest.raises(ll.SelectionError, match=r"see.*owners="):
        model(*inputs)
    alone = {}
    for name in "ab":
        with torch.no_grad(), ll.active(model, name):
            alone[name] = model(*inputs)
    for owners in ([0, 0, 0, 1], inputs[2], {"see": inputs[2]}, {"see": [0, 0, 0, 1], ".*out": [0, 1]}):
        with torch.no_grad(), ll.rows(model, ["a", "b"], owners=owners):
            mixed = model(*inputs)
        for i, name in enumerate("ab"):
            torch.testing.assert_close(mixed[i], alone[name][i])
    assert (alone["a"] - alone["b"]).abs().max() > 0.1


def test_one_name_for_all_needs_no_owners():
    model, inputs = adapted(Seeing()), seen()
    with torch.no_grad():
        with ll.active(model, "a"):
            want = model(*inputs)
        with ll.rows(model, ["a", "a"]):
            torch.testing.assert_close(model(*inputs), want)


@pytest.mark.parametrize(
    "owners", [[0, 0, 2, 1], [0, -1], [], [0.5], [True, 0], {"see": [7]}, {"sea": [0]}, {"(": [0]}]
)
def test_owners_that_are_no_rows(owners):
    model = adapted(Seeing())
    with pytest.raises(ll.SelectionError, match="owners"), ll.rows(model, ["a", "b"], owners=owners):
        pass


def test_owners_of_another_length():
    model, inputs = adapted(Seeing()), seen()
    for owners in ([0, 0, 1], {"see": [0, 1]}, {"out": [0, 1, 1]}):
        with (
            torch.no_grad(),
            ll.rows(model, ["a", "b"], owners=owners),
            pytest.raises(ll.SelectionError, match="see|out"),
        ):
            model(*inputs)


def test_as_many_owners_as_rows_say_which_layers():
    """Two images of row 0 beside two rows: a list would be meant for the text as well."""
    model = adapted(Seeing())
    ids, pixels, _ = seen()
    inputs = ids, pixels[:2], torch.tensor([0, 0])
    with torch.no_grad(), ll.rows(model, ["a", "b"], owners=[0, 0]), pytest.raises(ll.SelectionError, match="owners"):
        model(*inputs)
    with torch.no_grad():
        with ll.rows(model, ["a", "b"], owners={"see": [0, 0]}):
            mixed = model(*inputs)
        with ll.active(model, "a"):
            torch.testing.assert_close(mixed[0], model(*inputs)[0])


class Windows(nn.Module):
    """Cuts (B, T, d) into windows (2 B, T/2, d) before its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)

    def forward(self, x):
        return self.up(x.reshape(-1, x.shape[1] // 2, 12)).reshape(*x.shape[:2], 20)


def test_windows_say_whose_they_are():
    model, x = adapted(Windows()), torch.randn(3, 4, 12)
    names = ["a", None, "b"]
    with torch.no_grad():
        with ll.rows(model, names), pytest.raises(ll.SelectionError, match="up.*batch of 3"):
            model(x)
        with ll.rows(model, names, owners=[0, 0, 1, 1, 2, 2]):
            mixed = model(x)
        for i, name in enumerate(names):
            with ll.active(model, name):
                torch.testing.assert_close(mixed[i], model(x)[i])


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)

    def forward(self, x):
        return self.up(x)


@pytest.mark.parametrize("tokens", [4, 6])
def test_time_first(tokens):
    model = adapted(TimeFirst())
    with ll.rows(model, ["a", "b"]), pytest.raises(ll.SelectionError, match="time first"):
        model(torch.randn(tokens, 2, 12))


def test_inputs_that_do_not_agree():
    """No name says which of them has the batch."""

    class Two(TimeFirst):
        def forward(self, x, y):
            return self.up(x).sum() + self.up(y).sum()

    model = adapted(Two())
    with ll.rows(model, ["a", "b"]), pytest.raises(ll.SelectionError, match="beside inputs of 2"):
        model(torch.randn(4, 5, 12), torch.randn(2, 5, 12))


def test_beams_and_flattened_tokens_are_the_models_own():
    model, names = adapted(toy()), ["b", None, "a"]
    ids = torch.randint(0, 17, (6, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with ll.rows(model, names):
            mixed = model(input_ids=ids)
        for i, name in enumerate(names):
            with ll.active(model, name):
                torch.testing.assert_close(mixed[2 * i : 2 * i + 2], model(input_ids=ids)[2 * i : 2 * i + 2])


def test_a_part_called_alone_has_its_own_batch():
    model, x = adapted(toy()), torch.randn(4, 5, 12)
    with torch.no_grad(), ll.rows(model, ["a", "b"]):
        assert model.layers[0](x[:2]).shape == (2, 5, 12)
        with pytest.raises(ll.SelectionError, match=r"layers\.0\.up"):
            model.layers[0](x)
