"""What to pack, and into which shards: decided once, the same for every packer of a set."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa

from knl.data.pack.convert import Form, Rejected, convert
from knl.data.pack.shards import PARTS
from knl.data.pack.sources import Item, Kind, Listing, Reader, list_source
from knl.errors import FailedError, InputError
from knl.files import replace_file

_FILE, _LOCK = "plan.arrow", "plan.lock"
_KEY = b"knl.plan"
_SAMPLE = 64  # pictures converted to learn how large records are
# Bytes of a shard: of a large set, and of a small one, which is cut into so many.
_SHARD, _LEAST_SHARD, _SHARDS = 1_000_000_000, 16_000_000, 64


class ShardPlan(msgspec.Struct, frozen=True):
    """`count` items from number `first` of the plan's table on."""

    name: str
    split: str
    first: int
    count: int


class Plan(msgspec.Struct, frozen=True):
    """`record_bytes`: of an average record, as far as a sample tells."""

    source: str
    kind: Kind
    form: Form
    classes: list[str]
    record_bytes: float
    shards: list[ShardPlan]


def make_plan(source: Path, folder: Path, form: Form) -> Plan:
    """The plan of a set: the one that is there, or a new one from a listing of the source.

    Raises InputError where the folder was begun with another source or form, or is in its source.
    """
    if not source.is_dir():
        raise InputError(f"{source}: not a folder")
    if source.resolve() in [folder.resolve(), *folder.resolve().parents]:
        raise InputError(f"{folder} is in {source}, what is packed: choose a folder outside")
    path = folder / PARTS / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder / PARTS / _LOCK):
        if not path.exists():
            listing = list_source(source)
            plan = _plan(source, form, listing)
            table = _in_order(listing.items).replace_schema_metadata(
                {_KEY: msgspec.json.encode(plan)}
            )
            with replace_file(path) as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
    plan = read_plan(folder)
    require_same(plan, source, folder, form)
    return plan


def require_same(plan: Plan, source: Path, folder: Path, form: Form) -> None:
    """Raise InputError where the folder was begun with another source or form."""
    if (plan.source, plan.form) != (str(source.resolve()), form):
        raise InputError(
            f"{folder} was begun from {plan.source} as {describe(plan.form)}: go on with the same, "
            f"or pack {source} as {describe(form)} into another folder"
        )


def read_plan(folder: Path) -> Plan:
    """Raises FailedError where it is not there or is damaged."""
    path = folder / PARTS / _FILE
    try:
        with pa.memory_map(str(path)) as file:
            metadata = pa.ipc.open_file(file).schema.metadata or {}
        return msgspec.json.decode(metadata[_KEY], type=Plan)
    except (OSError, KeyError, pa.ArrowException, msgspec.MsgspecError) as error:
        raise FailedError(
            f"{path} cannot be read ({' '.join(str(error).split())}): run knl data pack SRC DST; "
            "if the file is damaged, remove the folder first"
        ) from None


def items_of(folder: Path, shard: ShardPlan) -> list[Item]:
    """The pictures of a shard."""
    with pa.memory_map(str(folder / PARTS / _FILE)) as file:
        rows = pa.ipc.open_file(file).read_all().slice(shard.first, shard.count)
        return [Item(*row) for row in zip(*(column.to_pylist() for column in rows.columns))]


def describe(form: Form) -> str:
    """A form in the words of the command's options."""
    if form.raw:
        return f"--raw {form.side}"
    if form.side:
        return f"--short-side {form.side} --quality {form.quality}"
    return f"JPEG as they are (--quality {form.quality} where one must be made)"


def _plan(source: Path, form: Form, listing: Listing) -> Plan:
    table = _in_order(listing.items)
    record = _record_bytes(source, form, listing)
    splits = table.column("split").to_numpy(zero_copy_only=False)
    size = min(_SHARD, max(_LEAST_SHARD, record * len(splits) / _SHARDS))
    shards = []
    for split in sorted(set(splits.tolist())):
        first, count = int(np.argmax(splits == split)), int(np.sum(splits == split))
        parts = min(count, max(1, round(count * record / size)))
        edges = np.linspace(0, count, parts + 1).astype(int).tolist()
        for number, (begin, end) in enumerate(zip(edges[:-1], edges[1:])):
            shards.append(ShardPlan(f"{split}-{number:05d}", split, first + begin, end - begin))
    return Plan(str(source.resolve()), listing.kind, form, listing.classes, record, shards)


def _in_order(items: pa.Table) -> pa.Table:
    """A split's pictures one after another, otherwise as listed."""
    splits = items.column("split").to_numpy(zero_copy_only=False)
    return items.take(pa.array(np.argsort(splits, kind="stable"))).combine_chunks()


def _record_bytes(source: Path, form: Form, listing: Listing) -> float:
    if form.raw:
        return form.side * form.side * 3
    reader, sizes = Reader(source, listing.kind), []
    step = max(1, listing.items.num_rows // _SAMPLE)
    for row in listing.items.take(list(range(0, listing.items.num_rows, step))).to_pylist():
        try:
            sizes.append(len(convert(reader.read(Item(**row)), form)))
        except (Rejected, OSError):
            continue
    return float(np.mean(sizes)) if sizes else 1.0


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One packer at a time. Where a file system has no locks each makes the same plan."""
    with path.open("ab") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
