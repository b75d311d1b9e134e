"""What `python -m benchmarks learning` measures, on models whose figures are known."""

import json
import math

import pytest
import torch
from torch import nn

from benchmarks.contestants import CHOICES, LSTM, RECIPES, Recipe, Transformer
from benchmarks.learning import (
    CONTEXTS,
    NUM_TOKENS,
    POSITIONS,
    Text,
    bench_text,
    loss_by_context,
    loss_by_position,
    loss_in_windows,
    train,
)
from benchmarks.plots import draw_all
from benchmarks.probes import PROBES, QUERY, accuracy
from mhesa import GatedExponentialSmoothingLM
from mhesa.errors import InputError
from mhesa.model.loss import IGNORED_LABEL


class Uniform(nn.Module):
    """All tokens are equally likely."""

    def forward(self, ids):
        return torch.zeros(*ids.shape, NUM_TOKENS)


class Oracle(nn.Module):
    """Answers a probe by looking the answer up."""

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, NUM_TOKENS)
        for row, text in enumerate(ids.tolist()):
            if text[-1] == QUERY:
                (answer,) = [byte for byte in text if byte < 2]
            else:
                answer = text[text.index(text[-1]) + 1]
            logits[row, -1, answer] = 1
        return logits


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("vary", [False, True])
def test_a_probe_has_one_answer(name, vary):
    ids, targets = PROBES[name].batch(3, 50, vary=vary)
    assert (targets[:, :-1] == IGNORED_LABEL).all()
    assert torch.equal(Oracle()(ids)[:, -1].argmax(-1), targets[:, -1])
    places = (ids == targets[:, -1:]).int().argmax(1)
    assert len(places.unique()) > 1 if vary else places.max() < 8


@pytest.mark.parametrize(("name", "distance"), [("latch", 0), ("latch", 40), ("recall", 40)])
def test_accuracy_is_that_of_the_model(name, distance):
    assert accuracy(Oracle(), PROBES[name], distance) == 1
    assert accuracy(Uniform(), PROBES[name], distance) < 0.7


def test_losses_are_those_of_the_model():
    text, nats = torch.randint(256, (3 * 4096,)), pytest.approx(math.log(NUM_TOKENS), rel=1e-6)
    assert loss_in_windows(Uniform(), text, 100) == nats
    contexts = loss_by_context("uniform", Uniform(), text, places=3)
    assert [row.context for row in contexts] == list(CONTEXTS)
    positions = loss_by_position("uniform", Uniform(), text, 4096)
    assert [(row.first, row.last) for row in positions] == [(0, 2048), (2048, 4096)]
    assert [row.loss for row in (*contexts, *positions)] == [nats] * (len(contexts) + 2)
    assert [row.over_short for row in positions] == [pytest.approx(1)] * 2


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("learning") / "text.txt"
    path.write_text("".join(f"line {index} of a text, {index * index}\n" for index in range(50_000)))
    return Text([str(path)], held_out_bytes=POSITIONS + 1)


SMALL = {
    "ours": Recipe(
        lambda n: GatedExponentialSmoothingLM(
            num_tokens=n, dim=16, depth=1, heads=4, dim_mhesa=16, adaptive=True, conv_size=4
        ),
        3e-3,
        0.02,
    ),
    "transformer": Recipe(lambda n: Transformer(n, dim=16, depth=1, heads=2), 3e-3, 0.02),
    "LSTM": Recipe(lambda n: LSTM(n, dim=8, depth=1, width=8), 3e-3),
}


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("a few words\n" * 5000)
    with pytest.raises(InputError, match="give more text"):
        Text([str(tmp_path / "text.txt")])


def test_every_model_learns_within_its_budget(text):
    for run, _ in bench_text(text, SMALL, seed=1, steps=8):
        assert (run.steps, run.seed) == (8, 1)
        assert run.long < math.log(NUM_TOKENS)
    _, steps, seconds = train(SMALL["LSTM"], text.batches(0), seed=0, seconds=0.2)
    assert steps >= 1
    assert seconds >= 0.2


def test_the_contestants_are_of_one_size():
    sizes = {name: sum(p.numel() for p in recipe.build(257).parameters()) for name, recipe in RECIPES.items()}
    assert max(sizes.values()) < 1.32 * min(sizes.values())
    assert RECIPES["adaptive"].at(2.0).muon == 2 * RECIPES["adaptive"].muon
    assert RECIPES["LSTM"].at(2.0).adamw == 2 * RECIPES["LSTM"].adamw


def test_a_choice_changes_one_thing(text):
    ours = RECIPES["adaptive"]
    assert CHOICES["half of Muon's learning rate"].at(2.0).muon == ours.muon
    inputs, targets = text.batches(0, CHOICES["windows of 512"].context)(0)
    assert inputs.shape == targets.shape == (8, 512)
    torch.manual_seed(0)
    layers = {name: recipe.build(NUM_TOKENS).layers[0].mhesa for name, recipe in CHOICES.items()}
    assert layers["64 heads"].heads == 64
    slowest = {
        name: (-1 / torch.log1p(-layer.alphas.sigmoid())).max().item() for name, layer in layers.items()
    }
    assert slowest["16 heads"] == pytest.approx(300, rel=1e-3)
    assert slowest["time constants up to 30"] == pytest.approx(30, rel=1e-3)
    assert slowest["initial rates of the original"] < 30


def test_a_transformer_looks_back_only():
    torch.manual_seed(0)
    model = Transformer(NUM_TOKENS, dim=16, depth=2, heads=2).eval()
    ids = torch.randint(256, (1, 20))
    whole = model(ids)
    torch.testing.assert_close(model(ids[:, :12]), whole[:, :12])


def test_pictures_are_drawn_of_saved_results(tmp_path):
    assert draw_all(tmp_path, tmp_path) == []
    run = {"recipe": "adaptive", "short": 1.2, "budget": "600 steps"}
    tables = {
        "runs": [run, run | {"short": 1.3}, run | {"recipe": "LSTM"}],
        "positions": [{"recipe": "adaptive", "last": 2048, "over_short": 0.97}],
        "contexts": [{"recipe": "adaptive", "context": 8, "loss": 1.3}],
        "recollection": [{"probe": "latch", "recipe": "LSTM", "distance": 10, "accuracy": 1, "chance": 0.5}],
    }
    (tmp_path / "machine").mkdir()
    for name in ("learning_tokens", "learning_minutes", "learning_latch"):
        (tmp_path / "machine" / f"{name}.json").write_text(json.dumps({"tables": tables}))
    drawn = draw_all(tmp_path, tmp_path)
    assert [path.name for path in drawn] == [
        "learning-loss.svg",
        "learning-context.svg",
        "learning-memory.svg",
    ]
    before = [path.read_bytes() for path in drawn]
    draw_all(tmp_path, tmp_path)
    assert [path.read_bytes() for path in drawn] == before
    assert "1.250" in drawn[0].read_text()
