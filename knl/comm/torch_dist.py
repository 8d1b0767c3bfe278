"""The gloo and torch_ccl providers: torch.distributed's backends "gloo" and "ccl"."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from knl.comm.bootstrap import Bootstrap, StoreBootstrap, first_line
from knl.comm.collectives import ProviderUnavailable
from knl.comm.world import World
from knl.errors import CollectiveTimeoutError, FailedError

# oneccl-bind-pt calls its module torch_ccl up to 1.11.
_CCL_MODULES = ("oneccl_bindings_for_pytorch", "torch_ccl")


def load(name: str, world: World, bootstrap: Bootstrap, timeout: float) -> Callable[[], TorchDist]:
    """Import what the backend needs. Raises ProviderUnavailable with the reason."""
    if not dist.is_available():
        raise ProviderUnavailable("this torch has no torch.distributed")
    version = torch.__version__
    if name == "torch_ccl":
        module = _import_ccl()
        version = str(getattr(module, "__version__", "of unknown version"))
    elif not dist.is_gloo_available() if hasattr(dist, "is_gloo_available") else False:
        raise ProviderUnavailable("this torch was built without gloo")
    return lambda: TorchDist(name, version, world, bootstrap, timeout)


def _import_ccl() -> Any:
    for module in _CCL_MODULES:
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
        except Exception as error:  # a binding for another torch fails in its own ways
            raise ProviderUnavailable(f"{module} does not import: {error}") from None
    raise ProviderUnavailable(
        "oneccl-bind-pt is not installed (optional; from Intel's own package index)"
    )


class _Work:
    def __init__(self, work: Any) -> None:
        self._work = work

    def test(self) -> bool:
        return bool(self._work.is_completed())

    def wait(self, timeout: float) -> None:
        try:
            self._work.wait(timedelta(seconds=timeout))
        except RuntimeError as error:
            raise _failure(error, timeout) from None


class TorchDist:
    """A process group over all ranks."""

    def __init__(
        self, name: str, version: str, world: World, bootstrap: Bootstrap, timeout: float
    ) -> None:
        self.name, self.version, self._timeout = name, version, timeout
        lacks = name == "gloo" and torch.__version__.startswith("1.")
        self.no_bf16 = f"torch {torch.__version__} has no such sum" if lacks else ""
        if world.size == world.local_size:
            # One host: loopback works whatever the host's name resolves to.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        limit = timedelta(seconds=timeout)
        dist.init_process_group(
            "ccl" if name == "torch_ccl" else "gloo",
            store=_meet(world, bootstrap, limit),
            rank=world.rank,
            world_size=world.size,
            timeout=limit,
        )

    def allreduce(self, tensor: torch.Tensor, priority: int = 0) -> _Work:
        with self._told():
            return _Work(dist.all_reduce(tensor, async_op=True))

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        with self._told():
            work = _Work(dist.broadcast(tensor, root, async_op=True))
        work.wait(self._timeout)

    def barrier(self) -> None:
        with self._told():
            work = _Work(dist.barrier(async_op=True))
        work.wait(self._timeout)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """A connection that breaks where a collective starts, as where it is waited for."""
        try:
            yield
        except RuntimeError as error:
            raise _failure(error, self._timeout) from None

    def close(self) -> None:
        dist.destroy_process_group()


def _failure(error: RuntimeError, timeout: float) -> FailedError:
    """A backend's own words, told as what they mean: a rank that has died closes its sockets."""
    reason = first_line(error)
    if "imed out" in reason or "imeout" in reason:
        return CollectiveTimeoutError(f"not done after {timeout:g} s")
    if "onnection" in reason or "roken pipe" in reason:
        return CollectiveTimeoutError("a rank has closed its connections")
    return FailedError(f"torch.distributed: {reason}")


def _meet(world: World, bootstrap: Bootstrap, timeout: timedelta) -> Any:
    """The store at which the ranks meet: torchrun's, or one that rank 0 serves."""
    if isinstance(bootstrap, StoreBootstrap):
        return bootstrap.store
    host = "127.0.0.1" if world.size == world.local_size else _own_address()
    if world.rank == 0:
        store = dist.TCPStore(host, 0, world.size, True, timeout, wait_for_workers=False)
        bootstrap.broadcast(f"{host}:{store.port}".encode())
        return store
    host, port = bootstrap.broadcast(b"").decode().rsplit(":", 1)
    return dist.TCPStore(host, int(port), world.size, False, timeout, wait_for_workers=False)


def _own_address() -> str:
    import socket

    return socket.gethostname()
