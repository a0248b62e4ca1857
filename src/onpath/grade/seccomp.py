"""What a program of a model may ask the kernel for: a list of system calls, and no others (Linux, seccomp).

It may compute, wait, use memory and threads, and read and write what it was given. It cannot open files or
sockets, start processes, or reach other processes. Loaded by path, with the standard library alone.
"""

import ctypes
import errno
import os
import resource
import struct
import sys

# fmt: off
CALLS = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "lseek": (8, 62), "close": (3, 57), "fstat": (5, 80), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "fsync": (74, 82), "ftruncate": (77, 46),
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "brk": (12, 214),
    "madvise": (28, 233), "mincore": (27, 232), "membarrier": (324, 283),
    "futex": (202, 98), "futex_waitv": (449, 449), "set_robust_list": (273, 99), "rseq": (334, 293),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "exit": (60, 93), "exit_group": (231, 94),
    "set_tid_address": (218, 96), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "restart_syscall": (219, 128),
    "pause": (34, None), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None),
    "times": (100, 153), "getitimer": (36, 102), "setitimer": (38, 103), "alarm": (37, None),
    "select": (23, None), "pselect6": (270, 72), "poll": (7, None), "ppoll": (271, 73),
    "getrandom": (318, 278), "getrusage": (98, 165), "sysinfo": (99, 179), "uname": (63, 160),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148),
    "getresgid": (120, 150), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156),
    "getgroups": (115, 158), "getcpu": (309, 168), "getcwd": (79, 17),
}
"""Allowed whatever the arguments: name → number on (x86_64, aarch64)."""
CLONE, CLONE3, KILL, TGKILL = (56, 220), (435, 435), (62, 129), (234, 131)
PRLIMIT, FCNTL, IOCTL, FSTATAT, CAPSET = (302, 261), (72, 25), (16, 29), (262, 79), (126, 91)
# fmt: on
"""Allowed for some arguments; see `_program`."""
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine → column of the tables, and the kernel's name of its call convention (AUDIT_ARCH_…)."""
NOBODY = 65534
_MORE_TASKS = 4096
"""Tasks that the user of programs may have beyond all that the machine has: of its programs together, as
the kernel counts by user. A root that cannot become another user is not counted."""

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Offsets in the kernel's record of a call."""
_CLONE_THREAD, _EMPTY_PATH, _TCGETS, _FIOCLEX = 0x10000, 0x1000, 0x5401, 0x5451
_FCNTL = (0, 1, 2, 3, 1030)
"""Duplicate, and get or set flags; not F_SETOWN, which sends signals to others."""
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 1, 38, 22, 2


class Unconfined(Exception):
    """This machine does not let a process confine itself; says why."""


def confine() -> None:
    """For good: no privileges, no new ones, and only the calls above. Ends with the parent.

    Raises:
        Unconfined: there is no seccomp here, or it is refused.
    """
    machine = os.uname().machine
    if not sys.platform.startswith("linux") or machine not in MACHINES:
        raise Unconfined(f"there is no seccomp filter for {sys.platform} on {machine}")
    column, architecture = MACHINES[machine]
    libc = ctypes.CDLL(None, use_errno=True)
    _give_up_root(libc, column)
    libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)  # after the change of user, which would undo it
    program = _program(column, architecture)
    code = ctypes.create_string_buffer(program)
    counted = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    for option, value in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_SECCOMP, _FILTER)):
        third = ctypes.c_char_p(counted) if option == _PR_SET_SECCOMP else 0
        if libc.prctl(option, ctypes.c_ulong(value), third, 0, 0):
            raise Unconfined(f"the kernel refuses seccomp ({os.strerror(ctypes.get_errno())})")


def _give_up_root(libc: ctypes.CDLL, column: int) -> None:
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError:
            pass  # a root whose container has no other user; it loses its capabilities below
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    if libc.syscall(CAPSET[column], header, none):
        raise Unconfined(f"the kernel refuses capset ({os.strerror(ctypes.get_errno())})")


def limit(*, memory: int, cpu_seconds: int, file_bytes: int) -> None:
    """Hard limits of this process: address space, CPU time, the largest file, tasks. No process can be
    started, also where only this says so (macOS)."""
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    if sys.platform == "darwin":
        limits[resource.RLIMIT_NPROC] = 0  # and no limit of memory, which macOS refuses
    else:
        limits[resource.RLIMIT_AS] = memory
        if (tasks := _tasks()) is not None:
            limits[resource.RLIMIT_NPROC] = tasks + _MORE_TASKS
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _tasks() -> int | None:
    """Processes and threads of this machine, those of this user among them; None: nobody tells."""
    try:
        with open("/proc/loadavg", encoding="ascii") as file:
            return int(file.read().split()[3].partition("/")[2])
    except (OSError, ValueError, IndexError):
        return None


def _program(column: int, architecture: int) -> bytes:
    """The filter, in classic BPF. It ends in a refusal: what is not listed is not allowed."""
    # Another call convention (32 bits on x86_64) has other numbers: it must not get past this table.
    steps = [_step(_LOAD, _ARCHITECTURE), _step(_EQUAL, architecture, yes=1), _step(_RETURN, _KILL)]
    steps.append(_step(_LOAD, _NUMBER))
    for numbers in CALLS.values():
        if numbers[column] is not None:
            steps += [_step(_EQUAL, numbers[column], no=1), _step(_RETURN, _ALLOW)]
    # Threads, which die with the process, but no processes. glibc tries clone3 first, whose flags lie in
    # memory that a filter cannot read.
    steps += [_step(_EQUAL, CLONE3[column], no=1), _step(_RETURN, _ERRNO | errno.ENOSYS)]
    steps += _where(CLONE[column], 0, bits=_CLONE_THREAD)
    own = (os.getpid(),)
    steps += _where(KILL[column], 0, values=own) + _where(TGKILL[column], 0, values=own)
    steps += _where(PRLIMIT[column], 0, values=(0,))  # its own limits, not another's
    steps += _where(FCNTL[column], 1, values=_FCNTL) + _where(IOCTL[column], 1, values=(_TCGETS, _FIOCLEX))
    steps += _where(FSTATAT[column], 3, bits=_EMPTY_PATH)  # how glibc spells fstat
    return b"".join([*steps, _step(_RETURN, _ERRNO | errno.EPERM)])


def _step(code: int, value: int | None, *, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, value)


def _where(number: int, argument: int, *, values: tuple[int, ...] = (), bits: int = 0) -> list[bytes]:
    """Allows a call if an argument (its lower half) is one of the values, or has one of the bits."""
    tests = [(_EQUAL, value) for value in values] or [(_ANY_BIT, bits)]
    asked = [_step(_LOAD, _ARGUMENTS + 8 * argument)]
    for kind, value in tests:
        asked += [_step(kind, value, no=1), _step(_RETURN, _ALLOW)]
    asked.append(_step(_RETURN, _ERRNO | errno.EPERM))
    return [_step(_EQUAL, number, no=len(asked)), *asked]
