"""What a cache is made of: numbers in few bits, records, the key of a document, and files that may be cut off."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchtune.data import padded_collate_packed, padded_collate_sft
from torchtune.datasets import PackedDataset

from kd_recipes.batch import IGNORE_INDEX, Batch, shift_labels
from kd_recipes.errors import ConfigError
from kd_recipes.storage import StorageError
from kd_recipes.teachers.cache.bits import pack, plane_sizes, unpack
from kd_recipes.teachers.cache.content import documents, uniform
from kd_recipes.teachers.cache.record import NOTHING, Kept, Layout, from_code, to_code
from kd_recipes.teachers.cache.store import Store, Writer, has_records


@given(st.data())
def test_numbers_come_back_from_as_few_bits_as_they_need(data: st.DataObject) -> None:
    num_bits = data.draw(st.integers(1, 20))
    values = np.array(data.draw(st.lists(st.integers(0, 2**num_bits - 1), max_size=50)), np.uint32)
    planes = pack(values, num_bits)
    assert [len(plane) for plane in planes] == plane_sizes(len(values), num_bits)
    assert sum(map(len, planes)) == -(-len(values) * num_bits // 8) or num_bits > 8
    assert unpack(planes, len(values), num_bits).tolist() == values.tolist()


def test_nats_are_rounded_to_half_a_step_and_nothing_stays_nothing() -> None:
    nats = -np.random.default_rng(0).uniform(0, 31.9, 1000)
    assert np.abs(from_code(to_code(nats)) - nats).max() <= 1 / 256
    assert from_code(to_code(np.array([-np.inf, -1e9, 0.0]))).tolist() == [-np.inf, -(NOTHING - 1) / 128, 0]


@given(st.data())
@pytest.mark.parametrize("is_drawn", [False, True])
def test_a_record_comes_back(is_drawn: bool, data: st.DataObject) -> None:
    draw = np.random.default_rng(data.draw(st.integers(0, 999)))
    layout = Layout(
        num_ids=data.draw(st.sampled_from([2, 256, 300, 151_936])), width=5, is_drawn=is_drawn, num_temperatures=2
    )
    num_rows = data.draw(st.integers(1, 9))
    num_n = draw.integers(1, 6, num_rows).astype(np.uint32)
    size = int(num_n.sum())
    log_p_M = np.concatenate([np.sort(draw.integers(0, 4095, n)) for n in num_n]).astype(np.uint32)
    column = [draw.integers(0, high, count).astype(np.uint32) for high, count in ((layout.num_ids, size), (6, size))]
    kept = Kept(
        num_n,
        column[0],
        log_p_M,
        column[1] if is_drawn else column[1][:0],
        num_n[:0] if is_drawn else draw.integers(0, 4096, num_rows).astype(np.uint32),
        draw.integers(0, layout.num_ids, num_rows).astype(np.uint32),
        draw.integers(0, 4096, (num_rows, 6)).astype(np.uint32),
    )
    positions_n = np.sort(draw.permutation(20)[:num_rows])
    record = memoryview(layout.encode(20, positions_n, kept))
    found_n, found = layout.decode(record)
    assert layout.positions(record).tolist() == found_n.tolist() == positions_n.tolist()
    for name, values in vars(kept).items():
        assert np.array_equal(getattr(found, name), values), name


TEXTS = [list(range(10 * i, 10 * i + 3 + i)) for i in range(1, 6)]
SAMPLES = [{"tokens": ids, "labels": [IGNORE_INDEX] * (i % 2) + ids[i % 2 :]} for i, ids in enumerate(TEXTS)]


def _keys(batch: Batch) -> dict[bytes, list[int]]:
    return {document.key: document.positions_n.tolist() for document in documents(batch)}


def test_a_document_has_one_key_whatever_it_is_packed_with_padded_to_or_ordered_by() -> None:
    samples: list[dict[str, Any]] = SAMPLES
    padded = shift_labels(padded_collate_sft(samples, padding_idx=0))
    backwards = shift_labels(padded_collate_sft(samples[::-1], padding_idx=7))
    packs = PackedDataset(samples, max_seq_len=20, padding_idx=0, split_across_pack=False)
    packed = shift_labels(padded_collate_packed([packs[i] for i in range(len(packs))]))
    assert len(_keys(padded)) == len(TEXTS)
    assert _keys(padded) == _keys(backwards) == _keys(packed)
    alone = [_keys(shift_labels(padded_collate_sft([sample], padding_idx=0))) for sample in samples]
    assert _keys(padded) == {key: value for keys in alone for key, value in keys.items()}


def test_a_document_that_is_cut_is_two_others() -> None:
    samples: list[dict[str, Any]] = SAMPLES
    packs = PackedDataset(samples, max_seq_len=9, padding_idx=0, split_across_pack=True)
    cut = shift_labels(padded_collate_packed([packs[i] for i in range(len(packs))]))
    whole = shift_labels(padded_collate_sft(samples, padding_idx=0))
    assert _keys(cut).keys() - _keys(whole).keys()
    labels = cut.labels_BS[cut.labels_BS != IGNORE_INDEX]
    assert sum(len(document.positions_n) for document in documents(cut)) == len(labels)
    assert torch.cat([torch.from_numpy(d.ids[d.positions_n + 1]) for d in documents(cut)]).tolist() == labels.tolist()


def test_what_is_drawn_for_a_document_depends_on_it_alone() -> None:
    some, all_of_them = np.array([1, 4]), np.arange(6)
    one, other = b"a" * 16, b"b" * 16
    together = uniform([(one, all_of_them), (other, all_of_them)], 3)
    assert np.array_equal(uniform([(other, some)], 3), together[6:][some])
    assert not np.array_equal(together[:6], together[6:])


def _write(directory: Path, part: int, *names: str) -> None:
    writer = Writer(directory, part)
    for name in names:
        writer.add(name.encode() * 16, np.arange(3), name.encode() * 100)
    writer.close()


def test_what_was_not_committed_is_cut_off_and_the_rest_is_not_written_again(tmp_path: Path) -> None:
    _write(tmp_path, 0, "a", "b")
    data, index = tmp_path / "part-00000.data", tmp_path / "part-00000.index"
    whole = data.read_bytes(), index.read_bytes()
    for rest in (b"", b"x", index.read_bytes()[:-5], bytes(44)):  # half a line, and one that was never synced
        data.write_bytes(whole[0] + b"half a record")
        index.write_bytes(whole[1] + rest)
        if len(rest) > 44:
            index.write_bytes(whole[1] + rest[44:])
        assert set(Store(tmp_path)) == {b"a" * 16, b"b" * 16}
        _write(tmp_path, 0)
        assert (data.read_bytes(), index.read_bytes()) == whole
    _write(tmp_path, 1, "c")
    store = Store(tmp_path)
    assert len(store) == 3
    entry = store.find(b"c" * 16)
    assert entry is not None
    assert bytes(store.read(entry)) == b"c" * 100


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    _write(tmp_path, 0, "a", "b")
    _damage(tmp_path, 0, 150)
    store = Store(tmp_path)
    entries = [store.find(name * 16) for name in (b"a", b"b")]
    assert entries[0] is not None and entries[1] is not None  # noqa: PT018
    store.read(entries[0])
    with pytest.raises(StorageError, match="damaged at byte 100"):
        store.read(entries[1])
    assert store.damage().keys() == {b"b" * 16}
    store.forget(store.damage())
    assert set(Store(tmp_path)) == {b"a" * 16}
    _write(tmp_path, 1, "b")
    assert not Store(tmp_path).damage()


def _damage(directory: Path, part: int, *offsets: int) -> None:
    data = directory / f"part-{part:05}.data"
    content = bytearray(data.read_bytes())
    for offset in offsets:
        content[offset] ^= 4
    data.write_bytes(content)


def test_damage_that_damage_hides_is_forgotten_with_it(tmp_path: Path) -> None:
    _write(tmp_path, 0, "a", "b", "a")
    _write(tmp_path, 1, "a", "b")
    _damage(tmp_path, 0, 50, 250)  # both of a, not b
    _damage(tmp_path, 1, 50, 150)
    store = Store(tmp_path)
    assert store.damage().keys() == {b"a" * 16, b"b" * 16}
    store.forget(store.damage())
    mended = Store(tmp_path)
    assert set(mended) == {b"b" * 16}  # an older one that is whole is there again
    assert not mended.damage()


def test_what_another_process_has_mended_is_not_forgotten(tmp_path: Path) -> None:
    _write(tmp_path, 0, "a", "b")
    _damage(tmp_path, 0, 150)
    store, other = Store(tmp_path), Store(tmp_path)
    damage = store.damage()
    other.forget(damage)
    _write(tmp_path, 0, "b")
    store.forget(damage)
    assert set(Store(tmp_path)) == {b"a" * 16, b"b" * 16}


def test_every_record_is_looked_after_by_one_process(tmp_path: Path) -> None:
    names = [chr(code) for code in range(ord("a"), ord("k"))]
    _write(tmp_path, 0, *names)
    _damage(tmp_path, 0, *range(50, 1000, 100))
    store = Store(tmp_path)
    shares = [store.share(rank, 3) for rank in range(3)]
    assert sorted(key for share in shares for key in share) == sorted(store)
    assert [len(store.damage(share)) for share in shares] == [len(share) for share in shares]


def _while_locking(monkeypatch: pytest.MonkeyPatch, event: Callable[[], object]) -> None:
    """Let something happen after a writer has opened its data and before it has locked it."""
    lock = fcntl.flock

    def locks(*args: Any) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        event()
        lock(*args)

    monkeypatch.setattr(fcntl, "flock", locks)


def test_an_index_that_is_replaced_before_the_lock_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, 0, "a", "b")
    _damage(tmp_path, 0, 50)
    store = Store(tmp_path)
    _while_locking(monkeypatch, lambda: store.forget(store.damage()))
    _write(tmp_path, 0, "c")
    assert set(Store(tmp_path)) == {b"b" * 16, b"c" * 16}


def test_a_directory_that_is_replaced_before_the_lock_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, 0, "a")

    def replace() -> None:
        for file in tmp_path.iterdir():
            file.unlink()
        _write(tmp_path, 0, "b")

    _while_locking(monkeypatch, replace)
    with pytest.raises(ConfigError, match="no other process"):
        Writer(tmp_path, 0)


def test_one_line_tells_that_there_are_records(tmp_path: Path) -> None:
    assert not has_records(tmp_path)
    _write(tmp_path, 0)
    assert not has_records(tmp_path)
    _write(tmp_path, 1, "a", "b")
    assert has_records(tmp_path)
    (tmp_path / "part-00001.index").write_bytes(bytes(44))
    assert not has_records(tmp_path)


def test_a_part_has_one_writer(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 0)
    with pytest.raises(ConfigError, match="no other process"):
        Writer(tmp_path, 0)
    writer.close()


def test_data_that_is_shorter_than_its_index_is_said_to_be(tmp_path: Path) -> None:
    _write(tmp_path, 0, "a")
    for content in (b"a" * 50, b""):
        (tmp_path / "part-00000.data").write_bytes(content)
        with pytest.raises(StorageError, match="shorter"):
            Store(tmp_path)
    (tmp_path / "part-00000.data").unlink()
    with pytest.raises(StorageError, match="shorter"):
        Store(tmp_path)


def test_files_of_other_names_are_no_parts(tmp_path: Path) -> None:
    _write(tmp_path, 0, "a")
    for name in ("part-zz.index", "part-00001.index.old", "part-0000x.index"):
        shutil.copy(tmp_path / "part-00000.index", tmp_path / name)
    assert len(Store(tmp_path)) == 1
