"""Temporary offload of tensors to host memory, by resizing their storages in place."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Offload:
    """Moves tensors to host memory for the duration of a block.

    A tensor and its views stay the same objects over the same storage; only the storage's memory is freed and
    reallocated. So the many references that a distributed engine holds to its optimizer's state remain valid.

    Args:
        device_type: only tensors on such a device are offloaded: "cuda", or "cpu" for tests without a GPU.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        self.device_type = device_type
        self._host: dict[int, Tensor] = {}  # by storage address; reused, as pinning memory takes longer than a copy

    @contextmanager
    def without(self, tensors: Sequence[Tensor], needed: Sequence[Tensor] = ()) -> Iterator[None]:
        """Offload ``tensors`` within the block, which must not access them; afterwards they are bitwise the same.

        Args:
            tensors: to be offloaded.
            needed: tensors used within the block; tensors that share memory with them are not offloaded.
        """
        stay = {tensor.untyped_storage()._cdata for tensor in needed}
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
        offloaded = {
            name: storage
            for name, storage in storages.items()
            if name not in stay and storage.device.type == self.device_type and storage.nbytes()
        }
        if not offloaded:
            yield
            return
        sizes = {name: storage.nbytes() for name, storage in offloaded.items()}
        hosts = {name: self._copy(name, storage) for name, storage in offloaded.items()}
        self._host = hosts  # drops buffers of tensors that are no longer offloaded
        self._wait()
        for storage in offloaded.values():
            storage.resize_(0)
        try:
            yield
        finally:
            for name, storage in offloaded.items():
                storage.resize_(sizes[name])
                storage.copy_(hosts[name].untyped_storage(), non_blocking=True)
            self._wait()

    def _copy(self, name: int, storage: torch.UntypedStorage) -> Tensor:
        host = self._host.get(name)
        if host is None or host.numel() != storage.nbytes():
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self.device_type == "cuda")
        host.untyped_storage().copy_(storage, non_blocking=True)
        return host

    def _wait(self) -> None:
        if self.device_type == "cuda":
            torch.cuda.synchronize()
