"""A guest: QEMU with an NVDIMM or two, an NVMe disk, a network card and the agent's channel."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from channel import Channel, GuestError
from image import Image
from processes import dies_with_us

BOOT_LIMIT_S = 180
"""An idle machine takes about 10 s, one that does much else several times that."""
BOOT_ATTEMPTS = 3
CONSOLE_TAIL_LINES = 40
CONSOLE_SEARCHED_LINES = 200


@dataclass(frozen=True)
class Media:
    """The files behind a guest's devices; they keep what the guest wrote when it is gone."""

    devdax: Path
    nvme: Path
    fsdax: Path | None = None

    @classmethod
    def in_directory(
        cls, directory: Path, *, devdax_mib: int, nvme_mib: int, fsdax_mib: int = 0
    ) -> Media:
        """Files in ``directory``, made (sparse, zeros) where they are missing.

        ``fsdax_mib`` 0: no second NVDIMM.
        """
        directory.mkdir(parents=True, exist_ok=True)
        files = {"devdax": devdax_mib, "nvme": nvme_mib, "fsdax": fsdax_mib}
        for name, mib in files.items():
            path = directory / f"{name}.img"
            if mib and not path.exists():
                with open(path, "wb") as file:
                    file.truncate(mib << 20)
        fsdax = directory / "fsdax.img" if fsdax_mib else None
        return cls(directory / "devdax.img", directory / "nvme.img", fsdax)


@dataclass(frozen=True)
class Shape:
    """What a guest is made of."""

    node: int = 1
    nodes: int = 1
    cpus: int = 2
    memory_mib: int = 2048


class Machine:
    """A running guest; ``boot`` makes it."""

    def __init__(
        self, process: subprocess.Popen[bytes], channel: Channel, directory: Path, booted_s: float
    ) -> None:
        self.process = process
        self.channel = channel
        self.directory = directory
        self.booted_s = booted_s

    @property
    def out(self) -> Path:
        """The guest's /lab/out."""
        return self.directory / "out"

    def power_off(self) -> None:
        """Kills QEMU: to the guest, the mains fail."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def console_tail(directory: Path) -> str:
    """The end of what the guest in ``directory`` wrote to its console.

    Where the kernel gave up, from there on: a call trace is longer than the tail.
    """
    path = directory / "console.log"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    begin = max(0, len(lines) - CONSOLE_TAIL_LINES)
    for index in range(max(0, len(lines) - CONSOLE_SEARCHED_LINES), begin):
        if re.search(r"Kernel panic|BUG:|Oops", lines[index]):
            begin = index
            break
    return "\n".join(lines[begin:])


def panicked(directory: Path) -> bool:
    """Whether the kernel of a guest with its console somewhere in ``directory`` has given up."""
    consoles = directory.glob("**/console.log")
    return any("Kernel panic" in path.read_text(errors="replace") for path in consoles)


def two_ends() -> tuple[socket.socket, socket.socket]:
    """A cable between two guests' network cards."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def start(
    image: Image,
    source: Path,
    media: Media,
    directory: Path,
    shape: Shape,
    cable: socket.socket | None = None,
) -> Starting:
    """Starts a guest whose logs and results go to ``directory``; it boots meanwhile.

    ``cable`` is this guest's end; without one, its network has nobody else. To be passed to
    ``boot``.
    """
    (directory / "out").mkdir(parents=True, exist_ok=True)
    # Not in `directory`: a socket's path is short.
    address = f"\0crail-lab-{os.getpid()}-{shape.node}-{time.monotonic_ns()}"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    argv = _command(image, source, media, directory, shape, address[1:], cable)
    with open(directory / "qemu.log", "ab") as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[cable.fileno()] if cable else [],
            preexec_fn=dies_with_us(),  # noqa: PLW1509 - no other thread runs
        )
    return Starting(process, listener, directory, time.monotonic())


@dataclass
class Starting:
    """A guest that boots."""

    process: subprocess.Popen[bytes]
    listener: socket.socket
    directory: Path
    began: float

    def wait(self) -> Machine:
        """The guest, prepared.

        Raises:
            GuestError: QEMU did not start, or the guest ended or hung while it booted.
        """
        deadline = time.monotonic() + BOOT_LIMIT_S
        with self.listener:
            self.listener.settimeout(0.2)
            while True:
                with contextlib.suppress(TimeoutError):
                    connection, _ = self.listener.accept()
                    break
                if self.process.poll() is not None or time.monotonic() > deadline:
                    why = (self.directory / "qemu.log").read_text(errors="replace")
                    raise GuestError(f"QEMU did not start: {why}")
        channel = Channel(connection)
        channel.wait_ready(deadline)
        return Machine(self.process, channel, self.directory, time.monotonic() - self.began)

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    def kill(self) -> None:
        self.listener.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def boot(
    stack: contextlib.ExitStack, start: Callable[[contextlib.ExitStack], Sequence[Starting]]
) -> list[Machine]:
    """The guests that ``start`` starts, prepared; ``stack`` kills them at its end.

    Where the kernel of one panics before it is prepared, all are started anew: nothing of what is
    to be tested has run, but QEMU 7.2's emulated processors sometimes run code of the kernel as it
    was before the kernel patched it. The console is kept as ``console-panicked-N.log``.

    Raises:
        GuestError: as ``Starting.wait``; after ``BOOT_ATTEMPTS`` also where a kernel panicked.
    """
    for attempt in range(1, BOOT_ATTEMPTS + 1):
        with contextlib.ExitStack() as started:
            starting = start(started)
            try:
                guests = [one.wait() for one in starting]
            except GuestError:
                broken = [one for one in starting if panicked(one.directory)]
                if not broken or attempt == BOOT_ATTEMPTS:
                    raise
                for one in broken:
                    one.console.rename(one.directory / f"console-panicked-{attempt}.log")
                print("lab: a guest's kernel panicked while it booted; once more", flush=True)
                continue
            stack.push(started.pop_all())
            return guests
    raise AssertionError("the last attempt returns or raises")


def _command(
    image: Image,
    source: Path,
    media: Media,
    directory: Path,
    shape: Shape,
    agent_address: str,
    cable: socket.socket | None,
) -> list[str]:
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise GuestError("qemu-system-x86_64 is not installed")
    nvdimms = [path for path in (media.devdax, media.fsdax) if path is not None]
    total_mib = shape.memory_mib + sum(path.stat().st_size for path in nvdimms) // (1 << 20) + 1024
    network = f"socket,id=net,fd={cable.fileno()}" if cable else "user,id=net,restrict=on"
    kernel_line = (
        f"root=/dev/vda console=ttyS0 quiet panic=1 oops=panic mitigations=off nokaslr "
        f"no_timer_check tsc=reliable lab.node={shape.node} lab.nodes={shape.nodes} "
        f"lab.fsdax={int(media.fsdax is not None)}"
    )
    argv = [qemu, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    argv += ["-accel", "tcg,thread=multi", "-cpu", "max,la57=off", "-smp", str(shape.cpus)]
    argv += ["-machine", "q35,nvdimm=on"]
    argv += ["-m", f"{shape.memory_mib}M,slots={len(nvdimms)},maxmem={total_mib}M"]
    argv += ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", kernel_line]
    for index, path in enumerate(nvdimms):
        backend = f"memory-backend-file,id=mem{index},share=on,mem-path={path}"
        argv += ["-object", f"{backend},size={path.stat().st_size}"]
        argv += ["-device", f"nvdimm,id=nvdimm{index},memdev=mem{index}"]
    argv += ["-drive", f"if=virtio,file={image.disk},format=raw,snapshot=on"]
    argv += ["-drive", f"if=virtio,file={source},format=raw,readonly=on"]
    argv += ["-drive", f"if=none,id=nvme,file={media.nvme},format=raw,discard=unmap"]
    argv += ["-device", f"nvme,drive=nvme,serial=lab{shape.node}"]
    argv += ["-netdev", network]
    argv += ["-device", f"virtio-net-pci,netdev=net,mac=52:54:00:c0:de:0{shape.node},romfile="]
    out = f"local,id=out,path={directory / 'out'},security_model=none"
    argv += ["-fsdev", out, "-device", "virtio-9p-pci,fsdev=out,mount_tag=out"]
    argv += ["-chardev", f"socket,id=agent,path={agent_address},abstract=on"]
    argv += ["-device", "virtio-serial-pci"]
    argv += ["-device", "virtserialport,chardev=agent,name=crail.lab"]
    console = directory / "console.log"
    argv += ["-chardev", f"file,id=console,path={console},append=on"]
    argv += ["-serial", "chardev:console", "-monitor", "none"]
    argv += ["-object", "rng-random,id=rng,filename=/dev/urandom"]
    return [*argv, "-device", "virtio-rng-pci,rng=rng"]
