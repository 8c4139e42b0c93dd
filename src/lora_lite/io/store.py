"""`ll.AdapterStore`: a folder of thousands of adapters, of which those that were used last are on the model."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from ..core.arguments import checked
from ..core.errors import ConfigError, FileError, SelectionError, did_you_mean
from ..core.files import check_path
from ..runtime.commit import check_attachable, commit, detach
from ..runtime.model.record import Record
from ..runtime.model.state import state_of, unwrap
from ..runtime.model.surroundings import own_surroundings
from ..runtime.select import Owners
from ..runtime.select import active as active_scope
from ..runtime.select import rows as rows_scope
from ..runtime.start.staging import StagedTarget
from .load import load
from .native import BaseCheck, check_strictness, read_native

Staged = tuple[Record, list[StagedTarget]] | None
"""An adapter that is ready to be put on the model; None for other layouts than ours, which are read when it is."""


class AdapterStore:
    """The adapters of a folder, `NAME.safetensors` files or folders `NAME` in PEFT's layout, loaded when they are used;
    the least recently used leave when there are more than `resident`.

    `with store.rows(["a", None, "b"]): model.generate(...)` instead of `ll.rows`, `with store.active("a"):` instead of
    `ll.active`. Any number of threads may enter such blocks: they run one after the other, each under its own
    selection, while the files of those that wait are read beside them. An adapter joins and leaves the model only
    between blocks, so calls of the model in other threads belong into a block too. Adapters that were attached
    otherwise stay, and do not count.

    Args:
        model: the model, which may have other adapters.
        folder: where the files are; they are looked for by name, so new ones are found.
        resident: adapters on the model at most, and so different adapters in one block.
        base_check: as in `ll.load`.
    """

    @checked
    def __init__(
        self, model: nn.Module, folder: str | os.PathLike[str], resident: int = 64, base_check: BaseCheck = "error"
    ) -> None:
        check_path(folder)
        check_strictness(base_check)
        if resident < 1:
            raise ConfigError(f"AdapterStore: resident must be at least 1, got {resident}.")
        self.model, self.folder, self.limit = unwrap(model), Path(folder), resident
        self._base_check: BaseCheck = base_check
        if not self.folder.is_dir():
            raise FileError(f"AdapterStore: {self.folder} is no folder.")
        self.hits: int = 0
        """Adapters that a block found on the model."""
        self.misses: int = 0
        """Adapters that a block had to load."""
        self.evictions: int = 0
        """Adapters that left for others."""
        self._resident: dict[str, Record] = {}  # least recently used first
        self._reading: dict[str, Future[Staged]] = {}
        self._turn = threading.RLock()  # held by the block that runs
        self._still = threading.Lock()  # held while the model's structure is read, or changed
        self._table = threading.Lock()  # held while `_reading` is looked at
        self._reader = ThreadPoolExecutor(1, "adapter-store")

    def names(self) -> list[str]:
        """The adapters in the folder."""
        found = {p.stem if p.suffix == ".safetensors" else p.name for p in self.folder.iterdir() if _is_adapter(p)}
        return sorted(found)

    @property
    def resident(self) -> list[str]:
        """The adapters of this store that are on the model, the least recently used first."""
        return [name for name in list(self._resident) if self._is_resident(name)]

    @contextmanager
    def rows(self, names: Sequence[str | None], owners: Owners | None = None) -> Iterator[None]:
        """`ll.rows`, with adapters of the folder.

        Raises:
            FileError: there is no such adapter, or its file is damaged; BaseMismatchError: it is another model's.
            SelectionError: more different adapters than `resident`.
        """
        with self._holding(name for name in names if name is not None), rows_scope(self.model, names, owners):
            yield

    @contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """`ll.active` with an adapter of the folder, or none; raises as `rows` does."""
        with self._holding(() if name is None else (name,)), active_scope(self.model, name):
            yield

    def prefetch(self, names: Iterable[str]) -> None:
        """Read files in the background, for blocks to come; errors are raised there."""
        for name in dict.fromkeys(names):
            if not self._is_resident(name):
                self._future(name)

    def evict(self, name: str) -> None:
        """Take one adapter off the model, and forget what was read of it: its file has changed, say."""
        with self._turn, self._table:
            self._reading.pop(name, None)
            if self._is_resident(name):
                with self._still:
                    detach(self.model, name)
            self._resident.pop(name, None)

    def close(self) -> None:
        """Take all its adapters off the model, and end the reader."""
        with self._turn:
            for name in list(self._resident):
                self.evict(name)
            self._reader.shutdown()

    @contextmanager
    def _holding(self, names: Iterable[str]) -> Iterator[None]:
        """This thread's turn, with these adapters on the model."""
        wanted = dict.fromkeys(names)
        if len(wanted) > self.limit:
            raise SelectionError(
                f"{len(wanted)} different adapters in one block, and the store keeps {self.limit}: "
                f"ll.AdapterStore(model, folder, resident={len(wanted)}), or smaller batches."
            )
        for future in [self._future(name) for name in wanted if not self._is_resident(name)]:
            future.result()  # an error of any of them is raised before anything has changed
        with self._turn:
            for name in wanted:
                self._put_on(name, wanted)
            yield

    def _put_on(self, name: str, wanted: Iterable[str]) -> None:
        """One adapter on the model, as the most recently used; the least recently used one leaves for it."""
        if self._is_resident(name):
            self.hits += 1
            self._resident[name] = self._resident.pop(name)
            return
        self.misses += 1
        read = self._future(name).result()  # another block may have evicted it since
        for gone in [n for n in self._resident if not self._is_resident(n)]:
            del self._resident[gone]
        state = state_of(self.model, create=True)
        active = state.active
        with self._still:
            if read is None:
                load(self.model, self._path(name), name, base_check=self._base_check)
            else:
                check_attachable(self.model, name)
                commit(self.model, *read, trainable=False)
            state_of(self.model).select(active)
            self._resident[name] = state_of(self.model).records[name]
            while len(self._resident) > self.limit:
                oldest = next(n for n in self._resident if n not in wanted)
                detach(self.model, oldest)
                del self._resident[oldest]
                self.evictions += 1
        with self._table:
            self._reading.pop(name, None)

    def _is_resident(self, name: str) -> bool:
        """Whether it is on the model still, as this store put it there."""
        record = self._resident.get(name)
        return record is not None and state_of(self.model, create=True).records.get(name) is record

    def _future(self, name: str) -> Future[Staged]:
        """The adapter's tensors, read or being read."""
        with self._table:
            future = self._reading.get(name)
            if future is None or (future.done() and future.exception() is not None):
                self._reading[name] = future = self._reader.submit(self._read, name)
            for old in list(self._reading)[: -2 * self.limit]:  # prefetched, and never used
                del self._reading[old]
            return future

    def _read(self, name: str) -> Staged:
        path = self._path(name)
        if path.is_dir():
            return None
        with self._still, own_surroundings():
            return read_native(self.model, path, name, self._base_check)

    def _path(self, name: str) -> Path:
        plain = bool(name) and all(c.isalnum() or c in "_-" for c in name)
        for path in (self.folder / f"{name}.safetensors", self.folder / name) if plain else ():
            if _is_adapter(path):
                return path
        raise FileError(f"{self.folder} holds no adapter {name!r}.{did_you_mean(name, self.names())}")


def _is_adapter(path: Path) -> bool:
    return path.is_dir() or (path.suffix == ".safetensors" and path.is_file())
