"""`sg4v collect` as a user types it, and every command of its page in docs/."""

import hashlib
import json
import pathlib
import re
import shlex
import subprocess

import pytest

from sg4v_jax.__main__ import main
from tests.caption.collect.collecting import captions, lines
from tests.caption.collect.endpoint import KEY, FaultyEndpoint, caption_for, completion, image_of

Images = dict[str, str]
PAGE = pathlib.Path(__file__).parents[3] / "docs/collect.md"
Shown = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def in_a_folder_with_a_key(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def sg4v(*argv: str) -> int:
    """The exit status of a command."""
    try:
        main(list(argv))
    except SystemExit as exit_:
        assert isinstance(exit_.code, int)
        return exit_.code
    return 0


def collect(endpoint: FaultyEndpoint, *argv: str) -> int:
    given = ["--images=data", "--output=out", "--model=m", "--backoff=0.01", "--workers=2"]
    return sg4v("collect", *given, f"--endpoint={endpoint.url}", *argv)


def test_from_nothing_to_captions(endpoint: FaultyEndpoint, images: Images, capsys: Shown) -> None:
    shas = list(images.values())
    endpoint.faults = {shas[0]: ["404"], shas[1]: ["empty"] * 2, shas[2]: ["drop"]}
    prices = ["--price-in=10", "--price-out=30", "--attempts=2"]
    assert collect(endpoint, "--dry-run", *prices) == 0
    shown = capsys.readouterr().out
    assert "to ask: 24 requests for 24 images (coco 12, sam 12)" in shown
    assert "about $0.28, at most $0.84; spent $0.00" in shown
    assert not endpoint.asked

    assert collect(endpoint, *prices) == 0
    shown = capsys.readouterr().out
    assert "out/captions.json: 22 captioned, 1 rejected, 1 failed" in shown
    assert "answers: 22 accepted, 2 empty" in shown
    assert "errors: 1 x HTTP 404, 1 x no answer" in shown or "errors: 1 x no answer, 1 x HTTP 404" in shown
    assert "; the last: 127.0.0.1:" in shown
    assert "used: 9,600 prompt and 1,200 answer tokens, $0.13" in shown
    assert "not in it: 1 requests without an answer that may be billed, at most $0.0" in shown
    assert {line["reason"] for line in lines(pathlib.Path("out/rejected.jsonl"))} == {"error", "empty"}


def test_status_and_last_words(endpoint: FaultyEndpoint, images: Images, capsys: Shown) -> None:
    endpoint.faults["*"] = ["401"] * 9
    assert collect(endpoint) == 2
    shown = capsys.readouterr()
    assert "HTTP 401 (the key isn't accepted): fault 401, you sent Bearer [key]" in shown.err
    assert "the same command goes on from here" in shown.err
    assert KEY not in shown.err + shown.out
    endpoint.faults.clear()
    assert collect(endpoint, "--price-in=10", "--price-out=30", "--budget=0.1") == 1
    shown = capsys.readouterr().out
    assert "stopped: the budget of $0.10 has no room for another request" in shown
    assert "images are still to be asked about" in shown
    assert collect(endpoint, "--question=Describe.") == 0
    records = json.loads(pathlib.Path("out/captions.json").read_text())
    assert {record["conversations"][0]["value"] for record in records} == {"<image>\nDescribe."}


def test_options_reach_the_request(endpoint: FaultyEndpoint, images: Images, capsys: Shown) -> None:
    extra = json.dumps({"max_tokens": None, "max_completion_tokens": 9})
    options = [f"--extra-body={extra}", "--detail=low", "--temperature=0", "--seed=5", "--max-image-side=8"]
    assert collect(endpoint, *options, "--key-env=NONE_SUCH") == 0
    assert "NONE_SUCH is not set: asking without a key" in capsys.readouterr().err
    for asked in endpoint.asked:
        assert "max_tokens" not in asked.body and asked.body["max_completion_tokens"] == 9
        assert (asked.body["temperature"], asked.body["seed"]) == (0, 5)
        image = asked.body["messages"][0]["content"][1]["image_url"]
        assert image["detail"] == "low" and image["url"].startswith("data:image/jpeg;base64,")
        assert "authorization" not in asked.headers


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch=read"], "files go with --batch read"),
        (["a.jsonl"], "files go with --batch read"),
        (["--extra-body=[]"], "--extra-body '[]': expected an object"),
        (["--extra-body={"], "--extra-body '{'"),
        (['--extra-body={"n": 2}'], "without model, messages, stream and n"),
        (["--budget=5"], "--price-in"),
        (["--endpoint=host/v1"], "endpoint 'host/v1'"),
        (["--source-map=none.json"], "none.json"),
        (["--min-words=700"], "min_words=700"),
        (["--max-bad-images=0"], "broken.png"),
    ],
)
def test_errors(
    argv: list[str], message: str, endpoint: FaultyEndpoint, images: Images, capsys: Shown
) -> None:
    pathlib.Path("data/broken.png").write_bytes(b"no image")
    assert collect(endpoint, *argv) == 2
    shown = capsys.readouterr()
    assert message in shown.err.splitlines()[-1] and "Traceback" not in shown.err
    assert not endpoint.asked


def test_the_page(endpoint: FaultyEndpoint, images: Images, capsys: Shown) -> None:
    """Every command, in order and as it stands there; only the endpoint is another."""
    for folder in ("shots/signs", "shots/birds"):
        path = pathlib.Path("data", folder, "new.png")
        path.parent.mkdir(parents=True)
        path.write_bytes(pathlib.Path("data", next(iter(images))).read_bytes())
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    ran = 0
    for command in commands:
        argv = shlex.split(command)
        if argv[0] != "sg4v":
            subprocess.run(command, shell=True, check=True)  # The page writes its own small files.
            continue
        ran += 1
        if "--teacher" in argv:
            # test_teacher.py has one; here there is no such directory.
            assert sg4v(*argv[1:]) == 2 and "runs/captioner" in capsys.readouterr().err
            continue
        if argv[1] == "collect" and "--endpoint" not in argv:
            argv += ["--endpoint", ""]
        if "--endpoint" in argv:
            argv[argv.index("--endpoint") + 1] = endpoint.url
        if "read" in argv:
            answer_batch(pathlib.Path("collected-batch/batch"))
        assert sg4v(*argv[1:]) == 0, command
    assert ran == 7
    assert captions(pathlib.Path("collected")) == captions(pathlib.Path("collected-shots"))
    assert len(captions(pathlib.Path("collected"))) == 26
    assert pathlib.Path("datasets/llava/captions/1.0.0/dataset_info.json").is_file()
    prompts = {asked.body["messages"][0]["content"][0]["text"] for asked in endpoint.asked}
    assert sum("Describe the bird, its plumage" in prompt for prompt in prompts) == 1
    assert captions(pathlib.Path("collected-batch")) == captions(pathlib.Path("collected"))
    assert KEY not in capsys.readouterr().out


def answer_batch(folder: pathlib.Path) -> None:

    requests = [request for file in sorted(folder.iterdir()) for request in lines(file)]
    found = [
        {
            "custom_id": request["custom_id"],
            "response": {
                "status_code": 200,
                "body": completion(caption_for(hashlib.sha256(image_of(request["body"])).hexdigest())),
            },
        }
        for request in requests
    ]
    pathlib.Path("output.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    pathlib.Path("errors.jsonl").write_text("")


def test_the_page_names_every_option_it_has(capsys: Shown) -> None:
    """A renamed option must not live on in the text."""
    assert sg4v("collect", "--help") == 0
    shown = capsys.readouterr().out
    for option in set(re.findall(r"--[a-z][a-z-]+", PAGE.read_text())) - {"--name", "--json"}:
        assert option in shown, option
