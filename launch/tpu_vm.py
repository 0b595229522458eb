"""`python -m launch.tpu_vm COMMAND --config=launch/configs/pretrain.py:7b --config.zone=ZONE`."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from launch import config
from launch.gcloud import Runner
from launch.pod import Pod

DESCRIPTION = """\
Runs a command on a TPU pod, by gcloud (docs/launch.md).

commands:
  create     asks for the slices (queued resource)
  wait       until they are there
  install    the library, on all workers, pinned
  run        starts the command on all workers and prints its log; Ctrl-C leaves it running
  attach     prints the log of what runs, to its end
  logs       prints the log so far
  stop       asks the job to save and end
  babysit    all of the above, again after each preemption, until the command exits with 0
  delete     gives the slices back
  status     what there is

example:
  python -m launch.tpu_vm create --config=launch/configs/pretrain.py:7b --config.zone=us-west4-a --dry-run
"""
COMMANDS = ("create", "wait", "install", "run", "attach", "logs", "stop", "babysit", "delete", "status")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 on a bad request, else with what the job exited with."""
    own, config_argv, command = config.split(list(sys.argv[1:] if argv is None else argv))
    parser = argparse.ArgumentParser(
        "launch.tpu_vm", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")
    parser.add_argument("--detach", action="store_true", help="of run: don't wait for its end")
    arguments = parser.parse_args(own)
    try:
        launch = config.load(config_argv, command)
        code = act(arguments.command, Pod(launch, Runner(dry_run=arguments.dry_run)), arguments.detach)
    except (ValueError, OSError) as error:
        print(f"launch.tpu_vm {arguments.command}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("\nleft; what runs on the workers runs on (attach, stop)", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(code)


def act(command: str, pod: Pod, detach: bool = False) -> int:
    """Does one of `COMMANDS`; the exit code."""
    if command in ("create", "babysit"):
        print(f"# {config.describe(pod.launch)}")
    if command == "run":
        print(f"# {shlex.join(pod.launch.command)}")
        job = pod.start()
        return 0 if detach else _report(pod, job)
    if command == "attach":
        return _report(pod, "")
    if command == "babysit":
        pod.runner.note(str(pod.babysit()))
    elif command == "logs":
        pod.follow(to_the_end=False)
    elif command == "status":
        pod.runner.note(pod.runner.state(pod.launch)[0])
    else:
        {
            "create": pod.create,
            "wait": pod.wait,
            "install": pod.install,
            "stop": pod.stop,
            "delete": pod.delete,
        }[command]()
    return 0


def _report(pod: Pod, job: str) -> int:
    outcome = pod.follow(job)
    pod.runner.note(str(outcome))
    return outcome.exit_code


if __name__ == "__main__":
    main()
