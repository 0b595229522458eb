"""`sg4v report`."""

import argparse
from typing import Any

from sg4v_jax.commands.common import add_command, progress_bar


def add(commands: Any) -> None:
    """Adds `report` to the commands."""
    parser = add_command(
        commands,
        "report",
        run,
        "What captions are like, as a page: samples beside their images, lengths, words, repetition, risky "
        "phrases, sources. Compares two sets, makes a page for votes on them, and counts the votes.",
        "  sg4v report captions --images photos --output report.html\n"
        "  sg4v report ours.json --compare theirs.json --images data --output report.html \\\n"
        "    --preference preference.html\n"
        "  sg4v report --votes votes-*.json --key preference.key.json",
    )
    parser.add_argument("captions", nargs="*", help="JSON or JSONL files, or an output folder")
    parser.add_argument("--images", help="folder that `image` paths are relative to")
    parser.add_argument("--output", help="page to write, with a .json of its numbers beside it")
    parser.add_argument("--compare", nargs="+", default=[], help="a second set")
    parser.add_argument("--names", nargs="+", default=[], help="of the sets; their paths by default")
    parser.add_argument("--sample", type=int, default=1000, help="captions to tag and count words of")
    parser.add_argument("--each", type=int, default=3, help="samples to show of each source, at least")
    parser.add_argument("--samples", type=int, default=36, help="samples to show in all")
    parser.add_argument("--seed", type=int, default=0, help="of samples, pairs and sides")
    parser.add_argument("--preference", help="page to write on which people choose between the two sets")
    parser.add_argument("--pairs", type=int, default=100, help="images on that page")
    parser.add_argument("--votes", nargs="+", default=[], help="files that came back from that page")
    parser.add_argument("--key", help="its .key.json; by default the only one beside the votes")


def run(arguments: argparse.Namespace, config_argv: list[str]) -> None:
    """Runs `report`."""
    from sg4v_jax.caption.report.votes import summary, tally

    votes = tally(arguments.votes, arguments.key) if arguments.votes else None
    if votes:
        print(summary(votes))
    if not arguments.captions and votes and not arguments.output:
        return
    _check(arguments)
    _report(arguments, votes)


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.captions or not arguments.images:
        raise ValueError("give caption files and --images, or --votes alone")
    if not arguments.output and not arguments.preference:
        raise ValueError("nothing to write: give --output, --preference or both")
    if arguments.preference and not arguments.compare:
        raise ValueError("--preference needs two sets: give the second with --compare")
    sets = 2 if arguments.compare else 1
    if len(arguments.names) not in (0, sets):
        raise ValueError(f"--names gives {len(arguments.names)} names for {sets} set(s)")
    if arguments.pairs < 1:
        raise ValueError(f"--pairs={arguments.pairs}: at least one is needed")


def _report(arguments: argparse.Namespace, votes: Any) -> None:
    from sg4v_jax.caption.report.measure import measure
    from sg4v_jax.caption.report.preference import write_preference
    from sg4v_jax.caption.report.report import Options, make_report, summary, write_report
    from sg4v_jax.data.folder import require_folder

    require_folder(arguments.images)
    options = Options(arguments.sample, arguments.each, arguments.samples, arguments.seed)
    paths = [arguments.captions, *([arguments.compare] if arguments.compare else [])]
    names = arguments.names or [""] * len(paths)
    sets = [
        measure(files, name, progress=progress_bar("captions"))
        for files, name in zip(paths, names, strict=True)
    ]
    if arguments.output:
        report = make_report(sets, arguments.images, options, votes, progress=progress_bar("sets"))
        page, numbers = write_report(report, arguments.output)
        print(f"{summary(report)}\n\nwrote {page} and {numbers}")
    if arguments.preference:
        written = write_preference(
            sets[0],
            sets[1],
            arguments.images,
            arguments.preference,
            pairs=arguments.pairs,
            seed=arguments.seed,
            progress=progress_bar("images"),
        )
        equal = f"; {written.equal} left out, their captions are equal" if written.equal else ""
        print(f"wrote {written.page} with {written.pairs} pairs{equal}. Keep {written.key} from the raters")
