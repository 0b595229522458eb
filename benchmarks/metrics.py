"""What watching a run costs: the demo's train step with every number on, against the bare step.

Both take turns on the same batch; the bare one returns its loss and nothing else, which is read at the end of
a turn. The watched one goes through the recorder as `sg4v train` does, with TensorBoard on.

  python benchmarks/metrics.py --output=metrics.json
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sg4v_jax import config as configs
from sg4v_jax.data.batch import Batch, to_devices
from sg4v_jax.data.build import build
from sg4v_jax.data.conversation import training_texts
from sg4v_jax.data.loader import Loader
from sg4v_jax.data.tokenizer import Tokenizer, train_tokenizer
from sg4v_jax.parallel.mesh import make_mesh
from sg4v_jax.train import groups
from sg4v_jax.train.initial import initial_params
from sg4v_jax.train.recorder import Recorder
from sg4v_jax.train.setup import Setup, compile_step, loader_config, model_config, set_up
from sg4v_jax.train.step import make_train_step
from sg4v_jax.train.timeline import DATA, Timeline
from sg4v_jax.world import write_world

SPEC = "configs/captioner.py:tiny"
# Steps, and what they took of the clock and of all cores.
Turn = Callable[[int], tuple[float, float]]


@dataclasses.dataclass
class Contender:
    """A way to take steps, with a state of its own."""

    step: Any
    trainable: Any
    opt_state: Any
    frozen: Any

    def take(self, batch: Batch) -> dict[str, jax.Array]:
        """One step; its metrics."""
        self.trainable, self.opt_state, metrics = self.step(
            self.trainable, self.opt_state, self.frozen, batch
        )
        return metrics


def prepare(root: pathlib.Path) -> tuple[ConfigDict, Tokenizer]:
    """The demo's captioner config on a small world."""
    files = write_world(root, train_scenes=200, heldout_scenes=1, seed=0)
    path = root / "tokenizer.model"
    train_tokenizer(training_texts([files.cap_dense]), path, 640, hard_vocab_limit=False)
    dataset, _ = build("captions", files.cap_dense, files.image_root, root / "datasets")
    overrides = {
        "data.tokenizer": os.fspath(path),
        "data.sources.cap_dense.directory": os.fspath(dataset),
        "metrics.tensorboard": True,
        "metrics.peak_flops": 1e11,
    }
    return configs.load(SPEC, **overrides), Tokenizer(path)


def contender(setup: Setup, config: ConfigDict, step: Any) -> Contender:
    params = initial_params(setup.model, config.init.to_dict(), setup.shapes, setup.shardings, config.seed)
    trainable, frozen = groups.split(params, config.optim.groups)
    return Contender(step, trainable, jax.jit(setup.optimizer.init)(trainable), frozen)


def bare_step(setup: Setup, config: ConfigDict) -> Any:
    """The same step for which nothing but the loss is computed besides the update."""
    full = make_train_step(
        setup.graphdef,
        setup.optimizer,
        compute_dtype=jnp.dtype(config.train.compute_dtype),
        remat=config.train.remat,
        loss_chunk=config.train.loss_chunk,
    )

    def step(*arguments: Any) -> Any:
        trainable, opt_state, metrics = full(*arguments)
        return trainable, opt_state, {"loss": metrics["loss"]}

    return jax.jit(step, donate_argnums=(0, 1))


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """(seconds by the clock, seconds of all cores)."""
    clock, cores = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - cores


def turns(config: ConfigDict, tokenizer: Tokenizer, workdir: pathlib.Path, rounds: int, steps: int) -> Any:
    """Seconds per step, (clock, cores) of the bare and of the watched step, round by round."""
    mesh = make_mesh(**config.mesh)
    model = model_config(config, tokenizer)
    with jax.set_mesh(mesh):
        setup = set_up(config, model, mesh, rounds * steps)
        batch = to_devices(next(iter(Loader(loader_config(config, model), tokenizer))), mesh)
        bare = contender(setup, config, bare_step(setup, config))
        watched = contender(setup, config, compile_step(setup, config))
        with Recorder(workdir, config, setup, Timeline(), 0, (rounds + 1) * steps) as recorder:
            numbers = recorder.steps()

            def bare_turn() -> None:
                for _ in range(steps):
                    metrics = bare.take(batch)
                jax.block_until_ready(metrics)

            def watched_turn() -> None:
                for _ in range(steps):
                    step = next(numbers)
                    with recorder.waiting(DATA):
                        pass
                    recorder.see(step, batch, tokenizer)
                    recorder.add(watched.take(batch))
                    recorder.log(step, 0, {})

            bare_turn(), watched_turn()  # Compile.
            found = []
            for number in range(rounds):
                order = (bare_turn, watched_turn) if number % 2 else (watched_turn, bare_turn)
                seconds = {turn: timed(turn) for turn in order}
                found.append([[s / steps for s in seconds[turn]] for turn in (bare_turn, watched_turn)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10, help="of a turn; a line is written after every ten")
    parser.add_argument("--output", help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        config, tokenizer = prepare(root / "world")
        workdir = root / "run"
        workdir.mkdir()
        found = turns(config, tokenizer, workdir, arguments.rounds, arguments.steps)
    report: dict[str, Any] = {"machine": platform.platform(), "jax": jax.__version__, "load": os.getloadavg()}
    for index, name in enumerate(("clock", "cores")):
        bare, watched = ([each[who][index] for each in found] for who in (0, 1))
        ratios = [b / a for a, b in zip(bare, watched, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        best = min(watched) / min(bare)
        report[name] = {"bare": bare, "watched": watched, "ratio": middle, "quartiles": [low, high]}
        report[name]["best"] = best
        print(
            f"{name}: bare {1e3 * statistics.median(bare):.1f} ms/step, watched "
            f"{1e3 * statistics.median(watched):.1f}; ratio {middle:.3f} (quartiles {low:.3f} to "
            f"{high:.3f}), of the best turns {best:.3f}"
        )
    if arguments.output:
        pathlib.Path(arguments.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
