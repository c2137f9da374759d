"""TextVQA: 5,000 questions whose answers can be read in the image (val, v0.5.1)."""

from pathlib import Path

from evals.benchmark import SHORT, Benchmark, Grade, Judge, Profile, Question
from evals.benchmarks.vqav2 import grade_by_humans, humans_question
from evals.files import find, need, read_json_value, read_lines

_OCR = "\nReference OCR token: "


class TextVQA(Benchmark):
    """VQAv2's rule on ten answers.

    Obtain: https://textvqa.org/dataset/ (``TextVQA_0.5.1_val.json``, train_val_images.zip). The folder holds that file
    and ``train_images/``. With ``TextVQA_Rosetta_OCR_v0.2_val.json`` or LLaVA's ``llava_textvqa_val_v051_ocr.jsonl``
    in the folder, the prompt has the reference OCR tokens, as for LLaVA-1.5's published 58.2 (45 to 46 without);
    LLaVA-1.6's 64.9 was measured without. The category says which.

    llava and official: EvalAI's normaliser on all texts. robust: the VQA script's normaliser, as in VQAv2.

    Robust, answer | humans | score::

        'nokia' | nokia*10 | 1
        'Nokia.' | nokia*10 | 1
        'dakota digital' | dakota*5, dakota digital*5 | 1
        'STOP' | stop*4, halt*6 | 1
        '12:30' | 12:30*10 | 1
        '3.5' | 3.5*10 | 1
        '$5.00' | $5.00*10 | 1
        'half off' | half-off*10 | 1
        'intel' | amd*10 | 0
        'one' | 1*10 | 1
        '' | nokia*10 | unparsed
    """

    name = "textvqa"
    title = "TextVQA"
    metric = "VQA accuracy"

    def read(self, folder: Path) -> list[Question]:
        """Read the validation file, and OCR tokens if available."""
        path = find(folder, "TextVQA_0.5.1_val.json", "TextVQA_*val.json")
        tokens = _ocr_tokens(folder)
        questions = []
        for row in need(read_json_value(path), "data", path):
            image_id, text = need(row, "image_id", path), need(row, "question", path)
            ocr = f"{_OCR}{tokens[image_id]}" if image_id in tokens else ""
            image = folder / "train_images" / f"{image_id}.jpg"
            plain = humans_question(str(need(row, "question_id", path)), text + ocr + SHORT, image, row)
            category = "with OCR tokens" if ocr else "without OCR tokens"
            aliases = (f"{image_id}\n{text.lower()}",)
            questions.append(
                Question(plain.id, plain.prompt, (image,), plain.truths, (), (category,), image_id, "", aliases)
            )
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Score 0 to 1 by the number of matching human answers."""
        return grade_by_humans(question, answer, "llava" if profile == "official" else profile)


def _ocr_tokens(folder: Path) -> dict[str, str]:
    for file in sorted(folder.glob("TextVQA_Rosetta_OCR_*val.json")):
        return {
            need(row, "image_id", file): ", ".join(need(row, "ocr_tokens", file))
            for row in need(read_json_value(file), "data", file)
        }
    found: dict[str, str] = {}
    for file in sorted(folder.glob("llava_textvqa*ocr.jsonl")):
        for row in read_lines(file):
            lines = [line for line in need(row, "text", file).split("\n") if line.startswith(_OCR.strip())]
            found |= {need(row, "question_id", file): lines[0].removeprefix(_OCR.strip()).strip()} if lines else {}
    return found
