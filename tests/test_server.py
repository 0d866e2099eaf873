"""What is checked runs in a fork of a process that has imported effzoo, and finds what a new process would find."""

import subprocess
import sys
import time

import pytest

from effzoo.checks.apart import Limits
from effzoo.checks.server import ready, server
from effzoo.course.grading import _ask
from effzoo.course.solutions import solution
from effzoo.course.task import Call
from effzoo.errors import OptionError

LIMITS = Limits(60.0, 8.0)
FACTS = """
import os, resource, signal, sys, tempfile, threading
import torch

def facts():
    return {
        "environment": sorted(os.environ), "files": sorted(os.listdir("/proc/self/fd"))[:-1],
        "here": os.getcwd() == os.environ["HOME"] == tempfile.gettempdir(), "leads": os.getsid(0) == os.getpid(),
        "threads": torch.get_num_threads(), "memory": resource.getrlimit(resource.RLIMIT_AS),
        "stops": str(signal.getsignal(signal.SIGTERM)), "drawn": torch.rand(2).tolist(), "input": sys.stdin.read(),
    }
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are safe on Linux alone")


def asked(tmp_path, text, limits=LIMITS):
    """What the function `facts` of a file answers, and what was printed."""
    file = tmp_path / "mine.py"
    file.write_text(text)
    call = Call("function", "facts", {}, None, {"function": "facts", "gradients": [], "unchanged": []})
    (answer,), printed = _ask(file, [call], limits)
    return answer, printed


def test_a_fork_finds_what_a_new_process_finds(tmp_path):
    assert server() is None
    new, _ = asked(tmp_path, FACTS)
    with ready():
        forked, _ = asked(tmp_path, FACTS)
        again, _ = asked(tmp_path, FACTS)
    assert server() is None
    drawn = [one["value"].pop("drawn") for one in (new, forked, again)]
    assert len({tuple(one) for one in drawn}) == 3
    # what Python adds when it starts
    new["value"]["environment"] = [name for name in new["value"]["environment"] if not name.startswith("LC_")]
    assert forked["value"] == again["value"] == new["value"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("raise ValueError('of mine')", "of mine"),
        ("raise SystemExit(4)", "its process ended with 4 before it answered: word"),
        ("raise SystemExit", "its process ended with 0 before it answered: word"),
        ("os._exit(3)", "its process ended with 3 before it answered: word"),
        ("os.kill(os.getpid(), 11)", "its process ended with -11 before it answered: word"),
        ("return torch.zeros(2**33)", "allocate memory"),
    ],
)
def test_what_ends_badly_is_told_as_of_a_new_process(tmp_path, forks, body, told):
    answer, printed = asked(tmp_path, f"import os, torch\ndef facts():\n    print('word', flush=True)\n    {body}")
    assert told in answer["problem"] and printed.startswith("word")


def test_what_does_not_end_is_stopped_with_what_it_began(tmp_path, forks):
    start = "import os, time\ndef facts():\n    if os.fork() == 0: time.sleep(600)\n    return os.getpgid(0)"
    endless = "def facts():\n    while True: pass"
    answer, _ = asked(tmp_path, start)
    stopped, _ = asked(tmp_path, endless, Limits(1.0, 8.0))
    assert stopped["problem"] == "it was stopped after 1 seconds"
    for _ in range(100):  # until init has taken note
        if (alive := subprocess.run(["pgrep", "-g", str(answer["value"])], capture_output=True).returncode) == 1:
            break
        time.sleep(0.1)
    assert alive == 1


def test_nothing_of_a_file_stays(tmp_path, forks):
    first = server()
    asked(tmp_path, "import math\nmath.pi = 3\ndef facts(): return 1")
    assert asked(tmp_path, "import math\ndef facts(): return math.pi > 3.1")[0] == {"value": True}
    with ready():
        assert server() is first
    assert server() is first


def test_a_server_that_is_gone_is_told(tmp_path):
    text = "import os, signal\ndef facts():\n    os.kill(os.getppid(), signal.SIGKILL)\n    return 1"
    with ready():
        for _ in range(2):
            with pytest.raises(OptionError, match="has ended"):
                asked(tmp_path, text)


def test_a_command_forks_itself(tmp_path):
    """It imports torch once: no other process is begun."""
    (tmp_path / "a01.py").write_text(solution("a01"))
    program = (
        "import subprocess\nfrom effzoo.cli import app\n"
        "def begin(*given, **more): raise AssertionError('a process is begun')\n"
        f"subprocess.Popen.__init__ = begin\napp(['course', 'check', 'a01', {str(tmp_path / 'a01.py')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 of 15" in done.stdout
