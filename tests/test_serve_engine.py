"""The decode thread: a text is what it would be alone, whatever joins and leaves beside it."""

import queue
import random
import threading

import numpy as np
import pytest
import torch
from serving import report

from mhesa import GatedExponentialSmoothingLM
from mhesa.inference.continuation import Continuation, TextCursor
from mhesa.inference.decoder import Decoder
from mhesa.inference.sampling import Sampling, TokenSampler
from mhesa.serve.engine.decode_thread import DecodeThread
from mhesa.serve.engine.jobs import Busy, Job, Stopped

PIECES, END = [*(bytes([65 + index]) for index in range(23)), b""], 23
GREEDY, DRAWN = Sampling(temperature=0), Sampling(temperature=2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GatedExponentialSmoothingLM(num_tokens=24, dim=16, depth=2, heads=2, dim_mhesa=8).eval()
    with torch.no_grad():
        model.to_logits.weight[-1] = -1.0  # Texts end now and then, not at once.
    return model


class Faulty(Decoder):
    """A decoder that raises whenever a token is among those it is given."""

    poison = 22

    def step(self, ids, state):
        # The state is half changed when it fails.
        if (ids == self.poison).any():
            state.mul_(3)
            raise RuntimeError("poisoned")
        return super().step(ids, state)

    def prefill(self, ids, state):
        if any((sequence == self.poison).any() for sequence in ids):
            raise RuntimeError("poisoned")
        return super().prefill(ids, state)


class Bench:
    """An engine and a queue of the jobs that it has done with."""

    def __init__(self, model, slots=8, decoder=Decoder, **settings):
        self.told = queue.Queue()
        self.engine = DecodeThread(
            decoder(model, max_batch=slots),
            notify=lambda jobs: [self.told.put(job) for job in jobs if job.done],
            **settings,
        )

    def run(self, jobs):
        self.engine.submit(jobs)
        self.wait(len(jobs))

    def wait(self, count):
        return [self.told.get(timeout=60) for _ in range(count)]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.engine.close()


# What never ends by itself.
ENDLESS = Sampling(temperature=0, logit_bias={END: -100})


def job(ids, sampling=GREEDY, seed=0, limit=50, n=1, **settings):
    return Job(
        np.array(ids, np.uint16), [text(sampling, seed + index, limit) for index in range(n)], **settings
    )


def text(sampling, seed, limit):
    return Continuation(TokenSampler(sampling, seed), limit, end=END, decode=PIECES.__getitem__)


def texts(job):
    return [TextCursor(text).read()[0].encode() for text in job.texts]


def alone(model, ids, sampling=GREEDY, seed=0, limit=50):
    with Bench(model, slots=1) as bench:
        solo = job(ids, sampling, seed, limit)
        bench.run([solo])
        return texts(solo)[0]


def greedy(model, ids, limit):
    """The likeliest text, by whole passes of the model."""
    ids, text = list(ids), b""
    for _ in range(limit):
        token = model(torch.tensor([ids]))[0, -1].argmax().item()
        if token == END:
            break
        ids.append(token)
        text += PIECES[token]
    return text


def test_a_greedy_text_equals_that_of_whole_passes(model):
    for ids in ([23, 1, 2], [23], [23, *range(20)]):
        assert alone(model, ids) == greedy(model, ids, 50)


def test_a_token_that_the_tokenizer_lacks_is_never_drawn(model):
    ids = [END, 1, 2]
    with Bench(model, num_tokens=10) as bench:
        found = job(ids, sampling=GREEDY)
        bench.run([found])
    for _ in range(50):
        ids.append(model(torch.tensor([ids]))[0, -1, :10].argmax().item())
    assert texts(found) == [b"".join(map(PIECES.__getitem__, ids[3:]))]


def churn(model, count, slots):
    """Jobs of uneven lengths that join as others leave, some of them cancelled: each and its text."""
    random.seed(count)
    recipes = [
        ([23, *random.choices(range(22), k=random.randrange(40))], seed, random.randrange(1, 60))
        for seed in range(97)
    ]
    expected = [alone(model, ids, DRAWN, seed, limit) for ids, seed, limit in recipes]
    with Bench(model, slots=slots, queue=2 * count) as bench:
        jobs = []
        for index in range(count):
            ids, seed, limit = recipes[index % len(recipes)]
            jobs.append(job(ids, DRAWN, seed, limit, client=str(index % 3)))
        bench.engine.submit(jobs[: count // 2])
        doomed = [job([23, 3], limit=10**9, client="doomed") for _ in range(count // 10)]
        for index, one in enumerate(jobs[count // 2 :]):
            bench.engine.submit([one])
            if index % 5 == 0 and doomed:
                bench.engine.submit([doomed[-1]])
                bench.engine.cancel(doomed.pop())
        bench.wait(count)
        free = bench.engine.slots.states.isnan().all()
    assert free
    for index, one in enumerate(jobs):
        assert one.error is None
        assert texts(one) == [expected[index % len(recipes)]]


def test_slots_are_used_again_without_a_trace(model):
    churn(model, 300, slots=8)


@pytest.mark.torture
def test_ten_thousand_joins_and_leaves_without_a_trace(model):
    churn(model, 10_000, slots=64)
    report(
        "10,000 joins and leaves beside 1,000 cancelled, free slots full of NaN",
        "each text that of its run alone",
    )


def test_a_long_prompt_is_read_in_pieces(model):
    ids = [23, *np.random.default_rng(0).integers(0, 22, 5000).tolist()]
    assert alone(model, ids, limit=20) == greedy(model, ids, 20)


def test_several_texts_of_a_prompt_are_those_of_their_seeds(model):
    with Bench(model) as bench:
        many = job([23, 5], DRAWN, seed=7, n=5)
        bench.run([many])
    assert texts(many) == [alone(model, [23, 5], DRAWN, 7 + index) for index in range(5)]


def test_scores_are_those_of_a_whole_pass(model):
    ids = [23, *np.random.default_rng(1).integers(0, 22, 1500).tolist()]
    with Bench(model) as bench:
        scored = Job(np.array(ids, np.uint16), [], score=True, top=2)
        bench.run([scored])
    logprobs = model.double()(torch.tensor([ids]))[0, :-1].log_softmax(-1)
    model.float()
    expected = logprobs[torch.arange(1500), torch.tensor(ids[1:])]
    assert torch.allclose(torch.from_numpy(scored.logprobs), expected, atol=1e-4)
    assert [top[0][0] for top in scored.likeliest] == logprobs.argmax(-1).tolist()


def test_a_state_that_is_kept_continues_the_text(model):
    whole = job([23, 1, 2], DRAWN, seed=3, limit=40)
    first = job([23, 1, 2], DRAWN, seed=3, limit=15, keep_state=True)
    with Bench(model) as bench:
        bench.run([whole])
        bench.run([first])
        rest = text(DRAWN, None, 25)
        rest.sampler = first.texts[0].sampler
        rest = Job(np.array([first.texts[0].last]), [rest], state=first.state)
        bench.run([rest])
    assert texts(first)[0] + texts(rest)[0] == texts(whole)[0]


@pytest.mark.parametrize("where", ["prompt", "text"])
def test_a_step_that_raises_fails_its_request_alone(model, where):
    fine = [job([23, index], DRAWN, seed=index, limit=200) for index in range(5)]
    expected = [alone(model, [23, index], DRAWN, index, 200) for index in range(5)]
    spoiled = {index for index, text in enumerate(expected) if PIECES[22] in text[:-1]}
    bad = job([23, 22], limit=400)
    if where == "text":
        bad = job([23, 1], Sampling(logit_bias={22: 1000}), limit=400)
    with Bench(model, decoder=Faulty) as bench:
        bench.run([fine[0], fine[1], bad, *fine[2:]])
        assert isinstance(bad.error, RuntimeError)
        for index, one in enumerate(fine):
            assert (one.error is not None) == (index in spoiled)
            if index not in spoiled:
                assert texts(one) == [expected[index]]
        assert bench.engine.failures == 1 + len(spoiled)
        assert bench.engine.slots.states.isnan().all()
    assert len(spoiled) < 5


def test_a_state_of_no_numbers_fails_its_request_alone(model):
    fine = job([23, 4], DRAWN, seed=1)
    bad = job([23, 4], state=torch.full_like(model.initial_state(1), torch.nan))
    with Bench(model) as bench:
        bench.run([bad, fine])
    assert isinstance(bad.error, ArithmeticError)
    assert texts(fine) == [alone(model, [23, 4], DRAWN, 1)]


def test_a_full_queue_refuses(model):
    with Bench(model, slots=2, queue=4) as bench:
        forever = [job([23, 3], ENDLESS, limit=10**9, client="a") for _ in range(4)]
        bench.engine.submit(forever[:2])
        bench.engine.submit(forever[2:])
        with pytest.raises(Busy):
            bench.engine.submit([job([23], client="a")])
        bench.engine.submit([job([23], client="b"), job([23], client="b")])
        with pytest.raises(Busy):
            bench.engine.submit([job([23], client="c")])


def test_clients_take_turns(model):
    order = []
    with Bench(model, slots=1, queue=100) as bench:
        jobs = [job([23], limit=3, client="many") for _ in range(20)] + [job([23], limit=3, client="one")]
        bench.engine.submit(jobs)
        order = [one.client for one in bench.wait(21)]
    assert order.index("one") <= 2


def test_closing_fails_open_requests_and_takes_no_more(model):
    bench = Bench(model, slots=1)
    jobs = [job([23], ENDLESS, limit=10**9) for _ in range(3)]
    bench.engine.submit(jobs)
    threading.Timer(0.2, bench.engine.close).start()
    done = bench.wait(3)
    assert all(isinstance(one.error, Stopped) for one in done if one.error)
    assert jobs[0].error is not None
    with pytest.raises(Stopped):
        bench.engine.submit([job([23])])
