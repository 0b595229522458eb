"""MMBench and MMBench-CN: multiple choice that has to survive rotating the options (Liu et al. 2023)."""

import base64
import binascii
import pathlib
from collections.abc import Mapping, Sequence
from typing import ClassVar

from sg4v_jax.evaluate.benchmark import LETTER_ANSWER, Mark, Marked, Metric, Sample, Term
from sg4v_jax.evaluate.choices import infer_option, lettered, matching_prompt
from sg4v_jax.evaluate.files import find, read_table
from sg4v_jax.evaluate.judge import Question
from sg4v_jax.evaluate.judged import JudgedBenchmark

# Rows from here on are rotations of the row with the rest of the number.
_ROTATION = 1_000_000
# A shorter cell names the row whose image it shares.
_SHORTEST_IMAGE = 64
_LETTERS = "ABCD"
_NOT_SUBMITTED = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_COLUMN = 6


class MMBench(JudgedBenchmark):
    """A question is right if all its rotations are. A judge, if there is one, reads what rules can't."""

    name, title = "mmbench", "MMBench"
    folders = ("mmbench", "MMBench")
    max_new_tokens = 1024
    judged = False
    judge_model = "gpt-3.5-turbo-0125 in VLMEvalKit; the server's is not known"
    attempts = 3
    without_judge = "no judge read what rules can't: wrong, as in VLMEvalKit's exact matching"
    suffix: ClassVar[str] = LETTER_ANSWER
    files: ClassVar[tuple[str, ...]] = (
        *("mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv"),
        *("MMBench_DEV_EN.tsv", "MMBench_DEV_EN_V11.tsv"),
    )
    origin: ClassVar[str] = "download.openmmlab.com (README of the MMBench repository)"

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        path = find(root, self.files, self.origin)
        rows = read_table(path, ("index", "question", "A", "B", "image"))
        cells = {row["index"]: row["image"] or "" for row in rows}
        samples: list[Sample] = []
        problems: list[str] = []
        for number, row in enumerate(rows, start=2):
            index, cell = row["index"] or "", row["image"] or ""
            if len(cell) < _SHORTEST_IMAGE:
                cell = cells.get(cell, cell)
            try:
                image = base64.b64decode(cell, validate=True)
            except (binascii.Error, ValueError):
                image = b""
            if not index.isdigit() or not row["question"] or not image:
                what = "index" if not index.isdigit() else "question" if not row["question"] else "image"
                problems.append(f"{path.name}:{number}: row {index or '?'} has no {what} that can be read")
            else:
                samples.append(self.sample(row, image))
        return samples, problems

    def sample(self, row: Mapping[str, str | None], image: bytes) -> Sample:
        """A row as a question."""
        choices = options(row)
        stem = "\n".join(part for part in (row.get("hint"), row["question"]) if part and not _is_none(part))
        index = row["index"] or ""
        return Sample(
            id=index,
            question=stem + lettered(choices) + self.suffix,
            image=image,
            truth=row.get("answer"),
            fields={
                "group": str(int(index) % _ROTATION),
                "question": row["question"],
                "category": row.get("category"),
                "l2-category": row.get("l2-category"),
            },
            choices=choices,
            stem=stem,
        )

    def mark(self, sample: Sample, answer: str) -> Mark:
        parsed = infer_option(answer, dict(zip(_LETTERS, sample.choices, strict=False)))
        return Mark(parsed, None if sample.truth is None else float(parsed == sample.truth))

    def question(self, sample: Sample, answer: str, attempt: int) -> Question:
        """To match an answer with the options, as VLMEvalKit asks; the same words each time."""
        text = matching_prompt(sample.fields["question"], sample.choices, answer)
        return Question(({"role": "user", "content": text},), 2048, 0.0, repeat=attempt)

    def read_verdict(self, sample: Sample, text: str) -> Mark | None:
        """By the rules that answers are read by."""
        mark = self.mark(sample, text)
        return mark if mark.parsed else None

    def metrics(self, marked: Sequence[Marked]) -> tuple[Metric, ...]:
        groups: dict[str, list[Marked]] = {}
        for line in marked:
            if line.score is not None:
                groups.setdefault(line.fields["group"], []).append(line)
        hits = {group: float(all(line.score for line in lines)) for group, lines in groups.items()}
        if not hits:
            return ()
        metrics = [_accuracy("accuracy", hits)]
        for field in ("l2-category", "category"):
            of = {group: lines[0].fields.get(field) for group, lines in groups.items()}
            for category in sorted({name for name in of.values() if name}):
                part = {group: hit for group, hit in hits.items() if of[group] == category}
                metrics.append(_accuracy(f"{field}: {category}", part))
        single = {line.id: line.score or 0.0 for lines in groups.values() for line in lines}
        return (*metrics, _accuracy("accuracy without rotations", single))

    def submit(
        self, marked: Sequence[Marked], folder: pathlib.Path, root: pathlib.Path
    ) -> list[pathlib.Path]:
        """The table with a column of predictions, as the OpenCompass server takes it."""
        source = find(root, self.files, self.origin)
        path = folder / f"{source.stem}.xlsx"
        predictions = {line.id: line.answer for line in marked}
        rows = read_table(source, ("index",))
        columns: list[str] = [name for name in rows[0] if name not in _NOT_SUBMITTED]
        columns.insert(_PREDICTION_COLUMN, "prediction")
        write_xlsx(
            path, columns, [{**row, "prediction": predictions.get(row["index"] or "")} for row in rows]
        )
        return [path]


class MMBenchCN(MMBench):
    """The same questions in Chinese."""

    name, title = "mmbench-cn", "MMBench-CN"
    suffix = "\n请直接回答选项字母。"
    files = (
        *("mmbench_dev_cn_20231003.tsv", "mmbench_dev_cn_20230712.tsv"),
        *("MMBench_DEV_CN.tsv", "MMBench_DEV_CN_V11.tsv"),
    )


class MMBenchTest(MMBench):
    """The test split, which a server scores."""

    name, title = "mmbench-test", "MMBench test"
    server = "OpenCompass (mmbench.opencompass.org.cn)"
    files = (
        *("mmbench_test_20230712.tsv", "mmbench_test_en_20231003.tsv"),
        *("MMBench_TEST_EN.tsv", "MMBench_TEST_EN_V11.tsv"),
    )


class MMBenchCNTest(MMBenchCN):
    """The test split in Chinese."""

    name, title = "mmbench-cn-test", "MMBench-CN test"
    server = MMBenchTest.server
    files = (
        *("mmbench_test_cn_20231003.tsv", "mmbench_test_cn_20230712.tsv"),
        *("MMBench_TEST_CN.tsv", "MMBench_TEST_CN_V11.tsv"),
    )


def options(row: Mapping[str, str | None]) -> tuple[str, ...]:
    """The options up to the first that is missing; "None" and "nan" count as missing."""
    found: list[str] = []
    for letter in _LETTERS:
        cell = row.get(letter)
        if cell is None or _is_none(cell):
            break
        found.append(cell)
    return tuple(found)


def write_xlsx(path: pathlib.Path, columns: Sequence[str], rows: Sequence[Mapping[str, str | None]]) -> None:
    """Writes a sheet: `index` as numbers, everything else as text.

    Raises:
      ValueError: openpyxl is not installed.
    """
    try:
        import openpyxl
        from openpyxl.cell import WriteOnlyCell
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError as error:
        raise ValueError(f"{path}: writing .xlsx needs openpyxl; pip install 'sg4v_jax[eval]'") from error
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    sheet.append(list(columns))
    for row in rows:
        cells = []
        for name in columns:
            value = row.get(name)
            cell = WriteOnlyCell(sheet, value=None)
            if name == "index" and value is not None:
                cell.value = int(value)
            elif value is not None:
                cell.value = ILLEGAL_CHARACTERS_RE.sub("", value)
                cell.data_type = "s"  # An answer that starts with "=" is no formula.
            cells.append(cell)
        sheet.append(cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)


def _is_none(cell: str | None) -> bool:
    return cell is None or cell.lower() in ("nan", "none")


def _accuracy(name: str, hits: Mapping[str, float]) -> Metric:
    return Metric(name, (Term(100.0, hits, dict.fromkeys(hits, 1.0)),))
