"""The search: as is, by rule, then variations of the best; at the end all three in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Literal

import msgspec

from knl.choices import Choices
from knl.errors import FailedError, KnlError
from knl.placement import domains
from knl.plan import plan_by_rule
from knl.profile import Profile, Trial
from knl.tune.accuracy import Check, check
from knl.tune.allreduce import measured
from knl.tune.compare import gain_of
from knl.tune.display import Display
from knl.tune.history import History
from knl.tune.space import canonical, fits, neighbours
from knl.tune.trial import Bench, Measured

# A step as it comes may take this share of the budget; else trials get fewer images.
_STEP_SHARE = 1 / 28
_FEW_IMAGES = 8
# Steps of a trial after its warm-up: as many as last about as long as its start, within bounds.
_MEASURED_S = 8.0
_STEPS = (2, 10)
# A trial slower than this share of the best is not worth its other steps.
_HOPELESS = 0.6
# Rounds in which as-is, rule and best are measured again, and the most of the budget for them.
_ROUNDS = 3
_COMPARE_SHARE = 0.5
# After so many trials next to the best, TPE has every other one.
_NEIGHBOURS_FIRST = 8
# A trial that takes so many times as long as as-is did counts as hanging.
_HANGING = 4.0
_SHORTEST_LIMIT_S = 30.0
_START_S = 6.0
# The accuracy check of bfloat16 may take this share of the time that is left.
_CHECK_SHARE = 0.25
# The one comparison may end this share of the budget after it.
_LATE = 0.15


class Search:
    """A search under way. `deadline`: on the monotonic clock, after `budget_s` seconds."""

    def __init__(
        self, bench: Bench, history: History, display: Display, budget_s: float, began: float
    ) -> None:
        self.bench, self.history, self.display = bench, history, display
        self.budget_s, self.deadline = budget_s, began + budget_s
        self.rule = canonical(
            plan_by_rule(bench.node, _ranks_by_rule(bench), bench.environment).choices
        )
        # CCL_ALLREDUCE by ranks a node, as measured.
        self._allreduce: dict[int, str] = {}
        self.bf16: Check | None = None  # None before it was asked for
        # Seconds that a trial of each kind took; guessed for those of an interrupted search.
        self.wall_s = {
            t.label: _START_S + sum(t.step_s) * (bench.steps + 1) / bench.steps
            for t in history.trials
        }

    def run(self) -> None:
        """Trials until only the time to compare is left."""
        if any(t.choices and t.choices.dtype == "bf16" for t in self.history.trials):
            self._check_bf16()  # an interrupted search got that far
        known = {trial.label for trial in self.history.trials if trial.state == "complete"}
        if "as-is" not in known:
            self.measure("as-is", None)
        if "rule" not in known:
            self.measure("rule", self.rule)
        while time.monotonic() + self._usual_s() < self.deadline - self._compare_s():
            choices = self._next()
            if choices is None:
                self.display.say("every choice has been tried")
                return
            self.measure("search", choices)

    def measure(self, label: Literal["as-is", "rule", "search"], choices: Choices | None) -> None:
        """Run one trial, note it, show it."""
        best = self.history.best
        slowest = self.bench.images / (_HOPELESS * best.images_per_s) if best else float("inf")
        prunes = label == "search"
        came = self._try(
            choices, self._limit_s(label, choices), lambda step_s: prunes and step_s > slowest
        )
        if came.state == "complete":
            self.wall_s[label] = came.wall_s
        images = self.bench.images
        trial = Trial(
            number=len(self.history.trials),
            label=label,
            choices=choices,
            state=came.state,
            images_per_s=images / median(came.step_s) if came.step_s else 0.0,
            step_s=came.step_s,
            reason=came.reason,
            peak_bytes=came.peak_bytes,
        )
        self.history.add(trial)
        best = self.history.best
        self.display.trial(trial, best.images_per_s if best else 0.0)

    def compare(self, best: Choices) -> dict[str, list[float]] | None:
        """Step times (s) of as-is, rule and best again, in turn, so that what else the machine does
        hits all alike. None where one of them fails, or there is no time left."""
        rivals = {"as-is": None, "rule": self.rule, "best": best}
        step_s: dict[str, list[float]] = {name: [] for name in rivals}
        took = self._round_s()
        for number in range(_ROUNDS):
            began = time.monotonic()
            late = 0.0 if number else _LATE * self.budget_s
            if began + took > self.deadline + late:
                break
            self.display.say(f"as-is, rule and best in turn: round {number + 1}")
            for name, choices in rivals.items():
                if name == "best" and best == self.rule:
                    step_s["best"] = step_s["rule"]
                    continue
                step_s[name] += self._try(choices, 2 * took + _START_S).step_s
            took = time.monotonic() - began
        return step_s if all(step_s.values()) else None

    def _try(
        self,
        choices: Choices | None,
        limit_s: float,
        hopeless: Callable[[float], bool] = lambda step_s: False,
    ) -> Measured:
        """Measure; what cannot even be started is a failed trial like any other."""
        try:
            return self.bench.measure(choices, limit_s, hopeless)
        except (KnlError, OSError) as error:
            return Measured("failed", (), str(error), 0, 0.0)

    def _next(self) -> Choices | None:
        """Something not tried yet; None when there is nothing left."""
        best = self.history.best
        near = best.choices if best and best.choices else self.rule
        tried = {trial.choices for trial in self.history.trials}

        def is_new(choices: Choices) -> bool:
            shares = self.bench.images % choices.ranks_per_node == 0
            if not (shares and fits(self.bench.node, choices)):
                return False
            if choices.dtype == "bf16" and not self._check_bf16().passed:
                return False
            return self._with_allreduce(choices) not in tried

        by_tpe = len(tried) > _NEIGHBOURS_FIRST and len(tried) % 2
        neighbour = next(filter(is_new, neighbours(self.history.space, near)), None)
        if neighbour is None or by_tpe:
            neighbour = self.history.suggest(near, is_new) or neighbour
        return self._with_allreduce(neighbour) if neighbour else None

    def _check_bf16(self) -> Check:
        """Once, before the first trial in bfloat16: fast steps that learn nothing are no gain."""
        if self.bf16 is None:
            left = self.deadline - time.monotonic() - self._compare_s()
            self.display.say("bf16: training a small network in it and in fp32")
            self.bf16 = check(self.bench.environment, _CHECK_SHARE * max(left, 0.0))
            self.display.say(f"bf16: {self.bf16.told}")
        return self.bf16

    def _with_allreduce(self, choices: Choices) -> Choices:
        """The same with the algorithms that were measured for so many ranks, once: it takes
        seconds, where a trial of each would take minutes."""
        ranks = choices.ranks_per_node
        if ranks == 1 or "CCL_ALLREDUCE" in self.bench.environment:
            return choices
        if ranks not in self._allreduce:
            try:
                found = measured(self.bench, choices)
            except (KnlError, OSError) as error:
                found = choices.allreduce
                self.display.say(f"allreduce of {ranks} ranks is not measured: {error}")
            else:
                self.display.say(f"allreduce of {ranks} ranks: {found or 'left to oneCCL'}")
            self._allreduce[ranks] = found
        return msgspec.structs.replace(choices, allreduce=self._allreduce[ranks])

    def _usual_s(self) -> float:
        """How long the next trial will take."""
        return max(self.wall_s.get("search", 0.0), self.wall_s.get("rule", 0.0))

    def _round_s(self) -> float:
        """How long it takes to measure as-is, rule and best once more."""
        return self.wall_s.get("as-is", 0.0) + 2 * self._usual_s()

    def _compare_s(self) -> float:
        """Time to keep for comparing: for all rounds if they are short, for one at least."""
        return max(self._round_s(), min(_ROUNDS * self._round_s(), _COMPARE_SHARE * self.budget_s))

    def _limit_s(self, label: str, choices: Choices | None) -> float:
        """Seconds for a trial: enough for a slow one, and not those kept for comparing."""
        left = self.deadline - time.monotonic()
        if label != "search":
            return max(_SHORTEST_LIMIT_S, left)
        left -= self._compare_s()
        compiles = choices is not None and choices.compile
        usual = left if compiles else self.wall_s.get("as-is", left) * _HANGING
        return max(self._usual_s(), min(usual, left))


def search(
    bench: Bench, history: History, budget_s: float, began: float, display: Display
) -> tuple[Profile, bool]:
    """Search until `budget_s` seconds after `began` (monotonic clock). Returns the profile, and
    whether it came to its end: Ctrl-C keeps what was learned.

    Raises FailedError when no plan trains.
    """
    state = Search(bench, history, display, budget_s, began)
    again = None
    try:
        state.run()
        finished = True
        if history.best and history.best.choices:
            again = state.compare(history.best.choices)
    except KeyboardInterrupt:
        display.say("interrupted: what was learned is kept, the same command goes on from here")
        finished = False
    best = history.best
    if best is None or best.choices is None:
        reasons = [trial.reason for trial in history.trials if trial.reason]
        raise FailedError(f"no plan could be measured: {reasons[-1] if reasons else 'interrupted'}")
    choices = best.choices
    if again and median(again["rule"]) < median(again["best"]):
        choices, again["best"] = state.rule, again["rule"]  # it was lucky when it was found
    gain = gain_of(bench.images, again) if again else None
    profile = bench.profile(choices, gain, history.trials)
    told = state.bf16.told if state.bf16 else ""
    return msgspec.structs.replace(profile, bf16_check=told), finished


def sized(bench: Bench, budget_s: float, display: Display) -> Bench:
    """The bench with as many images a step as the recipe's lane, halved until a step as it comes
    leaves time for a search; and with the number of steps that suits their speed.

    Raises FailedError when not even a few images can be trained.
    """
    full = bench.recipe.train.lane_batch
    few = min(full, _FEW_IMAGES)
    first = replace(bench, images=few, steps=1).measure(None, budget_s / 2)
    if first.state != "complete":
        raise FailedError(
            f"{bench.recipe.name}: {few} images do not train here as torch comes: "
            f"{first.reason}; give a longer --budget if that is all, or see knl doctor"
        )
    speed = few / first.step_s[0]
    images = full
    while images > few and images > speed * budget_s * _STEP_SHARE and images % 2 == 0:
        images //= 2
    if images != full:
        display.say(
            f"{images} images a step instead of the recipe's {full}: at {speed:.1f} images/s as it "
            f"comes, {budget_s:.0f} s hold no search at {full}; a longer --budget would"
        )
    fewest, most = _STEPS
    return replace(
        bench, images=images, steps=min(most, max(fewest, round(_MEASURED_S * speed / images)))
    )


def _ranks_by_rule(bench: Bench) -> int:
    ranks = domains(bench.node)
    return ranks if bench.images % ranks == 0 else 1
