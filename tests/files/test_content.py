"""Files known by their content: read once, remembered, and never mistaken for what they were."""

import hashlib
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import pcpo_fast.distributed.collectives as distributed
import pcpo_fast.files.content
from pcpo_fast.errors import UserError
from pcpo_fast.files.content import Contents, part_files, pipeline_files

OLD, NEW = b"old weights", b"new weights"


def true_hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of this very moment are remembered, too."""
    monkeypatch.setattr(pcpo_fast.files.content, "SETTLED", -60.0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every file that is read."""
    counted, digest = [], hashlib.file_digest

    def counting(file, method):  # type: ignore[no-untyped-def]
        counted.append(1)
        return digest(file, method)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return counted


def rewritten(file: Path, change: Callable[[], object]) -> None:
    """Change a file and give it its date back; its ctime moves on as soon as the clock ticks."""
    before = file.stat()
    change()
    while file.stat().st_ctime_ns == before.st_ctime_ns and file.stat().st_ino == before.st_ino:
        change()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_a_file_is_read_once_by_any_number_of_readers(tmp_path: Path, reads: list[int]) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(OLD)
    for _ in range(3):
        assert Contents(tmp_path / "record").of_file(file) == true_hash(OLD)
    assert len(reads) == 1
    (tmp_path / "link").symlink_to(file)
    assert Contents(tmp_path / "record").of_files({"a": file, "b": tmp_path / "link"}) == {
        "a": true_hash(OLD),
        "b": true_hash(OLD),
    }
    assert len(reads) == 1
    assert Contents().of_file(file) == Contents().of_file(file) == true_hash(OLD)
    assert len(reads) == 3


def in_place(file: Path) -> None:
    file.write_bytes(NEW)


def by_rename(file: Path) -> None:
    file.with_name("new").write_bytes(NEW)
    file.with_name("new").replace(file)


def one_byte(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.write(NEW[:1])


@pytest.mark.parametrize("change", [in_place, by_rename, one_byte])
def test_the_same_size_and_date_hide_nothing(change: Callable[[Path], None], tmp_path: Path) -> None:
    file, contents = tmp_path / "model.safetensors", Contents(tmp_path / "record")
    file.write_bytes(OLD)
    assert contents.of_file(file) == true_hash(OLD)
    rewritten(file, lambda: change(file))
    assert contents.of_file(file) == true_hash(file.read_bytes()) != true_hash(OLD)


def test_a_snapshot_of_links_is_what_they_lead_to(tmp_path: Path) -> None:
    contents = Contents(tmp_path / "record")
    for name, data in (("one", OLD), ("two", NEW)):
        (tmp_path / name).write_bytes(data)
        os.utime(tmp_path / name, ns=(0, 0))
    link = tmp_path / "model.safetensors"
    for name, data in (("one", OLD), ("two", NEW), ("one", OLD)):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name)
        assert contents.of_files({"model": link}) == {"model": true_hash(data)}


def test_what_was_written_a_moment_ago_is_not_remembered(
    tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a tick of the file system's clock a second change leaves no trace."""
    monkeypatch.setattr(pcpo_fast.files.content, "SETTLED", 3600.0)
    file, contents = tmp_path / "model.safetensors", Contents(tmp_path / "record")
    for data in (OLD, NEW):
        file.write_bytes(data)
        assert contents.of_file(file) == contents.of_file(file) == true_hash(data)
    assert len(reads) == 4


@pytest.mark.parametrize("damage", [b"", b"\xff\x00", b"0" * 32, b"0" * 32 + b" " + b"0" * 32 + b"\n", None])
def test_a_damaged_record_is_made_again(damage: bytes | None, tmp_path: Path, reads: list[int]) -> None:
    file, record = tmp_path / "model.safetensors", tmp_path / "record"
    file.write_bytes(OLD)
    Contents(record).of_file(file)
    (entry,) = record.iterdir()
    entry.write_bytes(entry.read_bytes().replace(true_hash(OLD)[:4].encode(), b"beef") if damage is None else damage)
    assert [Contents(record).of_file(file) for _ in range(2)] == [true_hash(OLD)] * 2
    assert len(reads) == 2


def hash_all(folder: Path) -> dict[str, str]:
    files = {f"{number}": folder / f"{number}.bin" for number in range(20)}
    return Contents(folder / "record").of_files(files)


def test_processes_share_a_record(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.bin").write_bytes(b"%d" % number)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(hash_all, [tmp_path] * 8)
    assert found == [{f"{number}": true_hash(b"%d" % number) for number in range(20)}] * 8
    assert len(list((tmp_path / "record").iterdir())) == 20  # nothing half-written stays


def test_reading_anew_finds_what_left_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store without inodes and times of its own: nothing of a file's status changes with its bytes."""
    monkeypatch.setattr(pcpo_fast.files.content, "_identity", lambda _: "all alike")
    file, record = tmp_path / "model.safetensors", tmp_path / "record"
    file.write_bytes(OLD)
    assert Contents(record).of_file(file) == true_hash(OLD)
    file.write_bytes(NEW)
    assert Contents(record).of_file(file) == true_hash(OLD)  # what --verify is for
    with monkeypatch.context() as patch:
        patch.setattr(pcpo_fast.files.content, "write_atomically", refuse)
        with pytest.raises(UserError, match=r"record/\w+ is out of date and cannot be written: No space left"):
            Contents(record, anew=True).of_file(file)
    with pytest.warns(UserWarning, match=r"model.safetensors changed although its size and times did not"):
        assert Contents(record, anew=True).of_file(file) == true_hash(NEW)
    assert Contents(record).of_file(file) == true_hash(NEW)


def refuse(*_: object) -> None:
    raise OSError(28, os.strerror(28))


def test_a_record_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pcpo_fast.files.content, "write_atomically", refuse)
    (tmp_path / "a").write_bytes(OLD)
    assert Contents(tmp_path / "record").of_file(tmp_path / "a") == true_hash(OLD)
    with pytest.raises(UserError, match=r"/b cannot be read: No such file or directory$"):
        Contents(tmp_path / "record").of_files({"b": tmp_path / "b"})


def test_much_to_read_is_announced_until_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pcpo_fast.files.content, "ANNOUNCED", 2 * len(OLD))
    for name in "ab":
        (tmp_path / name).write_bytes(OLD)
    files = {name: tmp_path / name for name in "ab"}
    Contents(tmp_path / "record").of_files(files)
    said = capsys.readouterr().err
    assert said == f"Hashing 0.0 GB of model files (once: the hashes are kept in {tmp_path / 'record'})\n"
    Contents(tmp_path / "record").of_files(files)
    assert capsys.readouterr().err == ""


WEIGHTS = {
    "config.json": True,
    "model.safetensors": True,
    "model-00001-of-00002.safetensors": True,
    "model.safetensors.index.json": True,
    "vocab.txt": True,
    "spiece.model": True,
    "model.fp16.safetensors": False,
    "model.safetensors.index.fp16.json": False,
    "pytorch_model.bin": False,
    "pytorch_model.bin.index.json": False,
    "flax_model.msgpack": False,
    "tf_model.h5": False,
    "README.md": False,
    ".model.lock": False,
}


def test_files_that_loading_a_part_reads(tmp_path: Path) -> None:
    """A later download of other formats and variants into a snapshot changes nothing that counts."""
    part = tmp_path / "text_encoder"
    part.mkdir()
    for name in WEIGHTS:
        (part / name).touch()
    (part / "onnx").mkdir()
    assert set(part_files(part)) == {name for name, counts in WEIGHTS.items() if counts}
    assert {"model.fp16.safetensors", "model.safetensors.index.fp16.json"} <= part_files(part, "fp16").keys()
    assert pipeline_files(tmp_path, ["text_encoder", "absent"]).keys() == {
        f"text_encoder/{n}" for n in part_files(part)
    }
    for name in ("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (part / name).unlink()
    # diffusers takes the .bin here, a newer one perhaps the variant: both count.
    assert {"model.fp16.safetensors", "pytorch_model.bin"} <= part_files(part).keys()


def test_one_rank_of_a_machine_computes_and_the_others_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed.socket, "gethostname", lambda: "b")
    computed: list[int] = []
    others = [("a", ("of a",)), ("a", ()), ("b", ("of b",))]

    def gather(mine: object) -> list[object]:
        return [*others, mine] if isinstance(mine, tuple) else [None, None, None, mine]

    monkeypatch.setattr(distributed, "gather_objects", gather)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.once_per_machine(lambda: computed.append(1)) == "of b"  # type: ignore[comparison-overlap]
    assert computed == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert distributed.once_per_machine(lambda: "own") == "own"
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, "elsewhere it failed"])
    with pytest.raises(UserError, match=r"^elsewhere it failed$"):
        distributed.once_per_machine(lambda: "own")
