"""The trials of a search, kept in an Optuna study on disk so that an interrupted one goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from knl.choices import Choices
from knl.config import Recipe, to_toml
from knl.errors import InputError
from knl.profile import Trial, fingerprint
from knl.topology import Topology
from knl.tune.space import Space, canonical

_STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
_SEED = 0
_SUGGESTIONS = 20
_RANDOM = 500


class History:
    """All trials so far. `journal`: the file they are kept in, None to keep them nowhere."""

    def __init__(self, node: Topology, recipe: Recipe, space: Space, journal: Path | None) -> None:
        self.space = space
        self._journal = journal
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        what = [msgspec.to_builtins(fingerprint(node)), to_toml(recipe), space]
        name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        try:
            storage = JournalStorage(JournalFileBackend(str(journal))) if journal else None
            self._study = optuna.create_study(
                study_name=name,
                storage=storage or InMemoryStorage(),
                sampler=optuna.samplers.TPESampler(seed=_SEED),
                direction="maximize",
                load_if_exists=True,
            )
            texts = self._study.user_attrs.get("trials", [])
            self.trials: list[Trial] = [msgspec.json.decode(text, type=Trial) for text in texts]
        except (OSError, ValueError, KeyError, msgspec.MsgspecError) as error:
            raise InputError(
                f"{journal}: the trials of an interrupted search cannot be read or written "
                f"({error}); remove the file, or give another --out"
            ) from None

    @property
    def images(self) -> int:
        """Images of a step in the trials so far; 0 where there are none yet."""
        return int(self._study.user_attrs.get("images", 0))

    @property
    def steps(self) -> int:
        """Steps of each of these trials."""
        return int(self._study.user_attrs.get("steps", 1))

    def set_size(self, images: int, steps: int) -> None:
        """Note what all trials will have in common."""
        self._study.set_user_attr("images", images)
        self._study.set_user_attr("steps", steps)

    @property
    def best(self) -> Trial | None:
        """The fastest complete trial under a plan."""
        done = [t for t in self.trials if t.choices is not None and t.state == "complete"]
        return max(done, key=lambda trial: trial.images_per_s, default=None)

    def add(self, trial: Trial) -> None:
        """Note a trial, for TPE and for a later run."""
        self.trials.append(trial)
        if trial.choices is not None:
            state = _STATES[trial.state]
            self._study.add_trial(
                create_trial(
                    state=state,
                    params={name: getattr(trial.choices, name) for name in self.space},
                    distributions=self._distributions(),
                    value=trial.images_per_s if state != TrialState.FAIL else None,
                )
            )
        texts = [msgspec.json.encode(trial).decode() for trial in self.trials]
        self._study.set_user_attr("trials", texts)

    def suggest(self, near: Choices, is_new: Callable[[Choices], bool]) -> Choices | None:
        """TPE's idea of what to try next, with the rest as in `near`; where it only repeats itself
        a random one; None when nothing new is found."""
        for _ in range(_SUGGESTIONS):
            asked = self._study.ask(self._distributions())
            self._study.tell(asked, state=TrialState.FAIL)  # add() tells what came of it
            choices = canonical(msgspec.structs.replace(near, **asked.params))
            if is_new(choices):
                return choices
        generator = random.Random(len(self.trials))
        for _ in range(_RANDOM):
            fields = {name: generator.choice(values) for name, values in self.space.items()}
            choices = canonical(msgspec.structs.replace(near, **fields))
            if is_new(choices):
                return choices
        return None

    def forget(self) -> None:
        """Remove the file: the search is done, and its profile holds all trials."""
        if self._journal:
            with contextlib.suppress(OSError):
                self._journal.unlink()

    def _distributions(self) -> dict[str, Any]:
        return {name: CategoricalDistribution(values) for name, values in self.space.items()}
