"""What the workers install: a commit of this repository, a built file, or a URL with a commit."""

import contextlib
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from launch.gcloud import Runner

REPOSITORY = pathlib.Path(__file__).parents[1]


@contextlib.contextmanager
def prepared(source: str, runner: Runner) -> Iterator[tuple[str, list[str]]]:
    """Makes an archive of a git ref, for as long as it takes to send it.

    Args:
      source: see `config.install.source`.
      runner: runs `git archive`.

    Yields:
      (what `worker.py install` is told, files to send along).

    Raises:
      ValueError: no such file or ref.
    """
    if source.startswith("git+"):
        yield source, []
    elif source.endswith((".whl", ".tar.gz")):
        file = pathlib.Path(source)
        if not file.is_file():
            raise ValueError(f"config.install.source={source}: no such file")
        yield file.name, [source]
    else:
        commit = _commit(source)
        with tempfile.TemporaryDirectory(prefix="sg4v-launch-") as folder:
            name = f"sg4v_jax-{commit[:12]}"
            archive = f"{folder}/{name}.tar.gz"
            argv = ["git", "-C", str(REPOSITORY), "archive", "--format=tar.gz", f"--prefix={name}/"]
            runner.run([*argv, f"--output={archive}", commit])
            yield f"{name}.tar.gz", [archive]


def _commit(ref: str) -> str:
    """The commit that a ref means now; says so if it isn't all that lies here."""
    done = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    if done.returncode:
        raise ValueError(
            f"config.install.source={ref}: neither a .whl or .tar.gz file, nor git+https://...@ref, nor a "
            f"git ref in {REPOSITORY}"
        )
    if _git("status", "--porcelain", "--untracked-files=no").stdout and ref == "HEAD":
        print("warning: changes that are not committed are not sent", file=sys.stderr)
    return done.stdout.strip()


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True)
