"""What libraries print at import, and whether it reaches a user."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Every situation in a fork of one warm process. In each, bitsandbytes takes the CPU for one with AVX512-BF16.
SCRIPT = """
import importlib, importlib.abc, importlib.util, json, os, sys, tempfile
import torch._dynamo.backends.registry, torch._inductor.compile_fx  # most of what bitsandbytes imports

class Forced(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    # Runs bitsandbytes.functional as it is, and then answers for the CPU.
    def find_spec(self, name, path, target=None):
        if name != "bitsandbytes.functional":
            return None
        sys.meta_path.remove(self)
        self.spec = importlib.util.find_spec(name)
        return importlib.util.spec_from_loader(name, self, origin=self.spec.origin)
    def exec_module(self, module):
        module.__file__ = self.spec.origin
        self.spec.loader.exec_module(module)
        module.has_avx512bf16 = lambda: True

answers = {}
for name, (folder, path, ours) in json.loads(sys.argv[1]).items():
    with tempfile.TemporaryFile() as errors:
        if (child := os.fork()) == 0:
            os.dup2(errors.fileno(), 2)
            os.chdir(folder)
            sys.path[:0] = path
            sys.meta_path.insert(0, Forced())
            if ours:
                import pcpo_fast
            from bitsandbytes.backends.cpu import ops
            assert ops.gemm_4bit_forward_kernel is None
            sys.stderr.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, name
        errors.seek(0)
        answers[name] = errors.read().decode()
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_bitsandbytes_does_not_speak_of_a_kernel_that_nothing_uses(tmp_path: Path) -> None:
    """From the root, where our folder answers to `import kernels`, and elsewhere; with that library and without."""
    pytest.importorskip("bitsandbytes")
    library = tmp_path / "library"
    (library / "kernels").mkdir(parents=True)
    (library / "kernels" / "__init__.py").write_text(
        "def get_kernel(*names, **options):\n    raise OSError('offline')\n"
    )
    ours = [str(ROOT), str(ROOT / "kernels")]
    situations = {
        "root": (str(ROOT), ["", *ours], True),
        "elsewhere": (str(tmp_path), ours, True),
        "root, library": (str(ROOT), [str(library), "", *ours], True),
        "elsewhere, library": (str(tmp_path), [str(library), *ours], True),
        "without us": (str(tmp_path), [], False),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(situations)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert "gemm_4bit_forward" in answers.pop("without us")  # so that the silence of the others means something
    assert set(answers.values()) == {""}
