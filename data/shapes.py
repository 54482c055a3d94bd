# SPDX-License-Identifier: MIT
"""What the default run needs: rows of coloured objects with questions and reference paths, and a
model small enough to learn them on a laptop.

    python data/shapes.py                       # writes data/shapes/, the same files every time
    python data/shapes.py --out DIR --train 100 --test 50 --warmup 200 --seed 7

It writes the two formats that real data comes in, so nothing downstream knows that it is a toy:

    train.json    questions for StepGRPO (R1-VL-10K): problem, solution, image_path, key_steps
    test.json     held-out questions, in the same format
    warmup.json   demonstrations for the warm-up (Mulberry, ShareGPT): messages, images
    images/       a PNG per question; an object fills a cell of 28 pixels, one image token
    tiny/         a Qwen2-VL of 0.6 million random weights, as a checkpoint of transformers

Every image belongs to one of the three files, by a checksum, so none is seen in two of them. The
demonstrations are imperfect on purpose, as real ones are: each of SLIPS stands in a share of them.
So imitation has a ceiling. Answers and key steps of train.json and test.json are always right.
"""
import argparse
import json
import random
import shutil
import sys
import zlib
from pathlib import Path

import torch
import transformers
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import stepgrpo as sg

CELL = 28  # pixels: patches of 14, merged 2 × 2
# A description spends five tokens on each object ("red 1/2"), and objects stand five cells apart.
# So a small model reads along at a constant distance, and learns to see in two minutes.
PITCH = 5 * CELL
OBJECTS = 6  # at most
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 90, 220)}
SHAPES = ("round", "square")
BACKGROUND = (122, 116, 104)  # becomes 0 in the image processor: only objects give a signal
SLIPS = {"wrong total": 0.18, "wrong count": 0.18, "no rationale": 0.03}
FILES = {"test": "0", "train": "12", "warmup": "3456789"}  # last digit of an image's checksum

def draw_image(objects):
    """(colour, shape) of each object → RGB image, as wide as OBJECTS of them."""
    image = Image.new("RGB", ((OBJECTS - 1) * PITCH + CELL, CELL), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for i, (colour, shape) in enumerate(objects):
        draw = pen.ellipse if shape == "round" else pen.rectangle
        draw((i * PITCH + 2, 2, i * PITCH + CELL - 3, CELL - 3), fill=COLOURS[colour])
    return image

class Scene:
    """A row of objects. The question: how many are left without those of one colour or shape?"""

    def __init__(self, rng):
        number = rng.randint(3, OBJECTS)
        self.objects = [(rng.choice([*COLOURS]), rng.choice(SHAPES)) for _ in range(number)]
        self.words = list(rng.choice([*zip(*self.objects)]))  # their colours, or their shapes
        self.word = rng.choice(self.words)
        self.problem = f"Subtract all {self.word} objects. How many objects are left?"

    def path(self, slips=(), rng=None):
        """The reference path, with these slips in it."""
        total, removed = len(self.words), self.words.count(self.word)
        if slips:  # two slips never cancel: no answer is right by luck
            off = 1 if removed == 1 else rng.choice((-1, 1))
            total -= off * ("wrong total" in slips)
            removed += off * ("wrong count" in slips)
        seen = [f"{word} {self.words[:i].count(self.word)}/{i}"
                for i, word in enumerate(self.words, 1)]
        steps = [f"### Step 1:\nThere are {total} objects.",
                 f"### Step 2:\nOf them {removed} {self.word} object{'s' * (removed != 1)}.",
                 f"### Step 3:\n{total} - {removed} = {total - removed}"]
        rationale = ["### Rationales:",
                     f"Count all objects, count the {self.word} objects, then subtract."]
        return "\n".join([
            "### Image Description:",
            f"Counting {self.word} objects from the left: {' '.join(seen)}.",
            *(rationale if "no rationale" not in slips else []),
            "### Let's think step by step.", *steps,
            f"### The final answer is:\n{total - removed}"])

    def key_steps(self):
        n, m, word = len(self.words), self.words.count(self.word), self.word
        return [[f"{n} objects", f"total of {n}", f"total is {n}"],
                [f"{m} {word} object{'s' * (m != 1)}", f"{m} are {word}", f"{m} is {word}"],
                [f"{n} - {m} = {n - m}", f"{n} minus {m} is {n - m}"]]

def make_shapes(out, sizes, seed, slips=SLIPS):
    """Writes {file: number of rows} into the folder `out` → what a model may read of them."""
    rng, texts = random.Random(seed), []
    (out / "images").mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        rows = []
        while len(rows) < size:
            scene = Scene(rng)
            if str(zlib.crc32(str(scene.objects).encode()))[-1] not in FILES[name]:
                continue
            image = f"images/{name}_{len(rows):05d}.png"
            draw_image(scene.objects).save(out / image)
            path = scene.path()
            if name == "warmup":
                path = scene.path([s for s, share in slips.items() if rng.random() < share], rng)
                rows.append({"messages": [{"role": "user", "content": "<image>" + scene.problem},
                                          {"role": "assistant", "content": path}],
                             "images": image})
            else:
                rows.append({"problem": scene.problem, "solution": path, "image_path": image,
                             "key_steps": {"Steps": scene.key_steps()}})
            if name != "test":
                texts.append(scene.problem + "\n" + path)
        (out / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return texts

def build_tiny(texts, seed=0):
    """A Qwen2-VL of random weights, and a Processor with a tokenizer trained on `texts`."""
    tokenizer = transformers.Qwen2Tokenizer(
        eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=sg.SPECIAL_TOKENS)
    tokenizer = tokenizer.train_new_from_iterator(
        [*texts, sg.BEFORE + sg.AFTER], vocab_size=512, show_progress=False)
    ids = {token[2:-2]: tokenizer.convert_tokens_to_ids(token) for token in sg.SPECIAL_TOKENS}
    # With the usual 0.02 a model this small does not learn to see in minutes. A small theta lets it
    # tell neighbouring cells apart.
    wide = {"initializer_range": 0.1}
    rope = {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [1, 2, 13]}
    text = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=len(tokenizer), tie_word_embeddings=True,
                rope_parameters=rope, bos_token_id=None, eos_token_id=ids["im_end"],
                pad_token_id=ids["endoftext"], **wide)
    vision = dict(depth=1, embed_dim=64, num_heads=4, hidden_size=128, mlp_ratio=2, **wide)
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **wide,
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"])
    torch.manual_seed(seed)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    return model, sg.Processor(tokenizer, transformers.Qwen2VLImageProcessorPil(), model)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "shapes")
    parser.add_argument("--train", type=int, default=2000, help="training questions (2000)")
    parser.add_argument("--test", type=int, default=500, help="held-out questions (500)")
    parser.add_argument("--warmup", type=int, default=12000, help="demonstrations (12000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--miscounts", type=float, default=SLIPS["wrong total"],
                        help="share of demonstrations with a wrong total, and with a wrong count")
    args = parser.parse_args()
    slips = SLIPS | dict.fromkeys(("wrong total", "wrong count"), args.miscounts)
    transformers.utils.logging.disable_progress_bar()
    texts = make_shapes(args.out, {name: getattr(args, name) for name in FILES}, args.seed, slips)
    new = args.out / "tiny.new"  # a folder half written is never taken for a model
    sg.save_model(*build_tiny(texts, args.seed), new)
    shutil.rmtree(args.out / "tiny", ignore_errors=True)
    new.rename(args.out / "tiny")
    print(f"{args.train} training questions, {args.warmup} demonstrations, "
          f"{args.test} held-out questions → {args.out}")
