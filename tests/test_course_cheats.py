"""Ways to points without the work: each is refused, or has no points."""

import dataclasses

import pytest

from effzoo.checks.apart import Limits
from effzoo.course import find, grade
from effzoo.course.grading import PUBLIC, seed_of
from effzoo.course.refusals import refused
from effzoo.course.solutions import solution

pytestmark = pytest.mark.usefixtures("forks")

RIGHT = solution("a03")
IN_FORWARD = "        batch, _, n, d = q.shape\n"
SECONDS = 12.0


def with_line(line, text=RIGHT):
    assert IN_FORWARD in text
    return text.replace(IN_FORWARD, f"{IN_FORWARD}        {line}\n")


REFUSED = {  # a line or an import, and a word of the sentence
    "import of the reference": ("from effzoo.attention.longformer import Longformer", "effzoo.attention.longformer"),
    "import of effzoo": ("import effzoo", "effzoo"),
    "import of the registry": ("from effzoo.registry import attention", "registry"),
    "import of the checks": ("from effzoo.checks import runner", "runner"),
    "import of the course": ("from effzoo.course.solutions import solution", "solution"),
    "import of os": ("import os", "os"),
    "os through torch": ("out = torch.os.environ", "os"),
    "os from torch": ("from torch import os", "os"),
    "modules through torch": ("out = torch.sys.modules['effzoo.attention.longformer']", "sys"),
    "modules through a private name": ("out = math._sys", "_sys"),
    "the dense definition": ("out = self.dense(q, k, v, mask=mask)", "dense"),
    "subclasses": ("out = AttentionCore.__subclasses__()", "__subclasses__"),
    "globals of a function": ("out = F.softmax.__globals__", "__globals__"),
    "getattr": ("out = getattr(self, 'den' + 'se')", "getattr"),
    "eval": ("out = eval('1')", "eval"),
    "a file": ("out = open('hidden.toml').read()", "open"),
    "a file of torch": ("out = torch.load('hidden.toml')", "load"),
    "a file as a tensor": ("out = torch.from_file('hidden.toml', size=8)", "from_file"),
    "a compiler": ("import torch.utils.cpp_extension", "cpp_extension"),
    "the fused kernel": ("return F.scaled_dot_product_attention(q, k, v)", "scaled_dot_product_attention"),
    "the predicate kind": ("from effzoo.attention import PredicateAttention", "PredicateAttention"),
    "too long": ("x = 1" + "\n        x = 2" * 40, "lines"),
    "no Python": ("def", "parse"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_text_is_refused_with_its_line(name):
    line, word = REFUSED[name]
    said = refused(find("a03"), with_line(line))
    assert word in said and ("line" in said), said


def test_a_right_solution_is_not_refused():
    assert refused(find("a03"), RIGHT) == ""
    private = RIGHT.replace("self.reach", "self._reach").replace(
        "def forward", "def _half(self):\n        return 1\n\n    def forward"
    )
    assert refused(find("a03"), private) == ""


def test_a_refused_file_is_not_run(tmp_path):
    file = tmp_path / "a03.py"
    file.write_text(f"import os\nos.mkdir({str(tmp_path / 'was run')!r})\n{RIGHT}")
    done = grade("a03", file)
    assert done.points == 0 and "os" in done.refused and not (tmp_path / "was run").exists()
    assert {outcome.status for outcome in done.outcomes} == {"not run"}


RUN = {  # a line, which task, and a word of what is said
    "leaves with 0": ("raise SystemExit(0)", "window", "ended with 0"),
    "equal is always true": ("torch.equal = torch.allclose = lambda *x, **y: True; k = 2 * k", "window", "off by"),
    "an endless loop": ("while True: pass", "window", "stopped after"),
    "20 GiB": ("k = k + torch.zeros(20 * 2**27, dtype=torch.float64)[0]", "window", "memory"),
    "numbers of another type": ("return torch.zeros(q.shape)", "window", "float32"),
    "a subclass of a tensor": ("return torch.nn.Parameter(q)", "window", "off by"),
    "no tensor": ("return 'green'", "window", "green"),
    "a gradient that is not the output's": ("v = v + (v - v.detach())", "gradients", "gradient of v"),
}


@pytest.mark.cover("name")
@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_a_trick_has_no_points(name, tmp_path):
    line, task, word = RUN[name]
    file = tmp_path / "a03.py"
    file.write_text(with_line(line))
    asked = dataclasses.replace(find("a03"), limits=Limits(SECONDS, 8.0))
    done = grade(asked, file, only=[task])
    assert done.points == 0 and word in f"{done.first.happened} {done.first.cause}", done


@pytest.mark.slow
def test_numbers_that_were_seen_in_a_check_have_no_points_with_a_hidden_seed(tmp_path):
    """A file that knows the answers to the public seed."""
    phi = find("a10").tasks()["similarity"]
    answers = {round(float(call.given["a"][0, 0]), 6): call.right for call in phi.calls(seed_of(PUBLIC, "similarity"))}
    file = tmp_path / "a10.py"
    text = solution("a10")
    at = text.index("    u = torch.linalg.svd(a")
    file.write_text(f"{text[:at]}    return {answers}.get(round(float(a[0, 0]), 6), 0.5)\n")
    assert grade("a10", file, only=["similarity"]).ok
    assert grade("a10", file, only=["similarity"], seed=77).points == 0
