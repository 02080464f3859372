"""The wheel: built, installed into a clean environment, and used as the README says."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest
import venv

from support import ROOT, Case, some_model


def readme_lines():
    """The Python lines of the repository's README."""
    text = (ROOT / "README.md").read_text()
    return re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)


@unittest.skipUnless(os.environ.get("LODESTREAM_TEST_WHEEL"), "LODESTREAM_TEST_WHEEL is not set: it is built by scripts/test")
class Wheel(Case):
    def test_the_readmes_lines_run_in_a_clean_environment(self):
        wheels = list(pathlib.Path(os.environ["LODESTREAM_TEST_WHEEL"]).glob("lodestream-*.whl"))
        self.assertEqual(len(wheels), 1)
        self.assertRegex(wheels[0].name, r"-cp39-abi3-.*linux.*\.whl$")
        with tempfile.TemporaryDirectory() as directory:
            venv.create(directory, with_pip=True)
            python = os.path.join(directory, "bin", "python")
            # The environment of the tests has numpy; what an index has today is not what is tested.
            subprocess.run(
                [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", wheels[0]],
                check=True)
            import numpy

            packages = subprocess.run(
                [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                check=True, capture_output=True, text=True).stdout.strip()
            for path in pathlib.Path(numpy.__file__).parent.parent.glob("numpy*"):
                os.symlink(path, os.path.join(packages, path.name))
            model = self.root / "models" / "llama"
            some_model(model / "model.safetensors")
            tensor = "layer.0.weight"
            lines = readme_lines().replace("/home/me/models/llama", str(model))
            lines = lines.replace("model.embed_tokens.weight", tensor)
            daemon = self.daemon()
            script = lines + "\nassert w.shape == (5000,) and not w.flags.writeable\nprint(lodestream.__file__)"
            ran = subprocess.run(
                [python, "-I", "-c", script], capture_output=True, text=True,
                env={**os.environ, "LODESTREAM_SOCKET": daemon.socket})
            self.assertEqual(ran.returncode, 0, ran.stderr)
            self.assertTrue(ran.stdout.startswith(directory), ran.stdout)
            stubs = subprocess.run(
                [python, "-c", "import lodestream, os; print(sorted(os.listdir(os.path.dirname(lodestream.__file__))))"],
                check=True, capture_output=True, text=True).stdout
            self.assertIn("py.typed", stubs)
            self.assertIn("_native.pyi", stubs)


if __name__ == "__main__":
    unittest.main()
