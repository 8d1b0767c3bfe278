"""A measured plan, kept as JSON with the hardware and the stack that it was measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, Optional

import msgspec

from knl.bind import cpus_from_launcher
from knl.choices import Choices, layout_problem, rule_choices
from knl.comm.world import World
from knl.config import Recipe
from knl.errors import InputError
from knl.files import replace_file
from knl.packages import IPEX, ONEDNN, version_of
from knl.plan import Plan, crowded_plan, make_plan, plan_by_rule
from knl.topology import Topology

SCHEMA = 1
_PACKAGES = ("torch", IPEX, ONEDNN, "oneccl-cpu", "oneccl-devel", "impi-rt")


class Fingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a measurement holds for. `memory`: the kind of each node (its size is left out: kernels
    and virtual machines say a little less each time); `allowed_cpus`: how many the process could
    use; `stack`: versions of packages."""

    cpu_model: str
    sockets: int
    cores: int
    threads_per_core: int
    allowed_cpus: int
    cluster_mode: str
    memory_mode: str
    memory: tuple[str, ...]
    stack: dict[str, str]


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measurement. `label`: as-is, rule or search; `choices`: None for as-is; `step_s`: seconds
    of each step after warm-up; `reason`: why it is not complete; `peak_bytes`: of one rank."""

    number: int
    label: Literal["as-is", "rule", "search"]
    choices: Optional[Choices]
    state: Literal["complete", "pruned", "failed"]
    images_per_s: float
    step_s: tuple[float, ...]
    reason: str = ""
    peak_bytes: int = 0


class Gain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Best against as-is and rule, measured again in turn: median images/s, the ratio of best to
    as-is with the bounds of its 95 % interval, and the shares of resamples in which best is faster
    than as-is and than the rule."""

    as_is_images_per_s: float
    rule_images_per_s: float
    best_images_per_s: float
    gain: float
    gain_low: float
    gain_high: float
    sure: float
    sure_over_rule: float


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`images`: of a step on the whole node, of `pixels` a side; `created`: UTC, ISO 8601;
    `bf16_check`: what was done to see that bfloat16 trains as well, "" where it was not tried."""

    schema: int
    created: str
    recipe: str
    model: str
    pixels: int
    images: int
    fingerprint: Fingerprint
    plan: Plan
    gain: Optional[Gain] = None
    trials: tuple[Trial, ...] = ()
    bf16_check: str = ""


def fingerprint(node: Topology) -> Fingerprint:
    """Of this node and this Python environment."""
    return Fingerprint(
        cpu_model=node.cpu_model,
        sockets=len({core.socket for core in node.cores}),
        cores=len(node.cores),
        threads_per_core=node.threads_per_core,
        allowed_cpus=len(node.allowed_cpus),
        cluster_mode=node.cluster_mode,
        memory_mode=node.memory_mode,
        memory=tuple(m.kind for m in node.memory_nodes),
        stack={name: version for name in _PACKAGES if (version := version_of(name))},
    )


def load_profile(path: Path) -> Profile:
    """Read a profile. Raises InputError naming the file and what is wrong in it."""
    cure = "write it anew with knl tune --out"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"profile {path}: {error.strerror}; knl tune --out FILE makes one"
        ) from None
    try:
        schema = msgspec.json.decode(content).get("schema")
        if schema != SCHEMA:
            raise InputError(f"profile {path}: schema = {schema!r}: must be {SCHEMA}; {cure}")
        return msgspec.json.decode(content, type=Profile)
    except AttributeError:
        raise InputError(f"profile {path}: is not a JSON object; {cure}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"profile {path}: {error}; {cure}") from None


def save_profile(profile: Profile, path: Path) -> None:
    """Write it whole or not at all. Raises InputError when the place cannot be written."""
    content = json.dumps(msgspec.to_builtins(profile), indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            file.write(content.encode())
    except OSError as error:
        raise InputError(f"profile {path}: cannot be written: {error.strerror}") from None


def profile_folder(environment: Mapping[str, str]) -> Path:
    """Where profiles are kept: KNL_PROFILES, else below XDG_DATA_HOME or ~/.local/share."""
    if folder := environment.get("KNL_PROFILES"):
        return Path(folder)
    base = environment.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "knl" / "profiles"


def require_fit(profile: Profile, node: Topology, path: Path) -> None:
    """Raise InputError with both fingerprints when it was measured on something else, or with the
    reason when its layout wastes this node."""
    if problem := layout_problem(node, profile.plan.choices.layout):
        raise InputError(f"profile {path}: {problem}; run knl tune here, or leave --profile out")
    here = fingerprint(node)
    if profile.fingerprint == here:
        return
    theirs, ours = msgspec.to_builtins(profile.fingerprint), msgspec.to_builtins(here)
    differ = [name for name in ours if ours[name] != theirs[name]]
    then = ", ".join(f"{name} = {theirs[name]}" for name in differ)
    now = ", ".join(f"{name} = {ours[name]}" for name in differ)
    raise InputError(
        f"profile {path} is of another node or stack: it has {then}; here is {now}; "
        "run knl tune here, or leave --profile out"
    )


def newest_that_fits(node: Topology, environment: Mapping[str, str]) -> Path | None:
    """The newest profile of this hardware and stack; others, and damaged ones, are passed over."""
    found: list[tuple[str, Path]] = []
    for path in profile_folder(environment).glob("*.json"):
        try:
            profile = load_profile(path)
            require_fit(profile, node, path)
        except InputError:
            continue
        found.append((profile.created, path))
    return max(found)[1] if found else None


def plan_for(
    node: Topology,
    ranks: int | None,
    path: Path | None,
    environment: Mapping[str, str],
    recipe: Recipe | None = None,
) -> tuple[Plan, str]:
    """The plan to run under, and a line that says where it comes from: the profile at `path`, else
    the newest that fits, else the rule.

    `ranks`: on this node, None for as many as the profile or the rule says; `recipe`: what will be
    trained, None for any other program. Raises InputError when the profile is of another node or
    stack.
    """
    path = path or newest_that_fits(node, environment)
    if path is None:
        plan = plan_by_rule(node, ranks, environment)
        return plan, "plan by rule (no profile fits this node; knl tune measures one)"
    profile = load_profile(path)
    require_fit(profile, node, path)
    choices = profile.plan.choices
    where = f"plan of profile {path}"
    if ranks is not None and ranks != choices.ranks_per_node:
        where += (
            f", measured with {choices.ranks_per_node} rank(s), here for {ranks} "
            f"({choices.ranks_per_node} run as measured)"
        )
        choices = msgspec.structs.replace(
            choices, ranks_per_node=ranks, comm_workers=None, reserve_cores=None
        )
    working_set = _working_set(profile, choices, recipe)
    return make_plan(node, choices, environment, "profile", working_set), where


def _working_set(profile: Profile, choices: Choices, recipe: Recipe | None) -> int | None:
    """Bytes a rank will use at most, known only for the network and pictures that were measured, in
    batches not larger."""
    if recipe is None or (recipe.model.name, recipe.train.dtype) != (profile.model, choices.dtype):
        return None
    batch = profile.images // choices.ranks_per_node
    if pixels_of(recipe) != profile.pixels or recipe.train.lane_batch > batch:
        return None
    done = [t for t in profile.trials if t.state == "complete" and t.choices == choices]
    return max((trial.peak_bytes for trial in done), default=None)


def pixels_of(recipe: Recipe) -> int:
    """Pixels a side of the pictures that its network sees; 0 for the set's own."""
    return recipe.data.crop or recipe.data.image_size


def plan_of_rank(
    node: Topology,
    world: World,
    path: Path | None,
    environment: Mapping[str, str],
    recipe: Recipe | None = None,
) -> tuple[Plan, int, str]:
    """The plan, this rank's number in it, and where it comes from. Where the launcher has bound
    each rank apart, the plan is for this rank's share alone."""
    cpus, apart = cpus_from_launcher(world, environment)
    node = replace(node, allowed_cpus=tuple(sorted(cpus)))
    unused = f" (profile {path} is not used)" if path else ""
    if apart:
        # Ranks with masks of unlike sizes must still agree on oneCCL's workers: none of their own.
        choices = rule_choices(node, 1, environment)
        choices = msgspec.structs.replace(choices, comm_workers=0)
        plan = make_plan(node, choices, environment, "rule")
        return plan, 0, f"plan by rule within the CPUs that {world.launcher} gave each rank{unused}"
    if len(node.allowed_cores) < world.local_size:
        plan = crowded_plan(node, world.local_size, environment)
        return plan, world.local_rank, f"plan by rule{unused}"
    plan, where = plan_for(node, world.local_size, path, environment, recipe)
    if world.size > world.local_size:
        plan = _between_nodes(plan)
    return plan, world.local_rank, where


def _between_nodes(plan: Plan) -> Plan:
    """Without the algorithm that was chosen within one node, over shared memory: oneCCL knows
    better between nodes."""
    env = {
        name: setting
        for name, setting in plan.env.items()
        if setting.source == "user" or not name.startswith("CCL_ALLREDUCE")
    }
    choices = msgspec.structs.replace(plan.choices, allreduce="")
    return msgspec.structs.replace(plan, choices=choices, env=env)
