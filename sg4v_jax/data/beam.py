"""Writes the shards of a build on Apache Beam: many machines, or one (`DirectRunner`).

Optional: `pip install 'sg4v_jax[beam]'`. The shards are those of a local build, byte for byte, and go on
where another build stopped. All paths must be ones that every machine can reach.
"""

from collections.abc import Callable, Iterator, Sequence

from sg4v_jax.data.build import BuildReport, Executor, Shard


def on_beam(options: Sequence[str]) -> Executor:
    """An executor for `data.build.build`.

    Args:
      options: Beam's own flags, such as `["--runner=DataflowRunner", "--project=..."]`.

    Raises:
      ImportError: Beam is not installed.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ImportError("Apache Beam is not installed: pip install 'sg4v_jax[beam]'") from error

    def execute(write: Callable[[Shard], BuildReport], shards: Sequence[Shard]) -> Iterator[BuildReport]:
        with apache_beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            (
                pipeline
                | "shards" >> apache_beam.Create(shards)
                # Or the runner would write all of them where it made the list.
                | "spread" >> apache_beam.Reshuffle()
                | "write" >> apache_beam.Map(write)
            )
        # Every shard has left a mark that says what is in it.
        yield from map(write, shards)

    return execute
