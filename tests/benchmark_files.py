"""Tiny folders in each benchmark's official format: a few questions, drawn images, nothing downloaded."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from drawn_files import COLOURS, encoded, lines, put
from hallucination_files import amber_discriminative, amber_generative, chair, mmhal_bench, object_halbench


def humans(answer: str) -> list[dict[str, Any]]:
    return [{"answer": answer, "answer_id": n, "answer_confidence": "yes"} for n in range(1, 11)]


def vqav2(folder: Path) -> None:
    asked = [{"image_id": 9 + i // 2, "question": f"What is {i}?", "question_id": 90 + i} for i in range(4)]
    put(folder, "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    notes = [
        {
            "question_id": 90 + i,
            "image_id": 9,
            "answer_type": "other",
            "question_type": "what",
            "answers": humans(COLOURS[i]),
        }
        for i in range(4)
    ]
    put(folder, "v2_mscoco_val2014_annotations.json", {"annotations": notes})
    for image in (9, 10):
        put(folder, f"val2014/COCO_val2014_{image:012d}.jpg", encoded(image, "JPEG"))


def gqa(folder: Path) -> None:
    rows = {
        f"2{i}": {
            "imageId": f"n{i // 2}",
            "question": "Is it red?",
            "answer": "yes" if i % 2 else "no",
            "types": {"structural": "verify"},
        }
        for i in range(4)
    }
    put(folder, "testdev_balanced_questions.json", rows)
    for image in (0, 1):
        put(folder, f"images/n{image}.jpg", encoded(image, "JPEG"))


def vizwiz(folder: Path) -> None:
    rows = [
        {
            "image": f"VizWiz_val_{i:08d}.jpg",
            "question": "What is it?",
            "answerable": 1,
            "answer_type": "other",
            "answers": [{"answer": COLOURS[i], "answer_confidence": "yes"}] * 10,
        }
        for i in range(3)
    ]
    put(folder, "val.json", rows)
    for i, row in enumerate(rows):
        put(folder, f"val/{row['image']}", encoded(i, "JPEG"))


def science_qa(folder: Path) -> None:
    problems = {
        str(i): {
            "question": "Which?",
            "choices": ["fish", "rabbit", "cat"],
            "answer": i % 3,
            "hint": "Look." * (i % 2),
            "image": "image.png" if i < 2 else None,
            "subject": "natural science",
            "split": "test",
        }
        for i in range(4)
    }
    put(folder, "problems.json", problems)
    put(folder, "pid_splits.json", {"test": list(problems), "train": []})
    for i in range(2):
        put(folder, f"images/test/{i}/image.png", encoded(i))


def textvqa(folder: Path) -> None:
    rows = [
        {
            "question_id": 34600 + i,
            "image_id": f"00{i // 2}ab",
            "question": f"What is word {i}?",
            "answers": [COLOURS[i]] * 10,
        }
        for i in range(4)
    ]
    put(folder, "TextVQA_0.5.1_val.json", {"data": rows})
    tokens = [{"image_id": f"00{i}ab", "ocr_tokens": ["RED", "BLUE"]} for i in range(2)]
    put(folder, "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})
    for i in range(2):
        put(folder, f"train_images/00{i}ab.jpg", encoded(i, "JPEG"))


def pope(folder: Path) -> None:
    for split in ("adversarial", "popular", "random"):
        rows = [
            {
                "question_id": i + 1,
                "image": f"COCO_val2014_{i // 2:012d}.jpg",
                "text": f"Is there a {split} thing {i} in the image?",
                "label": "no" if i % 2 else "yes",
            }
            for i in range(4)
        ]
        put(folder, f"coco_pope_{split}.json", lines(rows))
    for i in range(2):
        put(folder, f"val2014/COCO_val2014_{i:012d}.jpg", encoded(i, "JPEG"))


def mme(folder: Path) -> None:
    root = "MME_Benchmark_release_version"
    pair = "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
    for ability, deep in (("existence", False), ("count", False), ("artwork", True), ("code_reasoning", False)):
        for i in range(2):
            put(folder, f"{root}/{ability}/{'images/' if deep else ''}000{i}.jpg", encoded(i, "JPEG"))
            put(folder, f"{root}/{ability}/{'questions_answers_YN/' if deep else ''}000{i}.txt", pair)


def mmbench_table(extra: str = "") -> str:
    options = ["teddy bear", "rabbit", "cat", "dog"]
    rows = ["index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit"]
    for index in (1, 2):
        for k in range(4 if index == 1 else 3):
            shown = (options if index == 1 else options[:3])[k:] + (options if index == 1 else options[:3])[:k]
            answer = "ABCD"[shown.index("cat")]
            cells = [*shown, *[""] * (4 - len(shown))]
            picture = base64.b64encode(encoded(index)).decode()
            rows.append(
                "\t".join(
                    [
                        str(index + k * 10**6),
                        f'"Which ""animal""{extra}?"',
                        "nan" if index == 1 else "Look.",
                        *cells,
                        answer,
                        "object",
                        picture,
                        "web",
                        "perception",
                        "",
                        "dev",
                    ]
                )
            )
    return "\n".join(rows) + "\n"


def mmbench(folder: Path) -> None:
    put(folder, "mmbench_dev_20230712.tsv", mmbench_table())


def mmbench_cn(folder: Path) -> None:
    put(folder, "mmbench_dev_cn_20231003.tsv", mmbench_table("哪个"))


def seed_bench(folder: Path) -> None:
    rows = [
        {
            "question_id": str(100 + i) if i else "v1_0",
            "question": "What?",
            "choice_a": "apple",
            "choice_b": "pear",
            "choice_c": "plum",
            "choice_d": "fig",
            "answer": "ABCD"[i],
            "data_type": "video" if i == 3 else "image",
            "data_id": f"1_{i}.jpg",
            "question_type_id": 1 + i // 3,
        }
        for i in range(4)
    ]
    put(
        folder,
        "SEED-Bench.json",
        {"question_type": {"Scene Understanding": 1, "Action Recognition": 2}, "questions": rows},
    )
    for i in range(3):
        put(folder, f"SEED-Bench-image/1_{i}.jpg", encoded(i, "JPEG"))
    put(folder, "SEED-Bench-video-image/103.png", encoded(3))


def llava_bench(folder: Path) -> None:
    kinds = ("conv", "detail", "complex")
    put(
        folder,
        "questions.jsonl",
        lines([{"question_id": i, "image": f"00{i}.jpg", "category": kinds[i], "text": "What?"} for i in range(3)]),
    )
    put(
        folder,
        "context.jsonl",
        lines([{"id": f"00{i}", "image": f"00{i}.jpg", "caption": "A thing."} for i in range(3)]),
    )
    gold = [
        {"question_id": i, "text": f"It is {COLOURS[i]}.", "answer_id": f"a{i}", "model_id": "gpt-4"} for i in range(3)
    ]
    put(folder, "answers_gpt4.jsonl", lines(gold))
    for i in range(3):
        put(folder, f"images/00{i}.jpg", encoded(i, "JPEG"))


def mm_vet(folder: Path) -> None:
    rows = {
        f"v1_{i}": {
            "imagename": f"v1_{i}.png",
            "question": "What?",
            "answer": COLOURS[i],
            "capability": ["rec", "ocr"][: i + 1],
            "imagesource": "",
        }
        for i in range(2)
    }
    put(folder, "mm-vet.json", rows)
    for i in range(2):
        put(folder, f"images/v1_{i}.png", encoded(i))


def parquet(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)


def mmmu(folder: Path) -> None:
    cell = {"bytes": encoded(1), "path": "a.png"}
    shared = {f"image_{n}": None for n in range(3, 8)}
    art = [
        {
            "id": "validation_Art_1",
            "question": "Is <image 2> like <image 1>?",
            "options": "['yes', \"it isn't\"]",
            "answer": "B",
            "question_type": "multiple-choice",
            "image_1": cell,
            "image_2": {"bytes": encoded(2), "path": "b.png"},
            **shared,
        }
    ]
    maths = [
        {
            "id": "validation_Math_1",
            "question": "How many? <image 1>",
            "options": "[]",
            "answer": "24",
            "question_type": "open",
            "image_1": cell,
            "image_2": None,
            **shared,
        },
        {
            "id": "validation_Math_2",
            "question": "Which? <image 1>",
            "options": "[]",
            "answer": "['1024', '1k']",
            "question_type": "open",
            "image_1": cell,
            "image_2": None,
            **shared,
        },
    ]
    parquet(folder, "Art/validation-00000-of-00001.parquet", art)
    parquet(folder, "Math/validation-00000-of-00001.parquet", maths)


def chartqa(folder: Path) -> None:
    put(
        folder,
        "test/test_human.json",
        [
            {"imgname": "1.png", "query": "How much?", "label": "14%"},
            {"imgname": "1.png", "query": "Is it?", "label": "Yes"},
        ],
    )
    put(folder, "test/test_augmented.json", [{"imgname": "2.png", "query": "How many?", "label": "100"}])
    for i in (1, 2):
        put(folder, f"test/png/{i}.png", encoded(i))


def docvqa(folder: Path) -> None:
    rows = [
        {
            "questionId": 49 + i,
            "question": "What is it?",
            "image": f"documents/d{i}.png",
            "docId": i,
            "answers": [COLOURS[i], "x"],
            "question_types": ["form"],
        }
        for i in range(2)
    ]
    put(folder, "val_v1.0_withQT.json", {"dataset_split": "val", "data": rows})
    for i in range(2):
        put(folder, f"documents/d{i}.png", encoded(i))


def ai2d(folder: Path) -> None:
    asked = {
        f"Which part is {i}?": {
            "questionId": f"7.png-{i}",
            "answerTexts": ["leaf", "root", "stem", "flower"],
            "correctAnswer": i,
            "abcLabel": False,
        }
        for i in range(3)
    }
    put(folder, "questions/7.png.json", {"imageName": "7.png", "questions": asked})
    put(folder, "questions/8.png.json", {"imageName": "8.png", "questions": {}})
    put(folder, "images/7.png", encoded(1))
    put(folder, "ai2d_test_ids.csv", "7\n")


def realworldqa(folder: Path) -> None:
    cell = {"bytes": encoded(1), "path": None}
    rows = [
        {
            "question": "Which way?\n\nA. Left\nB. Right\nC. Straight\nPlease answer directly with only the letter.",
            "answer": "B",
            "image": cell,
        },
        {"question": "How many?\nPlease answer directly with a single word or number.", "answer": "2", "image": cell},
        {"question": "Is it?\nPlease answer directly with a single word or number.", "answer": "Yes", "image": cell},
    ]
    parquet(folder, "data/test-00000-of-00002.parquet", rows)


def hallusion_bench(folder: Path) -> None:
    rows = []
    for category, set_id, figure, question, gold in (
        ("VD", 0, 0, 0, 1),
        ("VD", 0, 1, 0, 0),
        ("VS", 1, 0, 0, 1),
        ("VS", 1, 1, 0, 0),
    ):
        shown = not (category == "VS" and figure == 0)
        file = f"./hallusion_bench/{category}/chart/{set_id}_{figure}.png" if shown else None
        rows.append(
            {
                "category": category,
                "subcategory": "chart",
                "visual_input": "1" if shown else "0",
                "set_id": str(set_id),
                "figure_id": str(figure),
                "sample_note": "x",
                "question_id": str(question),
                "question": "Is it so?",
                "gt_answer_details": "It is so.",
                "gt_answer": str(gold),
                "filename": file,
            }
        )
        if file:
            put(folder, file, encoded(figure))
    put(folder, "HallusionBench.json", rows)


def mmbench_v11_table(extra: str = "") -> str:
    """Version 1.1 as OpenCompass has it: a rotation's image is the index of the row that has it."""
    options = ["teddy bear", "rabbit", "cat", "dog"]
    columns = ["index", "question", "hint", *"ABCD", "answer", "category", "image", "source", "l2-category", "split"]
    rows = [columns]
    for index in (7, 8):
        own = options if index == 7 else options[:3]
        for k in range(len(own)):
            shown = own[k:] + own[:k]
            image = base64.b64encode(encoded(index)).decode() if k == 0 else str(index)
            asked = [str(index + k * 10**6), f"Which animal{extra}?", "", *shown, *[""] * (4 - len(shown))]
            told = ["ABCD"[shown.index("cat")], "object", image, "web", "perception", "dev"]
            rows.append(asked + told)
    return "".join("\t".join(row) + "\n" for row in rows)


def mmbench_v11(folder: Path) -> None:
    put(folder, "MMBench_DEV_EN_V11.tsv", mmbench_v11_table())


def mmbench_v11_cn(folder: Path) -> None:
    put(folder, "MMBench_DEV_CN_V11.tsv", mmbench_v11_table("哪个"))


def mmstar(folder: Path) -> None:
    rows = [
        {
            "index": i,
            "question": "Which fruit?\nOptions: A: apple, B: pear, C: plum, D: fig",
            "image": {"bytes": encoded(i), "path": None},
            "answer": "ABC"[i],
            "category": ("coarse perception", "math")[i // 2],
            "l2_category": ("image emotion", "image emotion", "geometry")[i],
            "meta_info": {"source": "MMBench", "split": "val", "image_path": f"images/{i}.jpg"},
        }
        for i in range(3)
    ]
    parquet(folder, "mmstar.parquet", rows)


METALS = ["gold", "tin", "iron", "lead", "zinc", "silver", "copper", "nickel", "cobalt", "radium"]


def mmmu_pro_rows(num_options: int) -> list[dict[str, Any]]:
    cell = {"bytes": encoded(1), "path": "a.png"}
    return [
        {
            "id": name,
            "question": "<image 1> Which metal is like <image 2>?",
            "options": str(METALS[:num_options]),
            "explanation": "?",
            "image_1": cell,
            "image_2": {"bytes": encoded(2), "path": "b.png"},
            **{f"image_{n}": None for n in range(3, 8)},
            "img_type": "['Diagrams']",
            "answer": answer,
            "topic_difficulty": "Easy",
            "subject": subject,
        }
        for name, answer, subject in (
            ("test_Art_113", "B", "Art"),
            ("validation_Energy_and_Power_2", "D", "Energy_and_Power"),
        )
    ]


def mmmu_pro(folder: Path) -> None:
    parquet(folder, "standard (10 options)/test-00000-of-00002.parquet", mmmu_pro_rows(10))


def mmmu_pro_4(folder: Path) -> None:
    parquet(folder, "standard (4 options)/test-00000-of-00002.parquet", mmmu_pro_rows(4))


def mmmu_pro_vision(folder: Path) -> None:
    rows = [
        {key: row[key] for key in ("id", "options", "answer", "subject")}
        | {"image": {"bytes": encoded(3), "path": None}}
        for row in mmmu_pro_rows(10)
    ]
    parquet(folder, "vision/test-00000-of-00002.parquet", rows)


def mathvista_row(pid: str, question: str, answer: str, kind: str, **more: Any) -> dict[str, Any]:
    row = {
        "question": question,
        "image": f"images/{pid}.jpg",
        "choices": None,
        "unit": None,
        "precision": None,
        "answer": answer,
        "question_type": "multi_choice" if kind == "text" else "free_form",
        "answer_type": kind,
        "pid": pid,
        "metadata": {
            "split": "testmini",
            "language": "english",
            "img_width": 32,
            "img_height": 24,
            "source": "Geometry3K",
            "category": "math-targeted-vqa",
            "task": "geometry problem solving",
            "context": "geometry diagram",
            "grade": "high school",
            "skills": ["geometry reasoning", "algebraic reasoning"],
        },
    }
    return row | more


def mathvista(folder: Path) -> None:
    rows = [
        mathvista_row("1", "How far?", "1.2", "float", precision=1, unit="cm"),
        mathvista_row("2", "How many?", "1000", "integer"),
        mathvista_row("3", "Which angle?", "145°", "text", choices=["135°", "140°", "145°", "150°"]),
        mathvista_row("4", "Which years?", "[2007, 2008]", "list"),
    ]
    put(folder, "testmini.json", {row["pid"]: row for row in rows})
    for row in rows:
        put(folder, row["image"], encoded(int(row["pid"]), "JPEG"))


def ocrbench(folder: Path) -> None:
    rows = [
        ("IIIT5K", 2843, "IIIT5K/test/918_1.png", "CENTRE", "Regular Text Recognition"),
        ("svt", 292, "svt/image/img_0293.jpg", "under", "Regular Text Recognition"),
        ("docVQA", 292, "docVQA/d.png", ["12.50", "$12.50"], "Doc-oriented VQA"),
        ("HME100k", 5, "HME100k/h.jpg", "\\frac { 1 } { x }", "Handwritten Mathematical Expression Recognition"),
    ]
    keys = ("dataset_name", "id", "image_path", "answers", "type")
    put(
        folder,
        "OCRBench.json",
        [dict(zip(keys, row, strict=True)) | {"question": "what is written in the image?"} for row in rows],
    )
    for number, row in enumerate(rows):
        put(folder, f"OCRBench_Images/{row[2]}", encoded(number))


def blink_row(name: str, answer: str, num_options: int, num_images: int) -> dict[str, Any]:
    choices = [f"point {word}" for word in ("one", "two", "three", "four")][:num_options]
    shown = "\n".join(f"({letter}) {text}" for letter, text in zip("ABCD", choices, strict=False))
    images = {f"image_{n}": {"bytes": encoded(n), "path": None} if n <= num_images else None for n in range(1, 5)}
    return {
        "idx": name,
        "sub_task": name.split("_", 1)[1].rsplit("_", 1)[0],
        "question": "Which point?",
        "choices": choices,
        "answer": answer,
        "prompt": f"Which point?\nSelect from the following choices.\n{shown}",
        **images,
    }


def blink(folder: Path) -> None:
    for split, right in (("val", ("(A)", "(B)", "(C)")), ("test", ("hidden",) * 3)):
        depth = [blink_row(f"{split}_Relative_Depth_{n}", right[n - 1], 2, 1) for n in (1, 2)]
        parquet(folder, f"Relative_Depth/{split}-00000-of-00001.parquet", depth)
        views = [blink_row(f"{split}_Multi-view_Reasoning_1", right[2], 4, 4)]
        parquet(folder, f"Multi-view_Reasoning/{split}-00000-of-00001.parquet", views)


def custom(folder: Path) -> None:
    rows = [
        {"id": "a", "image": "a.png", "question": "Which colour?", "answer": "red", "category": "colour"},
        {
            "id": "b",
            "images": ["a.png", "b.png"],
            "question": "Is <image> like <image>?",
            "answer": "no",
            "rule": "yes_no",
        },
        {"id": "c", "question": "Which?", "options": ["cat", "dog"], "answer": "dog"},
        {"id": "d", "question": "How many?", "answers": ["2", "two"], "rule": "number", "instruction": "short"},
    ]
    put(folder, "questions.jsonl", lines(rows))
    for i, name in enumerate("ab"):
        put(folder, f"{name}.png", encoded(i))


WRITERS: dict[str, Callable[[Path], None]] = {
    writer.__name__: writer
    for writer in (
        vqav2,
        gqa,
        vizwiz,
        science_qa,
        textvqa,
        pope,
        mme,
        mmbench,
        mmbench_cn,
        seed_bench,
        llava_bench,
        mm_vet,
        mmmu,
        chartqa,
        docvqa,
        ai2d,
        realworldqa,
        hallusion_bench,
        mmbench_v11,
        mmbench_v11_cn,
        mmstar,
        mmmu_pro,
        mmmu_pro_4,
        mmmu_pro_vision,
        mathvista,
        ocrbench,
        blink,
        chair,
        amber_generative,
        amber_discriminative,
        mmhal_bench,
        object_halbench,
        custom,
    )
}


def write_benchmark(name: str, folder: Path) -> Path:
    """Write a benchmark's tiny folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    WRITERS[name](folder)
    return folder
