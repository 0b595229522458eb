"""The `sg4v` command: help, errors, and the loop from nothing to a chat, as a user would type it."""

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from sg4v_jax.__main__ import main, split_config
from sg4v_jax.convert.load import load_model
from sg4v_jax.infer.engine import Engine
from sg4v_jax.train import metrics
from sg4v_jax.world import load_photos
from tests.evaluate import official

# What its arguments make it say.
Command = Callable[..., str]
COMMANDS = [
    ["demo"],
    ["data", "build"],
    ["data", "check"],
    ["data", "tokenizer"],
    ["data", "world"],
    ["data", "show"],
    ["collect"],
    ["train"],
    ["caption"],
    ["chat"],
    ["eval"],
    ["convert"],
    ["info"],
]
VOCAB = 400
PROMPT = "Describe the image."
# Smaller than `tiny`, and independent of it: this trains nothing worth having.
SMALL = [
    "--config.model.vision.hidden_size=32",
    "--config.model.vision.intermediate_size=48",
    "--config.model.vision.num_layers=2",
    "--config.model.vision.image_size=24",
    "--config.model.vision.patch_size=12",
    "--config.model.text.hidden_size=32",
    "--config.model.text.intermediate_size=48",
    "--config.model.text.num_layers=1",
    f"--config.model.text.vocab_size={VOCAB}",
    "--config.train.num_steps=2",
    "--config.train.log_every=1",
    "--config.data.template=v1",
    f"--config.data.prompt={PROMPT}",
    "--config.data.seq_len=384",
    "--config.data.image_slots=2",
    "--config.data.batch_size=2",
    "--config.data.num_threads=1",
]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command that must exit with 2, without a traceback; its last line on standard error."""

    def call(*argv: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(list(argv))
        assert exit_.value.code == 2
        output = capsys.readouterr()
        assert "Traceback" not in output.err and not output.out
        return output.err.strip().splitlines()[-1]

    return call


def test_module_runs() -> None:
    """Also that help needs no accelerator, and comes at once."""
    done = subprocess.run([sys.executable, "-m", "sg4v_jax", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"sg4v {' '.join(command[:1])}" in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert f"example:\n  sg4v {' '.join(command)} " in shown


def test_split_config() -> None:
    argv = ["train", "--config=a.py:b", "--workdir", "w", "--config.x.y", "1", "--config.z=2", "--configure"]
    own, config = split_config(argv)
    assert own == ["train", "--workdir", "w", "--configure"]
    assert config == ["--config=a.py:b", "--config.x.y=1", "--config.z=2"]
    assert split_config(["train", "--config", "a.py"])[1] == ["--config=a.py"]


TRAIN = ["train", "--workdir=w", "--config=configs/captioner.py:tiny"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "invalid choice: 'trian'"),
        ([], "COMMAND"),
        (["data", "bild"], "invalid choice: 'bild'"),
        (["chat", "--model", "m", "--config=x"], "chat takes no --config"),
        (["data", "world", "--output=o", "--config=x"], "data world takes no --config"),
        (["data", "show"], "which config? Give --config=configs/NAME.py"),
        (["data", "show", "--batch=-1", "--config=configs/captioner.py:tiny"], "--batch counts from 0"),
        (["train", "--workdir=w"], "which config? Give --config=configs/NAME.py"),
        (["train", "--workdir=w", "--config=configs/captoner.py"], "did you mean configs/captioner.py?"),
        (["train", "--workdir=w", "--config=configs/captioner.py:9b"], "size '9b' is not one of"),
        ([*TRAIN, "--config.optim.learning_rat=1"], "did you mean config.optim.learning_rate?"),
        (TRAIN, "config.data.tokenizer is not set; give --config.data.tokenizer=PATH"),
        ([*TRAIN, "--config.data.tokenizer=none.model"], "none.model"),
        ([*TRAIN, "--config.mesh.fsdp=3"], "fsdp=3 x tensor=1 does not fit 1 devices"),
        (["chat", "--model", "none", "Why?"], "none"),
        (["chat", "--model", "none", "--temperature=-1", "Why?"], "temperature=-1.0 is out of range"),
        (["eval", "--model=m", "--questions=none.jsonl", "--images=i", "--output=o"], "none.jsonl"),
        (["eval", "--questions=none.jsonl"], "give --images"),
        (["eval", "--model=m"], "one of the arguments --benchmarks --compare --questions is required"),
        (["eval", "--benchmarks=mmee"], "did you mean mme?"),
        (["eval", "--benchmarks=mme", "--model=m", "--output=o", "--data=."], "no folder MME or mme for mme"),
        (["eval", "--benchmarks=mme", "--model=m", "--output=o", "--data=.", "--shard=4/4"], "--shard '4/4'"),
        (["eval", "--compare", "none"], "none: no finished benchmark"),
        (["caption", "--model=m", "--images=none.json", "--output=o"], "none.json"),
        (["convert", "--model=none", "--output=o"], "none is no model"),
        (["data", "build", "--name=x", "--json=none.json", "--images=.", "--output=o"], "none.json"),
        (["data", "check", "--json=none.json", "--images=."], "none.json"),
        (["data", "build", "--name=x", "--images=.", "--output=o", "--max-bad=1%"], "goes with bad_records"),
        (["data", "tokenizer", "--json", "none.json", "--vocab-size=400", "--output=o"], "none.json"),
        (["data", "world", "--output=o", "--train=0"], "0 training"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_that_names_the_thing(
    argv: list[str], message: str, fails: Command, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(*argv)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": "a", "conversations": [', "line 1"),
        ('[{"id": "a", "conversations": [{"from": "user", "value": "x"}]}]', "'from' is str 'user'"),
        ('{"id": "a", "image": 7, "conversations": []}\n', "'image' is int 7"),
    ],
)
def test_broken_records_are_named(content: str, message: str, fails: Command, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "broken.json"
    file.write_text(content)
    places = ["--images=.", f"--output={tmp_path / 'datasets'}"]
    shown = fails("data", "build", "--name=x", f"--json={file}", *places)
    assert "broken.json: record 0" in shown and message in shown


def test_debug_shows_the_traceback(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["convert", "--debug", f"--model={tmp_path}", "--output=o"])


# --- The loop ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Made:
    """Directories that the commands below made, in one folder."""

    root: pathlib.Path

    def __truediv__(self, name: str) -> str:
        return os.fspath(self.root / name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A world, a tokenizer, a dataset and a captioner, by four commands."""
    made = Made(tmp_path_factory.mktemp("cli"))
    main(["data", "world", "--output", made / "world", "--train=12", "--heldout=2", "--seed=1"])
    captions = made / "world/cap_dense.json"
    tokenizer = made / "tokenizer.model"
    main(["data", "tokenizer", "--json", captions, f"--vocab-size={VOCAB}", "--output", tokenizer])
    images = ["--images", made / "world/images", "--output", made / "datasets"]
    main(["data", "build", "--name=caps", "--json", captions, *images])
    main(["train", "--workdir", made / "run", "--config=configs/captioner.py:tiny", *SMALL, *sources(made)])
    return made


def sources(made: Made) -> list[str]:
    """What a config wants to know of the data."""
    return [
        f"--config.data.tokenizer={made / 'tokenizer.model'}",
        f"--config.data.sources.cap_dense.directory={made / 'datasets/llava/caps/1.0.0'}",
    ]


@pytest.fixture
def run(made: Made, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command; what it printed."""

    def call(*argv: str) -> str:
        capsys.readouterr()
        main(list(argv))
        return capsys.readouterr().out

    return call


@pytest.mark.slow
def test_data_show(made: Made, run: Command, tmp_path: pathlib.Path) -> None:
    argv = ["data", "show", "--config=configs/captioner.py:tiny", *SMALL, *sources(made)]
    shown = run(*argv, "--rows=1")
    assert "row 0: " in shown and "row 1: " not in shown and "[image in slot 0]" in shown
    assert run(*argv, "--rows=1", "--batch=1") != shown
    page = tmp_path / "batch.html"
    assert run(*argv, "--html", str(page)) == f"wrote {page}\n"
    assert page.read_text().count("<section>") == 2 and list(tmp_path.iterdir()) == [page]


@pytest.mark.slow
def test_train(made: Made) -> None:
    assert [line["step"] for line in metrics.read(made.root / "run/metrics.jsonl")] == [0, 1]
    assert json.loads((made.root / "run/config.json").read_text())["stage"] == "captioner"
    bundle = load_model(made / "run")
    assert (bundle.prompt, bundle.template) == (PROMPT, "v1")
    assert bundle.tokenizer_file == made.root / "run/tokenizer.model"


@pytest.mark.slow
def test_a_converted_model_is_no_run(
    made: Made, run: Command, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training in its directory would start from random weights; from `config.init` it starts right."""
    start, workdir = str(tmp_path / "start"), str(tmp_path / "run")
    assert "MB/s" in run("convert", "--model", made / "run", "--output", start, "--to=run", "--dtype=float32")
    assert "captioner" in run("info", start)
    assert "0 differ" in run("convert", "--check", made / "run", start)
    data = [
        f"--config.data.tokenizer={made / 'tokenizer.model'}",
        f"--config.data.sources.cap_dense.directory={made / 'datasets/llava/caps/1.0.0'}",
    ]
    train = ["train", "--config=configs/captioner.py:tiny", *SMALL, *data]
    with pytest.raises(SystemExit):
        main([*train, "--workdir", start])
    assert "holds a converted model, not a run" in capsys.readouterr().err
    init = [f"--config.init.{part}={start}" for part in ("vision", "projector", "text")]
    main([*train, *init, "--config.optim.learning_rate=0.0", "--workdir", workdir])
    assert "0 differ" in run("convert", "--check", start, workdir, "--weights-only")


def caption_argv(made: Made, images: pathlib.Path, output: pathlib.Path) -> list[str]:
    argv = ["caption", "--model", made / "run", "--images", str(images), "--output", str(output)]
    return [*argv, "--shard-size=3", "--max-failed=10%", "--dtype=float32", "--max-new-tokens=24"]


def outputs(directory: pathlib.Path) -> dict[str, bytes]:
    """What a finished captioning job holds, by path."""
    kept = (path for path in directory.rglob("*") if path.is_file() and path.parent.name != "work")
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in kept}


@pytest.mark.slow
def test_caption(made: Made, run: Command, fails: Command, tmp_path: pathlib.Path) -> None:
    """Two processes, one of them killed at work, write what one undisturbed process does."""
    images = tmp_path / "images"
    for name, photo in zip(("a.jpg", "sub/b.jpg", "c.jpg"), load_photos(), strict=False):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(photo.encoded)
    (images / "broken.jpg").write_bytes(load_photos()[0].encoded[:400])
    for path in sorted((made.root / "world/images").rglob("*.png"))[:12]:
        (images / path.name).write_bytes(path.read_bytes())
    count = len(list(images.rglob("*.*")))

    undisturbed, shared = tmp_path / "undisturbed", tmp_path / "shared"
    argv = [sys.executable, "-m", "sg4v_jax", *caption_argv(made, images, shared)]
    pair = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in "ab"]
    shown = run(*caption_argv(made, images, undisturbed))
    assert f"{count - 1} of {count} captioned" in shown and "1 failed (1 corrupt_image)" in shown
    while not list(shared.glob("shards/*.jsonl")) and pair[0].poll() is None:
        time.sleep(0.01)
    pair[0].kill()
    said = pair[1].communicate()[0]
    assert pair[1].returncode == 0, said
    assert pair[0].wait() in (-signal.SIGKILL, 0)
    assert f"prompt: {PROMPT!r} (the one the captioner was trained with)" in said
    assert outputs(shared) == outputs(undisturbed)

    shards = sorted(undisturbed.glob("shards/*.jsonl"))
    lines = [json.loads(line) for path in shards for line in path.read_text().split("\n")[:-1]]
    assert len(lines) == count and [line["image"] for line in lines] == sorted(
        line["image"] for line in lines
    )
    (error,) = [line for line in lines if "error" in line]
    assert error["image"] == "broken.jpg" and "can't be decoded" in error["error"]
    records = json.loads((undisturbed / "captions.json").read_text())
    assert [record["image"] for record in records] == [line["image"] for line in lines if line.get("caption")]
    assert {record["conversations"][0]["value"] for record in records} <= {f"<image>\n{PROMPT}"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_run", lambda *_: pytest.fail("there was nothing left to do"))
        run(*caption_argv(made, images, undisturbed))
    assert outputs(shared) == outputs(undisturbed)
    message = fails(*caption_argv(made, images, undisturbed), "--prompt=Why?", "--top-k=5")
    assert f"prompt was {PROMPT!r}, now 'Why?'" in message and "options.top_k was 0, now 5" in message


@pytest.mark.slow
def test_eval_scores_against_the_truth(made: Made, run: Command, tmp_path: pathlib.Path) -> None:
    questions, truth = made.root / "world/heldout_questions.jsonl", made.root / "world/heldout_answers.jsonl"
    answers = tmp_path / "answers.jsonl"
    argv = ["--model", made / "run", "--questions", str(questions), "--images", made / "world/images"]
    shown = run("eval", *argv, "--output", str(answers), "--truth", str(truth), "--max-new-tokens=2")
    asked = [json.loads(line) for line in questions.read_text().splitlines()]
    given = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["question_id"] for line in given] == [line["question_id"] for line in asked]
    assert all(line["model_id"] == "run" for line in given)
    assert f"{len(asked)} answers" in shown
    assert all(line["category"] in shown for line in asked)


@pytest.mark.slow
def test_eval_of_benchmarks(made: Made, run: Command, fails: Command, tmp_path: pathlib.Path) -> None:
    """From official files to scores and a comparison, by generating and by likelihood."""
    official.qbench(tmp_path)
    (tmp_path / "world").symlink_to(made.root / "world")
    argv = ["eval", "--model", made / "run", "--data", str(tmp_path), "--max-new-tokens=3"]
    both = [*argv, "--benchmarks=all", "--output", str(tmp_path / "a")]
    assert "world: 5 answered, 5 left" in run(*both, "--shard=0/2", "--limit=10")
    shown = run(*both, "--shard=1/2", "--limit=10")
    assert "embedded world" in shown and "Q-Bench" in shown and "left out: gqa: " in shown
    scores = json.loads((tmp_path / "a/world/scores.json").read_text())
    assert scores["samples"] == 10 and scores["model"] == "run" and not scores["problems"]
    lines = [json.loads(line) for line in (tmp_path / "a/qbench/samples.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "1"] and lines[0]["prompt"].endswith("ASSISTANT:")

    run(*argv, "--benchmarks=qbench", "--mode=letters", "--output", str(tmp_path / "b"))
    line = json.loads((tmp_path / "b/qbench/samples.jsonl").read_text().splitlines()[0])
    assert line["answer"] in "AB" and len(line["log_probabilities"]) == 2
    page = tmp_path / "page.html"
    shown = run("eval", "--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(page))
    assert "qbench: the runs differ in mode (generate, letters)" in shown and page.exists()
    assert "greedily" in fails(*both, "--temperature=1")


@pytest.mark.slow
def test_convert_and_chat(
    made: Made, run: Command, fails: Command, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converted model says what the run says; a conversation goes on until its input ends."""
    image = tmp_path / "photo.jpg"
    image.write_bytes(load_photos()[0].encoded)
    converted = str(tmp_path / "hf")
    argv = ["convert", "--model", made / "run", "--output", converted, "--to=hf", "--dtype=float32"]
    assert f"wrote {converted}" in run(*argv)
    assert {"config.json", "tokenizer.json", "tokenizer.model"} <= set(os.listdir(converted))
    assert "hf" in fails(*argv), "a directory that isn't empty is not overwritten"
    chat = ["--image", str(image), "--max-new-tokens=4", "--dtype=float32"]
    answers = [run("chat", "--model", model, *chat, "What is this?") for model in (made / "run", converted)]
    assert answers[0] == answers[1] and answers[0].endswith("\n")

    lines = iter(["What is this?", "And now?", "", "What is this?"])

    def typed(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    said = run("chat", "--model", converted, *chat)
    # An empty line starts over: the last answer is the first one again.
    assert said.startswith(answers[0]) and said.endswith(answers[0])


def test_the_commands_of_the_data_page(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that need nothing but the library run as they are written, up to training."""
    page = (pathlib.Path(__file__).parents[1] / "docs/data.md").read_text()
    blocks = [block.split("```")[0].replace("\\\n", " ") for block in page.split("```bash\n")[1:]]
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert all(command[0] == "sg4v" for command in commands)
    monkeypatch.chdir(tmp_path)
    actions = []
    for command in commands:
        if command[1] == "data" and not any("gs://" in argument for argument in command):
            main([*command[1:], *(["--workers=1"] if command[2] in ("check", "build") else [])])
            actions.append(command[2])
    assert actions[:4] == ["world", "tokenizer", "check", "build"]
    assert {path.name for path in tmp_path.glob("datasets/llava/*/1.0.0")} == {"1.0.0"}
    shown = capsys.readouterr().out
    assert "passed: 0 of" in shown and "datasets/llava/sft/1.0.0: " in shown
    assert (tmp_path / "report.html").exists() and (tmp_path / "report.json").exists()
