"""Who measures what, where several processes share a run folder."""

from __future__ import annotations

from filelock import FileLock, Timeout

from kvbench.store.folder import RunFolder


class Claims:
    """The parts that this process holds."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.held: dict[str, FileLock] = {}

    def take(self, name: str) -> bool:
        """Claim a part, unless a process holds it; this one does not take it twice."""
        if name in self.held:
            return False
        lock = self.folder.lock(name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        self.held[name] = lock
        return True

    def release(self, name: str) -> None:
        self.held.pop(name).release()

    def release_all(self) -> None:
        for name in list(self.held):
            self.release(name)
