"""Cache of encoded prompts on disk, so that text encoders run once per prompt and can then be freed."""

import hashlib
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pcpo_fast.config.wording import counted
from pcpo_fast.distributed.collectives import barrier, local_rank, local_world_size, shared_errors
from pcpo_fast.errors import UserError

Encoded = Mapping[str, Tensor | Sequence[Tensor]]
"""What encoders make of prompts, one row each; rows may have different lengths."""


class EmbeddingCache:
    """One safetensors file per prompt under ``folder / fingerprint``.

    The fingerprint covers everything that an embedding depends on besides the prompt, including the content of the
    encoders, so a changed model or sequence length never uses old files. An unreadable file is encoded again.
    Prompts of a model that masks their padding are stored without it.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder / fingerprint

    def path(self, prompt: str) -> Path:
        """Path of a prompt's embeddings."""
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Distinct prompts without a complete file, in order."""
        return [prompt for prompt in dict.fromkeys(prompts) if not _is_whole(self.path(prompt))]

    def store(self, prompt: str, embeddings: dict[str, Tensor]) -> None:
        """Write a prompt's embeddings atomically."""
        path = self.path(prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # hosts may share the folder
        save_file({name: value.contiguous().cpu() for name, value in embeddings.items()}, temporary)
        temporary.replace(path)

    def load(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Stack the embeddings of prompts that are in the cache: each tensor [len(prompts), ...] on the CPU.

        Where prompts have different lengths, the shorter ones are padded with zeros, and so are their masks.
        """
        distinct = {prompt: load_file(self.path(prompt)) for prompt in dict.fromkeys(prompts)}
        names = next(iter(distinct.values())).keys()
        return {name: pad_sequence([distinct[prompt][name] for prompt in prompts], True) for name in names}

    def fill(
        self,
        prompts: Sequence[str],
        encode: Callable[[list[str]], Encoded],
        size: Callable[[Sequence[str]], float] | None = None,
        batch_size: int = 16,
    ) -> int:
        """Encode missing prompts, distributed over the ranks of this machine, and wait for all of them.

        Args:
            prompts: prompts that must be in the cache afterwards.
            encode: encodes prompts; called only if some are missing.
            size: bytes that prompts will take, or fewer; called only if some are missing. None: not known.
            batch_size: prompts per call of ``encode``.

        Returns:
            Number of missing prompts.

        Raises:
            UserError: the disk has no space for the prompts, by ``size`` or, after the first batch, by what it took;
                or a file cannot be written.
        """
        missing = self.missing(prompts)
        barrier()  # before any rank writes, because all must split the same list
        mine = missing[local_rank() :: local_world_size()]
        with shared_errors():
            if missing and size is not None:
                self._check_space(size(missing) / len(missing), len(missing), len(missing))
            for start in range(0, len(mine), batch_size):
                chunk = mine[start : start + batch_size]
                rows = encode(chunk)
                try:
                    for index, prompt in enumerate(chunk):
                        self.store(prompt, {name: value[index] for name, value in rows.items()})
                except (OSError, SafetensorError) as error:
                    reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
                    raise UserError(
                        f"model.embedding_cache: {self.folder.parent} cannot be written: {reason}"
                    ) from None
                if start == 0:
                    each = sum(row.nbytes for value in rows.values() for row in value) / len(chunk)
                    self._check_space(each, len(missing) - local_world_size() * len(chunk), len(missing))
        return len(missing)

    def _check_space(self, each: float, left: int, missing: int) -> None:
        """Refuse, before hours of encoding, what the disk has no space for."""
        place = next(folder for folder in self.folder.absolute().parents if folder.is_dir())
        free = shutil.disk_usage(place).free
        if left * each > free:
            raise UserError(
                f"model.embedding_cache: {counted(missing, 'prompt')} would take {missing * each / 1e9:.3g} GB "
                f"({each / 1e6:.3g} MB each) in {self.folder.parent}, where {free / 1e9:.3g} GB are free: choose "
                "another folder, fewer prompts, or a smaller model.max_sequence_length"
            )


def _is_whole(path: Path) -> bool:
    """Whether a complete safetensors file exists, judging by its header and size."""
    try:
        with safe_open(path, "pt"):
            return True
    except (SafetensorError, OSError, ValueError):
        return False
