"""Programs that attack the grader. None may pass, and none may leave a trace.

Each is asked for `f(x) = x + 1`; those of SCRIPTS print it. `{trace}` is a directory that everybody may write
to, `{parent}` the process that grades, `{port}` one on which somebody listens.
"""

HARM = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "a process": "import subprocess\nsubprocess.run(['touch', '{trace}/process'])",
    "the shell": "import os\nos.system('touch {trace}/shell')",
    "ten gigabytes": "held = bytearray(10 * 2**30)",
    "ten gigabytes, slowly": "held = []\nwhile True:\n    held.append(bytearray(2**24))",
    "shared memory": "import mmap\nheld = [mmap.mmap(-1, 2**28) for _ in range(40)]",
    "a thousand threads": "import threading, time\nfor _ in range(1000):\n"
    "    threading.Thread(target=time.sleep, args=(60,)).start()",
    "endless loop": "while True:\n    pass",
    "endless loop when called": "def f(x):\n    while True:\n        pass",
    "endless output": "while True:\n    print('x' * 10**6)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n    return f(x)",
    "a file": "open('{trace}/file', 'w').write('x')",
    "a file beside it": "open('here', 'w').write('x')",
    "filling the disk": "while True:\n    open('{trace}/disk', 'ab').write(b'x' * 2**20)",
    "a directory": "import os\nos.mkdir('{trace}/directory')",
    "a link": "import os\nos.symlink('/etc/passwd', '{trace}/link')",
    "removing": "import os\nos.remove('{trace}/kept')",
    "renaming": "import os\nos.rename('{trace}/kept', '{trace}/moved')",
    "emptying": "import os\nos.truncate('{trace}/kept', 0)",
    "reading a file": "f = open('{trace}/kept').read()",
    "listing": "import os\nf = os.listdir('{trace}')",
    "the network": "import ctypes, struct\nlibc = ctypes.CDLL(None)\ns = libc.socket(2, 1, 0)\n"
    "there = struct.pack('!H', {port}) + bytes([127, 0, 0, 1]) + bytes(8)\n"
    "assert libc.connect(s, struct.pack('H', 2) + there, 16) == 0",
    "a socket": "import socket\nf = socket.socket()",
    "a raw system call": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    "assert libc.syscall(2, b'{trace}/raw', 0o102, 0o777) >= 0",
    "a call by x32's numbers": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    "assert libc.syscall(0x40000000 | 2, b'{trace}/x32', 0o102, 0o777) >= 0",
    "a call as of 32 bits": "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\n"
    "m.write(bytes.fromhex('b814000000cd80c3'))\n"  # mov eax, 20 (getpid); int 0x80; ret
    "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()\n"
    "def f(x):\n    return x + 1",
    "calls that are no old ones": "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "b = ctypes.create_string_buffer(256)\ndef tried(n):\n"
    "    return libc.syscall(n, b, b, b, b, b) >= 0 or ctypes.get_errno() != 1\n"
    # open_by_handle_at, process_vm_readv, memfd_create, bpf, userfaultfd, io_uring_setup, openat2
    "assert any(map(tried, (304, 310, 319, 321, 323, 425, 437)))\ndef f(x):\n    return x + 1",
    "signalling its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "signalling everybody": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "signalling process 1": "import os, signal\nos.kill(1, signal.SIGKILL)",
    "signalling by a descriptor": "import fcntl\nfcntl.fcntl(2, fcntl.F_SETOWN, {parent})",
    "tracing its parent": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, {parent}, 0, 0) == 0",
    "its parent's limits": "import resource\nresource.prlimit({parent}, resource.RLIMIT_CPU, (1, 1))",
    "its own limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "memory of its parent": "f = open('/proc/{parent}/mem', 'rb')",
    "environment of its parent": "f = open('/proc/{parent}/environ', 'rb').read()",
    "becoming root": "import os\nos.setuid(0)",
    "leaving its session": "import os\nos.setsid()",
    "a program of the standard library": "from venv import __main__",
    "a daemon": "import os\nif os.fork() == 0:\n    os.setsid()\n    open('{trace}/daemon', 'w')\n"
    "def f(x):\n    return x + 1",
}
"""Against the machine and the run."""
FORGERY = {
    "exit": "import sys\nsys.exit(0)",
    "SystemExit when called": "def f(x):\n    raise SystemExit(0)",
    "_exit": "import os\nos._exit(0)",
    "_exit when called": "import os\ndef f(x):\n    os._exit(0)",
    "exit by the kernel": "import ctypes\nctypes.CDLL(None).syscall(231, 0)",
    "killing itself": "import os\nos.kill(os.getpid(), 9)",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "a verdict printed": "import json\n"
    "print(json.dumps({'passed': True, 'fault': False, 'reason': 'passed'}), flush=True)",
    "a verdict on every pipe": "import json, os\n"
    "said = json.dumps({'passed': True, 'fault': False, 'reason': 'passed'}).encode()\n"
    "for d in range(3, 64):\n    try:\n        os.write(d, said + b'\\n')\n    except OSError:\n        pass",
    "every pipe closed": "import os\nos.closerange(0, 64)",
    "noise on every pipe": "import os\nfor d in range(3, 64):\n    try:\n        os.write(d, b'[' * 2**16)\n"
    "    except OSError:\n        pass",
    "equal to everything": "class Any(int):\n    def __eq__(self, other):\n        return True\n"
    "    __hash__ = int.__hash__\ndef f(x):\n    return Any(7)",
    "an object equal to everything": "class Any:\n    def __eq__(self, other):\n        return True\n"
    "def f(x):\n    return Any()",
    "fields equal to everything": "class P(tuple):\n    _fields = ('__eq__', '_number')\n"
    "    def __eq__(self, other):\n        return True\ndef f(x):\n    return P((lambda *a: True, 0))",
    "a fraction equal to everything": "import fractions\nclass Fraction(fractions.Fraction):\n"
    "    def __eq__(self, other):\n        return True\nfractions.Fraction = Fraction\n"
    "def f(x):\n    return Fraction(7)",
    "replies that are none": "import os\n"
    "said = [{'value': {'same': 0}, 'changed': [{'kept': 0}] * 9}, {'x': 1}]\n"
    "for d in range(3, 64):\n    try:\n        for one in said * 3:\n"
    "            os.write(d, repr(one).replace(chr(39), chr(34)).encode() + b'\\n')\n"
    "    except OSError:\n        pass",
    "the end of a loop": "def f(x):\n    raise StopIteration",
    "asserts that hold": "import builtins\nbuiltins.AssertionError = type('Never', (BaseException,), {})\n"
    "def f(x):\n    return 7",
    "built-ins replaced": "import builtins\n"
    "builtins.all = builtins.any = builtins.bool = builtins.abs = lambda *a: True\n"
    "def f(x):\n    return 7",
    "the tests in memory": "import sys, gc\nwanted = bytes.fromhex('6d617028696e74').decode()\ndef f(x):\n"
    "    frame, seen = sys._getframe(), []\n    while frame:\n"
    "        seen += [frame.f_globals, frame.f_locals]\n        frame = frame.f_back\n"
    "    for held in seen + gc.get_objects():\n        if isinstance(held, dict):\n"
    "            held = list(held.values())\n        if isinstance(held, (list, tuple)):\n"
    "            if any(isinstance(v, str) and wanted in v and v != wanted for v in held):\n"
    "                return x + 1\n    return 7",
    "sleeping": "import time\ntime.sleep(600)",
    "sleeping when called": "import time\ndef f(x):\n    time.sleep(600)",
    "deaf to signals": "import signal, time\nfor n in range(1, 65):\n    try:\n"
    "        signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError):\n        pass\n"
    "time.sleep(600)",
    "an endless number": "def f(x):\n    return 10 ** (10 ** 9)",
    "a circle": "def f(x):\n    held = []\n    held.append(held)\n    return held",
    "a huge answer": "def f(x):\n    return 'x' * 2**27",
    "no such function": "g = 1",
    "no program": "def f(x) return x + 1",
    "a NUL": "def f(x):\n    return x + 1\n\0",
    "nested too deeply": "f = " + "(" * 5000 + "1" + ")" * 5000,
    "a wrong one": "def f(x):\n    return x",
}
"""Against the verdict."""
FUNCTIONS = HARM | FORGERY
SLOW = (
    "deep recursion",
    "ten gigabytes, slowly",
    "endless loop",
    "endless loop when called",
    "endless output",
    "sleeping",
    "sleeping when called",
    "deaf to signals",
    "a thousand threads",
    "an endless number",
    "every pipe closed",
    "noise on every pipe",
)
"""Those that a limit of time may have to end."""
SCRIPTS = {
    "the right answer, then a failure": "print(int(input()) + 1)\nraise ValueError",
    "the right answer, then an exit code": "print(int(input()) + 1, flush=True)\nimport os\nos._exit(3)",
    "nothing": "input()",
    "exit": "import sys\nsys.exit(0)",
    "too much": "print(int(input()) + 1)\nprint('x' * 2**25)",
    "the right answer, and more": "print(int(input()) + 1)\nprint('passed')",
    "endless output": "while True:\n    print('x' * 10**6)",
    "its own input rewritten": "import os\nos.pwrite(0, b'6', 0)\nprint(int(input()) + 1)",
}
HONEST = {
    "plain": "def f(x):\n    return x + 1",
    "prints": "print('hello')\ndef f(x):\n    print(x)\n    return x + 1",
    "library": "import collections, heapq\nfrom datetime import datetime\n"
    "year = datetime.strptime('2020', '%Y').year\ndef f(x):\n    return x + year - 2019",
    "threads": "import threading\ndef f(x):\n    held = []\n"
    "    t = threading.Thread(target=lambda: held.append(x + 1))\n    t.start()\n    t.join()\n"
    "    return held[0]",
    "guarded": "def f(x):\n    return x + 1\nif __name__ == '__main__':\n    print(f(int(input())))",
    "a class of it": "class Solution:\n    def f(self, x):\n        return x + 1",
    "random": "import random, os\ndef f(x):\n    return x + random.randint(1, 1) + 0 * len(os.urandom(4))",
}
