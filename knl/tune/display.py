"""What a user sees of a search: a bar of the budget with the best so far, and lines on trials."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from knl.choices import Choices
from knl.profile import Profile, Trial


class Display:
    """On stderr; a log gets the lines without the bar."""

    def __init__(self, budget_s: float) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._began = time.monotonic()
        self._bar = Progress(
            TextColumn("tune"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=budget_s)
        self._bar.start()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def trial(self, trial: Trial, best: float) -> None:
        """`best`: images/s of the best so far."""
        self.say(describe(trial))
        spent = time.monotonic() - self._began
        self._bar.update(self._task, completed=spent, description=f"best {best:.2f} images/s")

    def close(self) -> None:
        self._bar.stop()


def describe(trial: Trial) -> str:
    """One line: speed or why there is none, and what was tried."""
    speed = f"{trial.images_per_s:8.2f} images/s" if trial.step_s else " " * 17
    result = speed if trial.state == "complete" else f"{speed} {trial.state}: {trial.reason}"
    return f"trial {trial.number:3} {trial.label:6} {result}  {words(trial.choices)}"


def words(choices: Choices | None) -> str:
    """What differs from the defaults, in a few words."""
    if choices is None:
        return "no plan, torch's own settings"
    found = [f"{choices.ranks_per_node} rank(s)", choices.layout, choices.allocator, choices.openmp]
    defaults = Choices(ranks_per_node=1)
    shown = ("ranks_per_node", "layout", "allocator", "openmp")
    for name in choices.__struct_fields__:
        value = getattr(choices, name)
        if name not in shown and value != getattr(defaults, name):
            found.append(f"{name}={value}")
    return ", ".join(found)


def summary(profile: Profile) -> str:
    """The table of trials, best first, and the gain."""
    ranked = sorted(profile.trials, key=lambda t: (t.state != "complete", -t.images_per_s))
    lines = [describe(trial) for trial in ranked]
    if profile.bf16_check:
        lines.append(f"bf16: {profile.bf16_check}")
    if gain := profile.gain:
        over_rule = f"than the rule in {gain.sure_over_rule:.0%}"
        if gain.best_images_per_s == gain.rule_images_per_s:
            over_rule = "the rule is the best"
        if gain.gain_high < 1:
            lines.append("as torch comes it is faster here: use --profile none")
        lines += [
            "measured again in turn (medians): "
            f"as-is {gain.as_is_images_per_s:.2f}, rule {gain.rule_images_per_s:.2f}, "
            f"best {gain.best_images_per_s:.2f} images/s",
            f"gain over as-is {gain.gain:.2f} (95 % interval {gain.gain_low:.2f} to "
            f"{gain.gain_high:.2f}); faster than as-is in {gain.sure:.0%} of resamples, "
            f"{over_rule}",
        ]
    return "\n".join(lines)
