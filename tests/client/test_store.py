"""The store by path, for trio and for threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from crailfs.client.blocking import BlockingStore
from crailfs.client.store import CrailStore
from crailfs.errors import (
    AuthenticationError,
    ExistsError,
    InvalidError,
    IsADirectoryCrailError,
    NotADirectoryCrailError,
    NotEmptyError,
    NotFoundError,
    NotPermittedError,
)
from crailfs.records import NodeKind, StorageClass, Tier
from crailfs.units import MIB
from tests.support.cluster import Cluster, running_cluster


async def test_files(tmp_path: Path) -> None:
    data = random.Random(2).randbytes(3 * MIB + 17)
    async with (
        running_cluster(tmp_path) as cluster,
        CrailStore.connect(cluster.client_config()) as store,
    ):
        await store.write("/a", data)
        assert await store.read("a") == data
        assert await store.read("/a", 1000, 20) == data[1000:1020]
        async with await store.open("/a") as file:
            assert file.size == len(data)
            assert await file.read(10) == data[:10]
            buffer = bytearray(20)
            assert await file.readinto(buffer) == 20 and buffer == data[10:30]
            assert await file.read() == data[30:]
            assert await file.read() == b""
            assert await file.append(b"end") == len(data)
            await file.truncate(5)
            file.position = 2
            await file.write(b"XY")
            await file.sync()
        assert await store.read("/a") == data[:2] + b"XY" + data[4:5]
        await store.write("/a", b"short")
        assert await store.read("/a") == b"short"
        with pytest.raises(ExistsError):
            await store.create("/a", exclusive=True)
        with pytest.raises(NotFoundError):
            await store.open("/missing")


async def test_directories(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path) as cluster,
        CrailStore.connect(cluster.client_config()) as store,
    ):
        await store.mkdir("/x/y/z", parents=True)
        await store.mkdir("/x/y/z", parents=True, exist_ok=True)
        with pytest.raises(ExistsError):
            await store.mkdir("/x/y")
        for name in ("b", "a", "ü"):
            await store.write(f"/x/{name}", name.encode())
        assert [entry.name for entry in await store.list("/x")] == ["a", "b", "y", "ü"]
        await store.rename("/x/a", "/x/y/moved")
        assert await store.read("/x/y/moved") == b"a"
        with pytest.raises(ExistsError):
            await store.rename("/x/b", "/x/y/moved", replace=False)
        await store.symlink("/x/link", "../x/y")
        assert await store.read("/x/link/moved") == b"a"
        await store.symlink("/x/loop", "loop")
        with pytest.raises(InvalidError):
            await store.lookup("/x/loop")
        assert (await store.lookup("/x/loop", follow=False)).kind is NodeKind.SYMLINK
        with pytest.raises(NotEmptyError):
            await store.delete("/x")
        with pytest.raises(NotADirectoryCrailError):
            await store.list("/x/b")
        with pytest.raises(IsADirectoryCrailError):
            await store.open("/x/y")
        assert await store.exists("/x") and not await store.exists("/x/b/c")
        await store.delete("/x", recursive=True)
        assert await store.list("/") == []
        with pytest.raises(InvalidError):
            await store.delete("/", recursive=True)


async def test_deleting_a_large_and_deep_tree(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path) as cluster,
        CrailStore.connect(cluster.client_config()) as store,
    ):
        path = "/deep"
        for _ in range(60):
            await store.mkdir(path)
            await store.write(path + "/file", b"x")
            path += "/d"
        await store.mkdir("/deep/wide")
        for number in range(1100):
            await store.symlink(f"/deep/wide/{number}", "x")
        listed = await store.list("/deep/wide")
        assert len(listed) == 1100 == len({entry.name for entry in listed})
        await store.delete("/deep", recursive=True)
        assert not await store.exists("/deep")
        assert (await store.statistics()).node_count == 1


async def test_multifile_reads_as_one_stream_in_name_order(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path) as cluster,
        CrailStore.connect(cluster.client_config()) as store,
    ):
        await store.mkdir("/m", kind=NodeKind.MULTIFILE)
        parts = {f"part-{number}": bytes([number]) * (number * 50_000) for number in range(5)}
        for name in reversed(parts):
            await store.write(f"/m/{name}", parts[name])
        async with await store.open_multifile("/m") as stream:
            assert b"".join([piece async for piece in stream]) == b"".join(parts.values())
            assert await stream.read() == b""
        with pytest.raises(NotPermittedError):
            await store.mkdir("/m/no")


async def test_key_values(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path) as cluster,
        CrailStore.connect(cluster.client_config("local")) as store,
        CrailStore.connect(cluster.client_config("tcp")) as other,
    ):
        await store.mkdir("/t", kind=NodeKind.TABLE)
        for value in (b"", b"one", b"x" * 200_000, bytes(65_536), b"last"):
            await store.put("/t", "key", value)
            assert await store.get("/t", "key") == value
            assert await other.get("/t", "key") == value
        await other.put("/t", "key", b"theirs")
        assert await store.get("/t", "key") == b"theirs"
        await store.put("/t", b"another", b"2")
        assert await store.keys("/t") == ["another", "key"]
        await store.delete_key("/t", "key")
        with pytest.raises(NotFoundError):
            await other.get("/t", "key")
        with pytest.raises(NotPermittedError):
            await store.put("/", "key", b"not a table")


async def test_a_reader_sees_one_value_as_a_whole(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path) as cluster,
        CrailStore.connect(cluster.client_config("local")) as store,
        CrailStore.connect(cluster.client_config("tcp")) as other,
    ):
        await store.mkdir("/t", kind=NodeKind.TABLE)
        await store.put("/t", "key", b"\0" * 100)
        done = trio.Event()

        async def put() -> None:
            for number in range(40):
                await store.put("/t", "key", bytes([number]) * (number * 5_000 + 100))
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(put)
            while not done.is_set():
                value = await other.get("/t", "key")
                assert value == bytes([value[0]]) * (value[0] * 5_000 + 100)


async def test_classes_are_inherited(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path) as cluster,
        CrailStore.connect(cluster.client_config()) as store,
    ):
        await store.mkdir("/disk", storage_class=StorageClass(Tier.DISK, Tier.DISK))
        await store.write("/disk/file", b"x" * 100_000)
        assert str(await store.get_class("/disk/file")) == "disk"
        tiers = {tier.tier: tier for tier in (await store.statistics()).tiers}
        assert tiers[Tier.DISK].free_blocks <= tiers[Tier.DISK].total_blocks - 2
        await store.set_class("/disk", "memory>disk")
        assert await store.get_class("/disk") == StorageClass(Tier.MEMORY, Tier.DISK)
        with pytest.raises(InvalidError):
            await store.set_class("/disk", "tape")


async def in_thread(cluster: Cluster, work: Callable[[BlockingStore], None]) -> None:
    def run() -> None:
        with BlockingStore(cluster.client_config()) as store:
            work(store)

    await trio.to_thread.run_sync(run)


async def test_blocking_store(tmp_path: Path) -> None:
    data = random.Random(3).randbytes(300_000)

    def work(store: BlockingStore) -> None:
        store.mkdir("/d/e", parents=True)
        store.write("/d/f", data)
        assert store.read("/d/f") == data
        assert [entry.name for entry in store.list("/d")] == ["e", "f"]
        with store.create("/d/g") as file:
            file.write(b"0123456789")
            file.write_at(2, b"xy")
            assert file.position == 10 and file.size == 10
            file.position = 1
            assert file.read(4) == b"1xy4"
            assert file.append(b"!") == 10
            file.sync()
        with store.open_file("/d/g") as file:
            buffer = bytearray(11)
            assert file.readinto(buffer) == 11 and buffer == b"01xy456789!"
            file.truncate(3)
            file.flush()
            assert file.read_at(0, 100) == b"01x"
        store.rename("/d/g", "/d/h")
        store.symlink("/d/s", "h")
        assert store.read("/d/s") == b"01x"
        store.mkdir("/t", kind=NodeKind.TABLE)
        store.put("/t", "k", b"v")
        assert store.get("/t", "k") == b"v" and store.keys("/t") == ["k"]
        store.delete_key("/t", "k")
        store.mkdir("/m", kind=NodeKind.MULTIFILE)
        store.write("/m/1", b"a")
        store.write("/m/2", b"b")
        assert store.read_multifile("/m") == b"ab"
        store.set_class("/d", "memory")
        assert str(store.get_class("/d")) == "memory"
        assert store.statistics().node_count > 5
        with pytest.raises(NotFoundError):
            store.lookup("/nothing")
        store.delete("/d", recursive=True)
        assert not store.exists("/d")
        threads = [
            threading.Thread(target=store.write, args=(f"/thread-{n}", b"%d" % n)) for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [store.read(f"/thread-{n}") for n in range(4)] == [b"0", b"1", b"2", b"3"]

    async with running_cluster(tmp_path) as cluster:
        await in_thread(cluster, work)


async def test_life_of_a_blocking_store(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        config = cluster.client_config()

        def run() -> None:
            store = BlockingStore(config)
            with pytest.raises(InvalidError):
                store.exists("/")
            store.open()
            with pytest.raises(InvalidError):
                store.open()
            file = store.create("/left-open")
            file.write(b"committed by close")
            store.close()
            store.close()
            with pytest.raises(InvalidError):
                store.exists("/")
            with pytest.raises(InvalidError):
                file.write(b"late")
            with store:
                assert store.read("/left-open") == b"committed by close"

        await trio.to_thread.run_sync(run)


async def test_a_wrong_secret_is_refused_at_once(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        config = cluster.client_config()
        wrong = type(config)(
            metadata=config.metadata,
            credentials=type(config.credentials)(
                cluster_id=b"", secret=b"not the secret of this cluster"
            ),
        )
        with trio.fail_after(5), pytest.raises(AuthenticationError):
            async with CrailStore.connect(wrong):
                pass
