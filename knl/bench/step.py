"""`knl bench step`: training steps of knl beside a plain script, in turn, in fresh processes."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from knl.bench.ranks import run_ranks
from knl.choices import Choices
from knl.config import Recipe, to_toml
from knl.errors import FailedError, say
from knl.plan import plan_by_rule
from knl.profile import load_profile, newest_that_fits, require_fit
from knl.topology import Topology
from knl.tune.display import words
from knl.tune.space import canonical
from knl.tune.trial import Bench, Measured, measure, trial_recipe

ROUNDS, STEPS = 3, 3
_LIMIT_S = 1800.0
_PLAIN = Path(__file__).with_name("plain.py")
# Launchers that a user would take for one process on all cores: torch's own from 1.13 on, IPEX's.
_LAUNCHERS = (
    ("torch.backends.xeon.run_cpu", ["--ninstances", "1"]),
    ("intel_extension_for_pytorch.cpu.launch", ["--ninstances", "1"]),
)
_RATIOS = (("rule", "plain"), ("tuned", "plain"), ("tuned", "run_cpu"), ("rule", "run_cpu"))


@dataclass(frozen=True)
class _Rival:
    measure: Callable[[], Measured]
    how: str


def bench(
    node: Topology,
    recipe: Recipe,
    images: int,
    steps: int,
    rounds: int,
    profile: Path | None,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Measure; the object that `knl bench step --json` prints, its keys are a contract.

    `plain`: a script with torch's defaults; `run_cpu`: the same under torch's launcher (or IPEX's);
    `rule`, `tuned`: knl under its plan by rule, and under a profile's. Each `..._images_per_s` is
    the median over the steps of all rounds, None with a reason in `missing`.

    Raises FailedError when knl or the plain script does not train.
    """
    trial = Bench(node, recipe, images, steps, environment)
    rule = _of_recipe(plan_by_rule(node, None if images > 1 else 1, environment).choices, recipe)
    path = profile or newest_that_fits(node, environment)
    tuned = _tuned(node, path, recipe)
    rivals = {"plain": _Rival(lambda: _plain(trial, []), "python script.py")}
    missing: dict[str, str] = {}
    if launcher := _launcher():
        rivals["run_cpu"] = _Rival(lambda: _plain(trial, launcher), " ".join(launcher))
    else:
        missing["run_cpu"] = "neither torch nor IPEX brings a launcher here"
    rivals["rule"] = _Rival(lambda: trial.measure(rule, _LIMIT_S), f"plan by rule: {words(rule)}")
    if tuned is not None:
        how = f"profile {path}: {words(tuned)}"
        rivals["tuned"] = _Rival(lambda: trial.measure(tuned, _LIMIT_S), how)
    else:
        missing["tuned"] = "no profile fits this node: run knl tune"
    seconds = _in_turn(rivals, rounds, missing)
    speeds = {name: images / median(values) for name, values in seconds.items()}
    parts = _parts(trial, tuned or rule, path if tuned else None)
    return {
        "model": recipe.model.name,
        "images": images,
        "steps": steps,
        "rounds": rounds,
        **{f"{n}_images_per_s": speeds.get(n) for n in ("plain", "run_cpu", "rule", "tuned")},
        **{
            f"{a}_over_{b}": speeds[a] / speeds[b] if a in speeds and b in speeds else None
            for a, b in _RATIOS
        },
        "how": {name: rival.how for name, rival in rivals.items()},
        "missing": missing,
        **parts,
    }


def describe(result: Mapping[str, Any]) -> str:
    """The result in lines for a reader."""
    lines = [
        f"{result['model']}, {result['images']} images a step, medians of {result['rounds']} "
        f"rounds of {result['steps']} steps in turn"
    ]
    for name in ("plain", "run_cpu", "rule", "tuned"):
        speed = result[f"{name}_images_per_s"]
        how = result["how"].get(name, result["missing"].get(name))
        shown = f"{speed:8.2f} images/s" if speed else f"{'-':>8}         "
        lines.append(f"{name:8} {shown}  {how}")
    for a, b in _RATIOS:
        if (ratio := result[f"{a}_over_{b}"]) is not None:
            lines.append(f"{a} over {b}: {ratio:.2f}")
    parts = result["breakdown"]
    whole = sum(parts.values())
    lines.append(
        "a step of knl's: "
        + ", ".join(f"{n[:-2]} {1e3 * s:.0f} ms ({s / whole:.1%})" for n, s in parts.items())
    )
    conv, linear = result["conv_share"], result["linear_share"]
    lines.append(
        f"of its CPU time in the limit: {conv + linear:.1%} (convolutions {conv:.1%}, fully "
        f"connected layers {linear:.1%})"
    )
    lines += [f"  {op['share']:6.1%}  {op['name']}" for op in result["ops"]]
    return "\n".join(lines)


def _tuned(node: Topology, path: Path | None, recipe: Recipe) -> Choices | None:
    """The profile's choices for this recipe; None where there is no profile."""
    if path is None:
        return None
    profile = load_profile(path)
    require_fit(profile, node, path)
    return _of_recipe(profile.plan.choices, recipe)


def _of_recipe(choices: Choices, recipe: Recipe) -> Choices:
    """In the recipe's type of numbers, as `knl train` takes them."""
    train = recipe.train
    return canonical(msgspec.structs.replace(choices, dtype=train.dtype, compile=train.compile))


def _launcher() -> list[str]:
    for module, options in _LAUNCHERS:
        try:
            found = importlib.util.find_spec(module)
        except ImportError:  # a parent package is not there
            continue
        if found:
            return ["-m", module, *options]
    return []


def _plain(trial: Bench, launcher: list[str]) -> Measured:
    def command_in(folder: Path) -> tuple[list[str], dict[str, str]]:
        file = folder / "recipe.toml"
        file.write_text(to_toml(trial_recipe(trial.recipe, trial.images, 1, None)))
        script = [*launcher, str(_PLAIN), str(file), str(trial.steps)]
        return [sys.executable, *script], dict(trial.environment)

    return measure(command_in, trial.steps, _LIMIT_S)


def _in_turn(
    rivals: Mapping[str, _Rival], rounds: int, missing: dict[str, str]
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(rounds):
        for name, rival in rivals.items():
            if name in missing:
                continue
            measured = rival.measure()
            if measured.state != "complete":
                why = f"{name} ({rival.how}): {measured.reason}"
                if name != "run_cpu":
                    raise FailedError(f"knl bench step: {why}")
                missing[name] = why  # another's launcher, with needs of its own such as numactl
                del seconds[name]
                say(why)
                continue
            seconds[name] += measured.step_s
            say(f"round {number + 1} of {rounds}: {name} {median(measured.step_s):.3f} s a step")
    return seconds


def _parts(trial: Bench, choices: Choices, profile: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="knl-bench-") as folder:
        file = Path(folder) / "recipe.toml"
        ranks = choices.ranks_per_node
        file.write_text(to_toml(trial_recipe(trial.recipe, trial.images, ranks, choices)))
        wanted = {"recipe": str(file), "steps": trial.steps}
        module = "knl.bench.step_parts"
        return run_ranks(module, ranks, wanted, trial.environment, _LIMIT_S, profile)
