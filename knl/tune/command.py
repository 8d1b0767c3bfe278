"""`knl tune` from its arguments to the profile."""

from __future__ import annotations

import hashlib
import platform
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from knl.config import load_recipe
from knl.errors import InputError
from knl.profile import Profile, fingerprint, profile_folder, save_profile
from knl.topology import Topology
from knl.tune.display import Display, summary
from knl.tune.history import History
from knl.tune.search import search, sized
from knl.tune.space import space
from knl.tune.trial import Bench

_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600}
_LEAST_S = 30.0


def tune(
    node: Topology,
    recipe_name: str,
    budget: str,
    out: Path | None,
    environment: Mapping[str, str],
    *,
    with_compile: bool,
) -> tuple[Profile, Path, bool]:
    """Search plans for this node. Returns the profile, where it was written, and whether the search
    came to its end.

    Raises InputError for a wrong budget, recipe or place, FailedError when nothing trains.
    """
    began = time.monotonic()
    budget_s = parse_budget(budget)
    recipe = load_recipe(recipe_name)
    path = out or _default_path(node, recipe.name, environment)
    # By host: nodes of one kind may search side by side in a shared home.
    journal = path.with_name(f"{path.name}.{platform.node()}.journal")
    if path.is_dir():
        raise InputError(f"--out {path}: is a folder; name a file in it, such as {path / 'p.json'}")
    for number in (signal.SIGTERM, signal.SIGHUP):  # end as by Ctrl-C, with nothing left behind
        signal.signal(number, signal.default_int_handler)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written: {error.strerror}") from None
    full = recipe.train.lane_batch
    dimensions = space(node, full, environment, with_compile=with_compile)
    history = History(node, recipe, dimensions, journal)
    bench = Bench(node, recipe, history.images or full, history.steps, environment)
    display = Display(budget_s)
    try:
        if history.trials:
            display.say(f"going on from {len(history.trials)} trials in {journal}")
        if not history.images:
            bench = sized(bench, budget_s, display)
            history.set_size(bench.images, bench.steps)
        profile, finished = search(bench, history, budget_s, began, display)
    finally:
        display.close()
    save_profile(profile, path)
    if finished:
        history.forget()
    return profile, path, finished


def parse_budget(text: str) -> float:
    """Seconds of a time such as 10m, 90s, 1.5h. Raises InputError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    seconds = float(found[1]) * _UNITS_S[found[2]] if found else 0.0
    if seconds < _LEAST_S:
        raise InputError(f"--budget {text}: must be a time of at least 30s, such as 10m or 1h")
    return seconds


def result(profile: Profile, path: Path) -> dict[str, Any]:
    """The object that `knl tune --json` prints; its keys are a contract."""
    gain = profile.gain
    speed = {t.label: t.images_per_s for t in profile.trials if t.label in ("as-is", "rule")}
    best = max(t.images_per_s for t in profile.trials if t.choices == profile.plan.choices)
    as_is = gain.as_is_images_per_s if gain else speed.get("as-is", 0.0)
    return {
        "best": msgspec.to_builtins(profile.plan.choices),
        "as_is_images_per_s": as_is,
        "rule_images_per_s": gain.rule_images_per_s if gain else speed.get("rule", 0.0),
        "best_images_per_s": gain.best_images_per_s if gain else best,
        "gain": gain.gain if gain else best / as_is if as_is else None,
        "gain_interval": [gain.gain_low, gain.gain_high] if gain else None,
        "images": profile.images,
        "bf16_check": profile.bf16_check or None,
        "profile": str(path),
        "trials": msgspec.to_builtins(profile.trials),
    }


def describe(profile: Profile, path: Path) -> str:
    """The table of trials, the gain, and where the profile is."""
    return f"{summary(profile)}\nprofile {path}"


def _default_path(node: Topology, recipe: str, environment: Mapping[str, str]) -> Path:
    """One for each recipe, hardware and stack, so that an interrupted search is found again."""
    digest = hashlib.sha256(msgspec.json.encode(fingerprint(node))).hexdigest()[:8]
    return profile_folder(environment) / f"{recipe}-{digest}.json"
