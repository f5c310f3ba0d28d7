"""Rules for stopping a training when unsafe answers rise: false stops over a whole training, and how long a fall of safety stays unseen.

    python benchmarks/monitor.py [--repetitions 2000] [--json FILE] [--picture FILE] [--quick]

Simulated, no model: a suite of 360 prompts in 120 topics of three; a training is looked at 40 times (and 12 times). Without degradation
as many answers turn unsafe as turn safe at every look, the share given as churn; answers either change anew at every look, or keep on
(a prompt that flipped stays so with probability 0.9). With degradation a share of the safe answers turns unsafe, for good, from a look in
the middle of the training on. Topics change as a whole. The rules are those of `orchestrator.trial.monitor` and what one might do instead.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.decision.drift import Evidence  # noqa: E402

TOPICS, PER_TOPIC, PROMPTS, LIMIT, LEVEL = 120, 3, 50, 0.05, 0.05

Look = tuple[list[bool], list[bool]]
"""(unsafe before, unsafe now) for every topic; all prompts of a topic are alike."""


def calm(rng: random.Random, looks: int, base: float, churn: float, keep: float) -> list[Look]:
    """A training without degradation: at every look equally many topics have turned unsafe and safe, `churn` of all together."""
    before = [i < round(base * TOPICS) for i in range(TOPICS)]
    rng.shuffle(before)
    sides = [[i for i in range(TOPICS) if before[i] is side] for side in (False, True)]
    count = min(round(churn * TOPICS / 2), len(sides[0]), len(sides[1]))
    flipped: list[list[int]] = [rng.sample(side, count) for side in sides]
    found = []
    for _ in range(looks):
        now = list(before)
        for side, chosen in zip(sides, flipped, strict=True):
            stay = [i for i in chosen if rng.random() < keep]
            kept = set(stay)
            rest = [i for i in side if i not in kept]
            chosen[:] = stay + rng.sample(rest, count - len(stay))
            for i in chosen:
                now[i] = not before[i]
        found.append((before, now))
    return found


def falling(rng: random.Random, looks: int, base: float, churn: float, rise: float, start: int) -> list[Look]:
    """The same with `rise` of all topics turning unsafe for good at look `start`."""
    found = calm(rng, looks, base, churn, 0.0)
    lost = rng.sample([i for i, unsafe in enumerate(found[0][0]) if not unsafe], round(rise * TOPICS))
    for _, now in found[start:]:
        for i in lost:
            now[i] = True
    return found


def drawn(rng: random.Random, count: int = PROMPTS) -> list[int]:
    """Topics of `count` prompts, one a topic as far as topics go."""
    return rng.sample(range(TOPICS), count)


def counts(look: Look, topics: list[int]) -> tuple[int, int]:
    """(turned unsafe, turned safe) among the topics asked."""
    before, now = look
    return sum(now[i] and not before[i] for i in topics), sum(before[i] and not now[i] for i in topics)


def threshold(looks: list[Look], rng: random.Random, fixed: bool) -> int | None:
    """The bare rule: the rise of one probe of 50 is above the limit."""
    topics = drawn(rng)
    for i, look in enumerate(looks):
        topics = topics if fixed else drawn(rng)
        gained, lost = counts(look, topics)
        if (gained - lost) / PROMPTS > LIMIT:
            return i
    return None


def mcnemar(looks: list[Look], rng: random.Random) -> int | None:
    """The bare rule and an exact McNemar test of each probe at LEVEL / number of looks (Bonferroni)."""
    for i, look in enumerate(looks):
        gained, lost = counts(look, drawn(rng))
        tail = math.fsum(math.comb(gained + lost, k) for k in range(gained, gained + lost + 1)) / 2 ** (gained + lost)
        if (gained - lost) / PROMPTS > LIMIT and tail <= LEVEL / len(looks):
            return i
    return None


def evidence(looks: list[Look], rng: random.Random) -> int | None:
    """The default: evidence over all looks reaches 1 / LEVEL, and the rise where it is loudest is above the limit."""
    made = Evidence(len(looks))
    for i, look in enumerate(looks):
        if made.add(*counts(look, drawn(rng)), PROMPTS) >= 1 / LEVEL and made.rise() > LIMIT:
            return i
    return None


def cheap(looks: list[Look], rng: random.Random) -> int | None:
    """The cheap form: more than 2 of 10 answers are unsafe, whatever they were before."""
    return next((i for i, (_, now) in enumerate(looks) if sum(now[t] for t in drawn(rng, 10)) > 2), None)


RULES: dict[str, Callable[[list[Look], random.Random], int | None]] = {
    "threshold, fixed prompts": lambda looks, rng: threshold(looks, rng, True),
    "threshold, fresh prompts": lambda looks, rng: threshold(looks, rng, False),
    "McNemar / looks, fresh": mcnemar,
    "evidence (default)": evidence,
    "quick: >2 of 10": cheap,
}

CALM = [
    (12, 0.0, 0.0, 0.0), (40, 0.02, 0.02, 0.0), (12, 0.1, 0.1, 0.0), (40, 0.1, 0.1, 0.0), (40, 0.1, 0.1, 0.9), (40, 0.5, 0.3, 0.0),
    (40, 0.5, 0.3, 0.9),
]  # fmt: skip
"""(looks, untouched rate, churn, share that keeps)."""

FALLS = [(0.0, 0.0, 0.1), (0.0, 0.0, 0.2), (0.0, 0.0, 0.3), (0.0, 0.0, 0.6), (0.1, 0.1, 0.1), (0.1, 0.1, 0.2), (0.1, 0.1, 0.3), (0.1, 0.1, 0.6)]
"""(untouched rate, churn, rise); 40 looks, from look 20 on."""


def false_stops(scenario: tuple[int, float, float, float], repetitions: int) -> dict[str, float]:
    """By rule, the share of trainings without degradation in which it stops at all; every rule sees the same trainings."""
    stops = dict.fromkeys(RULES, 0)
    for seed in range(repetitions):
        looks = calm(random.Random(f"{scenario}{seed}"), *scenario)
        for name, rule in RULES.items():
            stops[name] += rule(looks, random.Random(f"{name}{scenario}{seed}")) is not None
    return {name: count / repetitions for name, count in stops.items()}


def delays(scenario: tuple[float, float, float], repetitions: int, looks: int = 40, start: int = 20) -> dict[str, dict[str, float]]:
    """By rule: share of trainings stopped before the fall; of the others, the share in which it is seen and the median of looks needed
    (1: the first)."""
    needed: dict[str, list[float]] = {name: [] for name in RULES}
    for seed in range(repetitions):
        made = falling(random.Random(f"{scenario}{seed}"), looks, *scenario, start)
        for name, rule in RULES.items():
            at = rule(made, random.Random(f"{name}{scenario}{seed}"))
            if at is None or at >= start:
                needed[name].append(math.inf if at is None else at - start + 1)
    found = {}
    for name, values in needed.items():
        seen = sum(n < math.inf for n in values) / len(values) if values else math.nan
        median = sorted(values)[len(values) // 2] if values else math.nan
        found[name] = {"early": 1 - len(values) / repetitions, "seen": seen, "median": median}
    return found


def measure(repetitions: int) -> dict[str, list[dict]]:
    """All rules in all scenarios."""
    names, few = ("looks", "base", "churn", "keep"), max(1, repetitions // 4)
    stops = [dict(zip(names, scenario, strict=True)) | false_stops(scenario, repetitions) for scenario in CALM]
    falls = [dict(zip(("base", "churn", "rise"), scenario, strict=True)) | delays(scenario, few) for scenario in FALLS]
    return {"false_stops": stops, "delays": falls}


def table(found: dict[str, list[dict]], repetitions: int) -> str:
    """Both tables as Markdown."""
    lines = [f"Share of trainings stopped without any degradation ({repetitions} repetitions):", ""]
    lines += ["| looks | untouched rate | churn | keeps | " + " | ".join(RULES) + " |", "|---|---|---|---|" + "---|" * len(RULES)]
    for row in found["false_stops"]:
        shares = " | ".join(f"{row[rule]:.3f}" for rule in RULES)
        lines.append(f"| {row['looks']} | {row['base']:g} | {row['churn']:g} | {row['keep']:g} | {shares} |")
    lines += ["", f"Looks until a fall from look 20 of 40 on is seen, median (share stopped before it; {max(1, repetitions // 4)} repetitions):", ""]
    lines += ["| untouched rate | churn | rise | " + " | ".join(RULES) + " |", "|---|---|---|" + "---|" * len(RULES)]
    for row in found["delays"]:
        medians = [(row[rule]["median"], row[rule]["early"]) for rule in RULES]
        cells = " | ".join(f"{'never' if median == math.inf else format(median, 'g')} ({early:.2f})" for median, early in medians)
        lines.append(f"| {row['base']:g} | {row['churn']:g} | {row['rise']:g} | {cells} |")
    return "\n".join(lines)


def picture(found: dict[str, list[dict]], path: Path) -> None:
    """False stops (left) and delays (right), by rule."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from orchestrator.report.plots.canvas import COLOURS, MARKERS

    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    calm_rows, falls = found["false_stops"], [row for row in found["delays"] if row["base"]]
    for i, rule in enumerate(RULES):
        style = {"color": COLOURS[i], "marker": MARKERS[i], "label": rule, "linewidth": 1.4, "markersize": 6}
        left.plot([x + 0.09 * (i - 2) for x in range(len(calm_rows))], [row[rule] for row in calm_rows], **(style | {"linestyle": "none"}))
        if all(row[rule]["early"] <= 2 * LEVEL for row in falls):
            right.plot([row["rise"] for row in falls], [min(row[rule]["median"], 21) for row in falls], **style)
    left.axhline(LEVEL, color="#B00020", linestyle="--", linewidth=1.2)
    labels = [f"{row['looks']} looks\n{row['base']:g} / {row['churn']:g}\nkeeps {row['keep']:g}" for row in calm_rows]
    left.set_xticks(range(len(calm_rows)), labels, fontsize=7.5)
    left.set_ylabel("share of trainings stopped")
    left.set_xlabel("looks; untouched rate / churn; share that keeps")
    left.set_title("Without any degradation (dashed: 5 %)", fontsize=11, loc="left")
    left.legend(frameon=False, fontsize=8)
    right.set_yticks([1, 2, 3, 5, 10, 15, 21], ["1", "2", "3", "5", "10", "15", "never"])
    right.set_ylabel("looks until seen, median")
    right.set_xlabel("rise of unsafe answers (untouched rate 0.1, churn 0.1)")
    right.set_title("Rules that keep quiet: how fast they see a fall", fontsize=11, loc="left")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.grid(True, color="#E4E4E4", linewidth=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    """Print the tables; write the same figures as JSON and as a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="100 repetitions")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--picture", type=Path, help="write the picture here")
    options = parser.parse_args()
    repetitions = 100 if options.quick else options.repetitions
    found = measure(repetitions)
    print(table(found, repetitions))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if options.picture:
        picture(found, options.picture)


if __name__ == "__main__":
    main()
