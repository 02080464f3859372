"""Runs the safetensors project's own Python tests with `lodestream.safetensors` in its place.

    run.py [pytest's arguments]

They come from the source distribution of the version that is installed. Runs them twice: through a daemon, and without one.
Exit code 0 if all pass.
"""

import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from support import Daemon  # noqa: E402

# Files of tests that do not apply, and why. Those for MLX, Paddle and other devices skip themselves.
NOT_APPLICABLE = {
    "test_flax_comparison.py": "needs jax",
    "test_tf_comparison.py": "needs tensorflow",
}


def fetch(directory):
    """The tests of the installed version, unpacked; the directory that they run in."""
    version = importlib.metadata.version("safetensors")
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        + ["--no-binary", "safetensors", "--dest", directory, f"safetensors=={version}"],
        check=True,
    )
    [archive] = directory.glob("safetensors-*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(directory, filter="data")
    [tests] = directory.glob("safetensors-*/bindings/python/tests")
    return tests


def run(tests, arguments, socket):
    ignored = [f"--ignore={tests / name}" for name in NOT_APPLICABLE]
    path = os.pathsep.join([str(HERE), *sys.path])
    environment = {**os.environ, "LODESTREAM_SOCKET": str(socket), "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "dropin", "-p", "no:cacheprovider", *ignored, *arguments, tests]
    # Some write to files of the directory above.
    return subprocess.run(command, cwd=tests.parent, env=environment).returncode


def main():
    for name, why in NOT_APPLICABLE.items():
        print(f"not run: {name}: {why}")
    with tempfile.TemporaryDirectory() as directory:
        tests = fetch(pathlib.Path(directory))
        with Daemon(directory) as daemon:
            codes = [run(tests, sys.argv[1:], daemon.socket)]
            with daemon.connect() as node:
                loads = len(node.jobs())
            codes.append(run(tests, sys.argv[1:], "/nonexistent"))
    print(f"first through a daemon, by at least {loads} loads, then without one")
    if loads == 0:
        sys.exit("nothing went through the daemon")
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
