"""What answers at once imports little: looked up in a fresh interpreter's modules, not by a clock."""

import subprocess
import sys

from tests.support.launch import child_environment

LOOK = "import sys; print(*(name for name in sys.argv[1].split() if name in sys.modules), sep='\\n', end='!')"
HEAVY = "torch numpy transformers datasets rich safetensors"


def imported(code: str, names: str, *arguments: str) -> str:
    """Those of `names` that are imported after `code`."""
    command = [sys.executable, "-c", f"{code}\n{LOOK}", names, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("!"), done.stderr[-3000:]
    return done.stdout.splitlines()[-1].removesuffix("!")


def test_help_and_a_mistake_in_a_yaml_are_told_without_torch(tmp_path):
    wrong = tmp_path / "c.yaml"
    wrong.write_text("model: {pth: x}")
    code = """
import contextlib, io, sys
from dora_dist.cli import main
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main(["--help"])
assert "VERB" in out.getvalue()
for verb in (["train"], ["plan", "--gpu", "h100"], ["merge", "out"]):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert main([*verb, "--config", sys.argv[2]]) == 2
    assert "model.pth" in err.getvalue(), err.getvalue()
"""
    assert imported(code, HEAVY, str(wrong)) == ""


def test_the_public_names_bring_no_compiler():
    code = "import dora_dist\nassert 'torch' not in sys.modules and 'inject_dora' in dir(dora_dist)\n"
    code += "from dora_dist import *\nassert inject_dora is dora_dist.inject_dora"
    assert imported("import sys\n" + code, "torch torch._dynamo torch._inductor transformers") == "torch"
