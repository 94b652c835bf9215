"""The process that `rlx.rewards.code` runs model-written Python in: `python -I -S sandbox.py`, standard library only.

    reward process ─► keeper ─► init ─► one worker per job: the code, without rights
      job as JSON on stdin        └── JSON lines on stdout: how it is contained, then one result per job

Keeper and init never run the code. Where the kernel allows namespaces, init is process 1 of its own: no network, all
files read-only but a small temporary folder, the user's home hidden, and its end is the end of every process in
it. Where it does not, keeper and init are one, and Python's audit events stand in: weaker, and reported as such.
All of it is one file, as nothing beside the standard library can be imported here.
Not here: what a result is worth (`code.py`).
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

_libc = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY = 442, -100, 0x8000, 1
_FIRST_UID, _NOBODY = 1_000_000_000, 65534
_TMP = "/tmp"
_TAIL = 2000
_KILL_S = 5.0
_REFUSED = ("socket.", "subprocess.", "ctypes.", "os.exec", "os.posix_spawn", "os.system", "os.kill", "pty.")
_OF_FILES = ("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink",
             "os.truncate", "os.utime")  # fmt: skip


def main() -> None:
    spec = json.load(sys.stdin)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != spec["parent"]:  # it ended before it could be a signal
        sys.exit(1)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    root, identity = os.geteuid() == 0, (os.geteuid(), os.getegid())
    uid = _FIRST_UID + os.getpid() if root else None
    why_not = _unshare(root) if spec["namespaces"] else "namespaces are switched off"
    is_init = not why_not
    if is_init:
        init = os.fork()
        if init:
            _, status = os.waitpid(init, 0)
            sys.exit(int(status != 0))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        why_not = _hide_files(spec, None if root else identity)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    spec["pid"] = os.getpid()
    _say({"contained": not why_not, "why_not": why_not})
    spec["workdir"] = _temporary_folder() if why_not else _TMP
    deadline = time.monotonic() + spec["timeout_s"]
    try:
        for index, job in enumerate(spec["jobs"]):
            result = _run(spec, job, index, uid, is_init, not why_not, deadline)
            _say(result)
            if result["expired"]:
                break
    finally:
        if why_not and os.getpid() == spec["pid"]:
            _remove(spec["workdir"])


def _unshare(root: bool) -> str:
    """Leave the network, the mounts and the processes of the machine; the reason when that is not allowed."""
    flags = _NEWNS | _NEWNET | _NEWPID | _NEWIPC | (0 if root else _NEWUSER)
    if _libc.unshare(flags) != 0:
        return f"namespaces are not permitted here ({os.strerror(ctypes.get_errno())})"
    return ""


def _keep_identity(uid: int, gid: int) -> None:
    """The same user inside the new namespace of users as outside."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _hide_files(spec: dict[str, Any], identity: tuple[int, int] | None) -> str:
    """Nothing can be written but a folder in memory, /tmp; the home folders are empty but for Python. The reason when
    it is not so."""
    try:
        if identity is not None:
            _keep_identity(*identity)
        _remount(spec)
    except OSError as error:
        return str(error)
    return ""


def _remount(spec: dict[str, Any]) -> None:
    python = [(path, os.open(path, os.O_PATH)) for path in spec["python"]]
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _read_only("/", recursive=True)
    for folder in [*(home for home in spec["homes"] if os.path.isdir(home)), _TMP]:
        options = f"mode=1777,size={spec['disk_mib']}m" if folder == _TMP else "mode=755,size=1m"
        _mount("none", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, options)
        for path, descriptor in python:
            if not os.path.exists(path):
                os.makedirs(path)
                _mount(f"/proc/self/fd/{descriptor}", path, None, _MS_BIND | _MS_REC)
        if folder != _TMP:
            _read_only(folder, recursive=True)
    for _, descriptor in python:
        os.close(descriptor)
    _libc.mount(b"proc", b"/proc", b"proc", ctypes.c_ulong(_MS_NOSUID | _MS_NODEV), None)  # refused in some containers


def _run(
    spec: dict[str, Any],
    job: dict[str, Any],
    index: int,
    uid: int | None,
    is_init: bool,
    contained: bool,
    deadline: float,
) -> dict[str, Any]:
    """One job in a process of its own, to its end or the deadline; then nothing that it started is left."""
    nonce = os.urandom(16).hex()
    folder = os.path.join(spec["workdir"], str(index))
    os.mkdir(folder)
    pipes = [os.pipe() for _ in range(3)]  # stdout, stderr, verdict
    worker = os.fork()
    if worker == 0:
        tell = _redirect(job, folder, [write for _, write in pipes], nonce)
        try:
            _drop_rights(spec, folder, uid, contained)
        except OSError as error:
            tell(f"unsafe {error}")
            os._exit(1)
        _work(spec["code"], job, tell)
    for _, write in pipes:
        os.close(write)
    ended, out, tail, verdict = _collect(worker, [read for read, _ in pipes], spec["output_bytes"], deadline)
    status = _end_all(worker, is_init)
    events = [line.split(" ", 1)[1] for line in verdict.decode(errors="replace").splitlines() if line.startswith(nonce)]
    return {
        "events": events,
        "expired": not ended,
        "exit": os.waitstatus_to_exitcode(status),
        "stdout": out.decode(errors="replace"),
        "tail": tail.decode(errors="replace"),
    }


def _collect(worker: int, pipes: list[int], limit: int, deadline: float) -> tuple[bool, bytes, bytes, bytes]:
    """Until the worker ends (True) or the deadline (False): the first `limit` bytes of its stdout, the last of stdout
    and stderr together, and the verdict."""
    out, tail, verdict = bytearray(), bytearray(), bytearray()
    end, still_open, ended = os.pidfd_open(worker), set(pipes), False
    while (still_open or not ended) and (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([*still_open, *([] if ended else [end])], [], [], 0.0 if ended else left)
        if not ready:
            break
        ended = ended or end in ready
        for fd in still_open.intersection(ready):
            data = os.read(fd, 65536)
            if not data:
                still_open.discard(fd)
            elif fd == pipes[2]:
                verdict += data[: max(0, limit - len(verdict))]
            else:
                tail = (tail + data)[-_TAIL:]
                out += data[: max(0, limit - len(out))] if fd == pipes[0] else b""
    for fd in (end, *pipes):
        os.close(fd)
    return ended, bytes(out), bytes(tail), bytes(verdict)


def _end_all(worker: int, is_init: bool) -> int:
    """Kill and reap whatever is below this process; how `worker` ended, as `waitpid` tells it."""
    status, deadline = 0, time.monotonic() + _KILL_S
    while True:
        for pid in [-1] if is_init else _descendants():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while True:
                pid, ended_with = os.waitpid(-1, 0 if is_init else os.WNOHANG)
                if pid == 0:
                    break
                status = ended_with if pid == worker else status
        except ChildProcessError:
            return status
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {_descendants()} do not end")
        time.sleep(0.001)


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    children.setdefault(int(file.read().rpartition(")")[2].split()[1]), []).append(int(entry))
            except (FileNotFoundError, ProcessLookupError):
                continue
    found, level = [], [os.getpid()]
    while level:
        level = [child for pid in level for child in children.get(pid, [])]
        found += level
    return found


def _temporary_folder() -> str:
    import tempfile

    folder = tempfile.mkdtemp(prefix="rlx-code-")
    os.chmod(folder, 0o711)
    return folder


def _remove(folder: str) -> None:
    """The temporary folder, when nothing runs in it any more."""
    import shutil

    _end_all(0, is_init=False)
    shutil.rmtree(folder, ignore_errors=True)


# --- in the worker


def _redirect(job: dict[str, Any], folder: str, writes: list[int], nonce: str) -> Callable[[str], None]:
    """The job's stdin, pipes and folder for this process; a function that tells init what happened, on descriptor 3."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()
    stdin = os.memfd_create("stdin")
    os.write(stdin, job.get("stdin", "").encode())
    os.lseek(stdin, 0, os.SEEK_SET)
    sources = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in (stdin, *writes)]
    for target, source in enumerate(sources):
        os.dup2(source, target, inheritable=target < 3)
    os.closerange(4, 4096)
    os.chdir(folder)
    os.environ["HOME"] = folder
    sys.stdin, sys.stdout = (os.fdopen(fd, mode, encoding="utf-8", closefd=False) for fd, mode in ((0, "r"), (1, "w")))
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)

    def tell(event: str, write: Callable[[int, bytes], int] = os.write) -> None:
        write(3, f"{nonce} {event}\n".encode())

    return tell


def _drop_rights(spec: dict[str, Any], folder: str, uid: int | None, contained: bool) -> None:
    """No rights and few resources from here on. OSError when the code would have to run with the rights of root."""
    _limit(resource.RLIMIT_CPU, int(spec["timeout_s"]) + 2)
    _limit(resource.RLIMIT_AS, spec["memory_mib"] * 2**20)
    _limit(resource.RLIMIT_FSIZE, spec["disk_mib"] * 2**20)
    _limit(resource.RLIMIT_NOFILE, 64)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NPROC, spec["processes"] + (0 if uid else _tasks_of_user()))
    if uid is not None:
        _become(uid, folder)
    else:
        _no_capabilities()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if not contained:
        sys.addaudithook(_refusing(os.path.realpath(folder)))


def _become(uid: int, folder: str) -> None:
    """Another user, without rights: one of its own, or nobody where this container has too few."""
    os.setgroups([])
    for candidate in (uid, _NOBODY):
        try:
            os.chown(folder, candidate, candidate)
            os.setresgid(candidate, candidate, candidate)
            os.setresuid(candidate, candidate, candidate)
            break
        except OSError:
            continue
    if os.getuid() == 0:
        raise PermissionError("root cannot become another user here")
    if not os.access(os.__file__, os.R_OK):
        raise PermissionError(f"another user than root cannot read Python's own files ({os.path.dirname(os.__file__)})")


def _no_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if _libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset failed")


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _tasks_of_user() -> int:
    """Threads that this user runs now: the limit of processes counts them all."""
    count = 0
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and os.stat(f"/proc/{entry}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{entry}/task"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return count


def _refusing(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses sockets, other programs, and writing outside of `folder`."""

    def inside(path: Any) -> bool:
        return isinstance(path, int) or (os.path.realpath(os.fsdecode(path)) + "/").startswith(folder + "/")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            refused = bool(writes) and path != os.devnull and not inside(path)
        elif event in _OF_FILES:
            refused = not all(inside(path) for path in arguments if isinstance(path, str | bytes))
        else:
            refused = event.startswith(_REFUSED)
        if refused:
            raise PermissionError(f"{event} is not allowed here")

    return hook


def _work(code: str, job: dict[str, Any], tell: Callable[[str], None]) -> NoReturn:
    """Run the code as a program, or import it and run the tests of the job."""
    if "tests" in job:
        _judge(code, job["tests"], tell)
        os._exit(0)
    try:
        exec(compile(code, "main.py", "exec"), _module("__main__").__dict__)
    except Exception as error:  # whatever the code raises: shown as Python shows it, without these frames
        sys.stdout.flush()
        tell("memory" if isinstance(error, MemoryError) else "error")
        traceback.print_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
        sys.exit(1)
    sys.exit(0)


def _judge(code: str, tests: list[str], tell: Callable[[str], None]) -> None:
    run, build = exec, compile  # the code may replace them where it finds them
    names = _module("solution").__dict__
    steps = [("solution.py", code), *((f"test {number}", test) for number, test in enumerate(tests))]
    for name, source in steps:
        try:
            run(build(source, name, "exec"), names)
            if source is not code:
                tell("passed")
        except BaseException as error:  # SystemExit as well: nothing that the code raises is to reach init's frames
            tell("memory" if isinstance(error, MemoryError) else "error" if source is code else "failed")
            traceback.print_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
            if source is code:
                return
    sys.stdout.flush()
    tell("end")


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module


# --- the kernel


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    if _libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]) != 0:
        raise OSError(ctypes.get_errno(), f"mount of {target} failed: {os.strerror(ctypes.get_errno())}")


def _read_only(path: str, recursive: bool) -> None:
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    if _libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, attributes, ctypes.sizeof(attributes)) != 0:
        raise OSError(ctypes.get_errno(), f"{path} cannot be made read-only: {os.strerror(ctypes.get_errno())}")


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
