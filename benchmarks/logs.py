"""Which lines of a log stand out: faults put into real logs, found by surprisal and by other methods."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.log_faults import FAULTS, LOGS, Faulty, Log, put_in, read_log
from mhesa.inference.keyed_sessions import KeyedSessions
from mhesa.inference.line_scores import LineScores
from mhesa.inference.lines import PRESETS, Masks
from mhesa.inference.session import Reader
from mhesa.inference.statistics import BITS
from mhesa.model.loading import load
from mhesa.training.run import train
from mhesa.training.settings import TrainingSettings

FALSE_ALARMS = 0.01
# The last part of the normal lines, which no model is trained on.
HELD_OUT = 0.1
# Lines that are read together.
AT_ONCE = 256
# The longest context of the character model.
ORDER = 5
# Lines whose templates are counted together.
WINDOW = 10
MODELS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "fixed": {"smoothing": "fixed", "optimizer": "adamw", "heads": 8},
}

TIMES = Masks(presets=["times"])

# Maps lines to their scores, one each.
Method = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Found:
    """How many faults of a kind the methods find.

    Args:
        log: name of the log.
        kind: kind of the faults.
        faults: number of faulty lines.
        recall: by method, the share of them above the score that 1 % of the lines without faults are above.
    """

    log: str
    kind: str
    faults: int
    recall: dict[str, float]


@dataclass(frozen=True)
class Labelled:
    """How well a method's scores tell BGL's labelled alerts from other lines.

    Args:
        area: area under the receiver operating characteristic; 0.5 is chance.
    """

    method: str
    alerts: int
    area: float


def bench_logs(
    folder: Path, *, steps: int, models: Path | None = None, seeds: int = 1
) -> Iterator[tuple[str, Found | Labelled]]:
    """Put faults into the second half of each log, and find them after training on the first.

    Args:
        folder: folder of the logs.
        steps: largest number of training steps for each model.
        models: a folder of trained models, `<log>-<model>` each, in place of training.
        seeds: how often faults of each kind are put in, elsewhere each time; all are counted together.

    Yields:
        Rows with the name of their table.
    """
    for log in LOGS:
        lines, alerts = read_log(log, folder)
        half = len(lines) // 2
        normal = [line for line, alert in zip(lines[:half], alerts[:half], strict=True) if not alert]
        later = [line for line, alert in zip(lines[half:], alerts[half:], strict=True) if not alert]
        streams = {kind: [put_in(kind, log, later, seed) for seed in range(seeds)] for kind in FAULTS}
        recall: dict[str, dict[str, float]] = {kind: {} for kind in FAULTS}
        for name, method in _methods(log, normal, steps, models):
            threshold = np.quantile(method(later), 1 - FALSE_ALARMS)
            for kind, runs in streams.items():
                scores = [method(faulty.lines)[np.array(faulty.faults)] for faulty in runs]
                recall[kind][name] = float((np.concatenate(scores) > threshold).mean())
            if any(alerts):
                yield "alerts", _labelled(name, method, Faulty(lines[half:], alerts[half:]))
        for kind, runs in streams.items():
            yield "faults", Found(log.name, kind, sum(sum(faulty.faults) for faulty in runs), recall[kind])


def _labelled(name: str, method: Method, log: Faulty) -> Labelled:
    from scipy.stats import mannwhitneyu

    scores, alerts = method(log.lines), np.array(log.faults)
    area = mannwhitneyu(scores[alerts], scores[~alerts]).statistic / (alerts.sum() * (~alerts).sum())
    return Labelled(name, int(alerts.sum()), float(area))


def _methods(
    log: Log, normal: Sequence[str], steps: int, models: Path | None
) -> Iterator[tuple[str, Method]]:
    """Every method, having seen the normal lines."""
    trained = len(normal) - int(HELD_OUT * len(normal))
    for model, settings in MODELS.items():
        reader = _reader(log, model, normal, settings, steps, models)
        yield model, surprisal(log, reader, normal[trained:], keyed=False)
        yield f"{model}, by key", surprisal(log, reader, normal[trained:], keyed=True)
    yield "n-grams of characters", character_model(normal[:trained], normal[trained:])
    yield "rare words", rarity(lambda line: _masked(line).split(), normal)
    yield "rare characters", rarity(list, normal)
    yield from template_methods(normal)


def _reader(
    log: Log,
    model: str,
    normal: Sequence[str],
    settings: dict[str, Any],
    steps: int,
    models: Path | None,
) -> Reader:
    if models is not None:
        return Reader(*load(models / f"{log.name}-{model}"))
    with TemporaryDirectory() as name:
        text, out = Path(name) / "lines.txt", Path(name) / "model"
        text.write_text("\n".join(normal) + "\n")
        # A small text is soon learnt by heart: stop when the end of it is predicted no better.
        budget: dict[str, Any] = {
            "steps": steps,
            "holdout": f"tail:{HELD_OUT}",
            "eval_every": 25,
            "patience": 3,
            "dropout": 0.1,
            "device": "cpu",
        }
        train(TrainingSettings(out=str(out), sources=(str(text),), **budget, **settings))
        return Reader(*load(out))


def surprisal(log: Log, reader: Reader, before: Sequence[str], *, keyed: bool) -> Method:
    """The score of `mhesa score`, all lines in one session or each in that of its key.

    Args:
        before: lines that were not trained on and are read before.
    """

    def method(lines: Sequence[str]) -> np.ndarray:
        scores = LineScores()
        found = [
            _score(scores, line, bits)
            for part in (before, lines)
            for line, bits in zip(part, line_bits(log, reader, part, keyed), strict=True)
        ]
        return np.array(found[len(before) :])

    return method


def _score(scores: LineScores, line: str, bits: np.ndarray) -> float:
    """The score of a line of which times do not count.

    Args:
        scores: scores of the lines before.
        line: the line.
        bits: surprisal of each of its bytes, and of its line end if it is predicted, `(bytes,)`.
    """
    text = line.encode()
    counted = np.append(TIMES.counted(text, line), np.ones(len(bits) - len(text), dtype=bool))
    values = np.frombuffer(text + b"\n", np.uint8)[: len(bits)]
    return scores.score(values[counted].tobytes(), bits[counted])


def line_bits(log: Log, reader: Reader, lines: Sequence[str], keyed: bool) -> Iterator[np.ndarray]:
    """The surprisal of each byte of each line."""
    ids = reader.tokenizer.encode_batch([f"{line}\n".encode() for line in lines])
    keys = [(re.search(log.key, line) if keyed else None) for line in lines]
    names = ["none" if key is None else f"key {key[1]}" for key in keys]
    with KeyedSessions(reader) as sessions:
        for start in range(0, len(lines), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            yield from (found["bits"] for found in sessions.score_ids(names[part], ids[part], BITS))


def _masked(line: str) -> str:
    """A line as methods that go by words take it: what varies is one sign."""
    for preset in ("times", "addresses", "numbers"):
        line = re.sub(PRESETS[preset], "*", line)
    return line


def rarity(split: Callable[[str], list[str]], normal: Sequence[str]) -> Method:
    """The mean of what a line's parts cost if they are independent."""
    counts = Counter(part for line in normal for part in split(line))
    total = counts.total() + len(counts) + 1

    def cost(line: str) -> float:
        parts = split(line)
        return sum(math.log2(total / (counts[part] + 1)) for part in parts) / max(len(parts), 1)

    return lambda lines: np.array([cost(line) for line in lines])


def character_model(normal: Sequence[str], before: Sequence[str]) -> Method:
    """A character n-gram model with Witten and Bell's smoothing, and the score that surprisal has."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in normal:
        text = "\n" * ORDER + line
        for place in range(ORDER, len(text)):
            for size in range(ORDER + 1):
                counts[text[place - size : place]][text[place]] += 1

    def probability(context: str, character: str) -> float:
        found = 1 / 256
        for size in range(ORDER + 1):
            seen = counts.get(context[ORDER - size :])
            if seen is None:
                break
            kinds, total = len(seen), seen.total()
            found = (seen[character] + kinds * found) / (total + kinds)
        return found

    def method(lines: Sequence[str]) -> np.ndarray:
        scores, found = LineScores(), []
        for line in [*before, *lines]:
            text = "\n" * ORDER + line
            places = range(ORDER, len(text))
            bits = [-math.log2(probability(text[place - ORDER : place], text[place])) for place in places]
            sizes = [len(character.encode()) for character in line]
            found.append(_score(scores, line, np.repeat(bits, sizes)))
        return np.array(found[len(before) :])

    return method


def template_methods(normal: Sequence[str]) -> Iterator[tuple[str, Method]]:
    """Novelty of templates (drain3); PCA and an isolation forest on their counts (scikit-learn)."""
    from drain3 import TemplateMiner
    from drain3.template_miner_config import TemplateMinerConfig
    from sklearn.decomposition import PCA
    from sklearn.ensemble import IsolationForest

    miner = TemplateMiner(config=TemplateMinerConfig())
    for line in normal:
        miner.add_log_message(_masked(line))
    clusters = {cluster.cluster_id: place for place, cluster in enumerate(miner.drain.clusters, start=1)}
    sizes = {clusters[cluster.cluster_id]: cluster.size for cluster in miner.drain.clusters}

    def template(line: str) -> int:
        """The number of a line's template, 0 for a new one."""
        match = miner.match(_masked(line))
        return 0 if match is None else clusters[match.cluster_id]

    def novelty(lines: Sequence[str]) -> np.ndarray:
        seen_before = [sizes.get(template(line), 0) for line in lines]
        return np.log2(len(normal) / (np.array(seen_before) + 0.5))

    def windows(lines: Sequence[str]) -> np.ndarray:
        """How often each template is in the lines up to each, `(lines, templates)`."""
        ones = np.zeros((len(lines), len(clusters) + 1))
        ones[np.arange(len(lines)), [template(line) for line in lines]] = 1
        sums = np.cumsum(np.vstack([np.zeros((WINDOW, ones.shape[1])), ones]), axis=0)
        return sums[WINDOW:] - sums[:-WINDOW]

    seen = windows(normal)
    pca, forest = PCA(0.95).fit(seen), IsolationForest(random_state=0).fit(seen)

    def residual(lines: Sequence[str]) -> np.ndarray:
        rows = windows(lines)
        return np.linalg.norm(rows - pca.inverse_transform(pca.transform(rows)), axis=1)

    yield "new templates", novelty
    yield "PCA of templates", residual
    yield "isolation forest", lambda lines: -forest.score_samples(windows(lines))
