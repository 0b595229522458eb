"""A strict stand-in for uv on the fake workers: no network, but what is sent is unpacked and run."""

import os
import pathlib
import re
import sys
import tarfile
import urllib.parse

# Steps take as long as the test says: a real model's are longer than it takes a notice to go round.
MAIN = """\
import os, time
from sg4v_jax.__main__ import main
if __name__ == "__main__":
    if "FAKE_STEP_SECONDS" in os.environ:
        from sg4v_jax.train import loop
        compile_step = loop.compile_step
        def compile_slow_step(*arguments):
            step = compile_step(*arguments)
            return lambda *state: (time.sleep(float(os.environ["FAKE_STEP_SECONDS"])), step(*state))[1]
        loop.compile_step = compile_slow_step
    main()
"""


def main(argv: list[str]) -> None:
    python = os.environ["FAKE_PYTHON"]
    if argv[:1] == ["venv"]:
        match argv[1:]:
            case ["--quiet", "--python", version, folder] if re.fullmatch(r"3\.1\d", version):
                binaries = pathlib.Path(folder, "bin")
                binaries.mkdir(parents=True)
                script(binaries / "python", f'exec {python} "$@"')
                return
    match argv:
        case ["pip", "install", "--quiet", "--python", interpreter, requirement]:
            name, _, url = requirement.partition(" @ ")
            if not re.fullmatch(r"sg4v_jax(\[[a-z,]+\])?", name) or not os.access(interpreter, os.X_OK):
                sys.exit(f"uv: bad requirement {requirement!r} or no {interpreter}")
            install(pathlib.Path(interpreter).parents[1], urllib.parse.urlparse(url), python)
            return
    sys.exit(f"uv: not known here: {argv}")


def install(venv: pathlib.Path, url: urllib.parse.ParseResult, python: str) -> None:
    if url.scheme != "file":
        sys.exit(f"uv: there is no network here for {url.geturl()}")
    with tarfile.open(urllib.parse.unquote(url.path)) as archive:
        archive.extractall(venv / "src", filter="data")
    (tree,) = (venv / "src").iterdir()
    if not (tree / "setup.py").is_file():
        sys.exit(f"uv: {url.path} is no source tree")
    # Where setup.py puts them.
    (tree / "sg4v_jax" / "configs").symlink_to(tree / "configs")
    (venv / "main.py").write_text(MAIN)
    script(venv / "bin" / "sg4v", f'PYTHONPATH={tree} exec {python} {venv}/main.py "$@"')


def script(path: pathlib.Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


if __name__ == "__main__":
    main(sys.argv[1:])
