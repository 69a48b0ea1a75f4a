"""Device memory given back for a while: storages are emptied, and filled again from host memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Offload:
    """Takes tensors off a device for the time of a block.

    A tensor and all views of it stay the same objects over the same storage, which loses its memory and gets it back:
    a distributed engine holds many references to its optimiser's state, and none has to be told.

    Args:
        device_type: only tensors on such a device are offloaded: "cuda", or "cpu" to see it work without one.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        self.device_type = device_type
        self._host: dict[int, Tensor] = {}  # by address of the storage; pinning memory anew takes longer than a copy

    @contextmanager
    def without(self, tensors: Sequence[Tensor], needed: Sequence[Tensor] = ()) -> Iterator[None]:
        """Within the block nothing may read or write ``tensors``; afterwards they have the same bits as before.

        Args:
            tensors: what is offloaded.
            needed: tensors that are used within the block; one of ``tensors`` that shares memory with them stays.
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
        self._host = hosts  # what is no longer offloaded is forgotten
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
