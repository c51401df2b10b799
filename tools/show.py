"""Asks the endpoint about pictures, and draws each with its label and confidences.

    python tools/show.py dog.jpg
    python tools/show.py my-dogs/*.jpg --output labelled

Prints a line and writes an annotated PNG for each picture (dog-labelled.png). Works on whatever account or emulator
boto3 is pointed at; what the endpoint says is in docs/serving.md.
"""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import pi_heif
from botocore.exceptions import ClientError
from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, it finds its siblings so

from tools import stack

pi_heif.register_heif_opener()
WIDTH, LINE, MARGIN = 640, 34, 10  # pixels: of the drawing, of a class's bar, around things
PAPER, INK, PALE, BAR, FIRST = "#ffffff", "#1f2328", "#eaeef2", "#8c959f", "#1a7f37"
FONTS = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf", "Arial.ttf")  # Linux, macOS, Windows

Answer = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", type=Path, metavar="picture")
    parser.add_argument("--output", type=Path, default=Path(), metavar="FOLDER", help="where drawings go (here)")
    parser.add_argument("--classes", type=int, default=5, metavar="N", help="likeliest classes to show, at most 5 (5)")
    parser.add_argument("--stack", default="houndloop", help="name of the CloudFormation stack (houndloop)")
    parser.add_argument("--endpoint", help="name of the endpoint (the stack's)")
    arguments = parser.parse_args()
    return stack.run(lambda: show(arguments))


def show(arguments: argparse.Namespace) -> int:
    """Exit status 0 if all pictures were answered; trouble with one is told, and the others go on."""
    endpoint = arguments.endpoint or stack.outputs(arguments.stack)["EndpointName"]
    runtime = stack.client("sagemaker-runtime")
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for path in arguments.pictures:
        try:
            data = path.read_bytes()
            answer = ask(runtime, endpoint, data)
            classes = answer["predictions"][0]["classes"][: arguments.classes]
            drawing = arguments.output / f"{path.stem}-labelled.png"
            draw(data, classes).save(drawing)
        except (stack.ToolError, OSError) as error:
            failed += 1
            print(f"{path}: {error}", file=sys.stderr)
            continue
        said = ", ".join(f"{each['class']} {each['probability']:.1%}" for each in classes)
        print(f"{path}: {said} (model {answer['model_version']}), drawn in {drawing}")
    return 1 if failed else 0


def ask(runtime: Any, endpoint: str, picture: bytes) -> Answer:
    """The endpoint's answer about one picture; raises ToolError in the container's words where it refuses."""
    try:
        # Any image/… will do: what kind of picture it is, the server sees for itself.
        answer = runtime.invoke_endpoint(EndpointName=endpoint, ContentType="image/jpeg", Body=picture)
    except ClientError as error:
        code, said = error.response["Error"]["Code"], error.response["Error"]["Message"]
        if code == "ValidationError" and "not found" in said:
            raise stack.ToolError("there is no endpoint yet: no model is live (make runs says why)") from None
        if code != "ModelError":
            raise
        raise stack.ToolError(reason(error.response)) from None
    return json.loads(answer["Body"].read())


def reason(response: Any) -> str:
    """Why the container refused, from a ModelError: status, code and message."""
    status, text = response.get("OriginalStatusCode"), response.get("OriginalMessage", "")
    try:
        error = json.loads(text)["error"]
        return f"{error['message']} ({status} {error['code']})"
    except (ValueError, KeyError, TypeError):
        return f"the endpoint answered {status}: {text}"


def draw(picture: bytes, classes: list[Answer]) -> Image.Image:
    """The picture as a person sees it, and below it a bar for each class, the likeliest first."""
    with Image.open(io.BytesIO(picture)) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    image = ImageOps.contain(image, (WIDTH, WIDTH))
    top = image.height + MARGIN
    sheet = Image.new("RGB", (WIDTH, top + LINE * len(classes) + MARGIN), PAPER)
    sheet.paste(image, ((WIDTH - image.width) // 2, 0))
    pen, font = ImageDraw.Draw(sheet), typeface(18)
    for number, each in enumerate(classes):
        left, right, middle = MARGIN, WIDTH - MARGIN, top + LINE * number + LINE // 2
        row = (left, middle - LINE // 2 + 3, right, middle + LINE // 2 - 3)
        pen.rectangle(row, fill=PALE)
        length = round((right - left) * each["probability"])
        if length:
            pen.rectangle((row[0], row[1], left + length, row[3]), fill=BAR if number else FIRST)
        for anchor, x, text in (("lm", left + 8, each["class"]), ("rm", right - 8, f"{each['probability']:.1%}")):
            pen.text((x, middle), text, fill=INK, font=font, anchor=anchor, stroke_width=3, stroke_fill=PAPER)
    return sheet


def typeface(size: int) -> Any:
    """One that has more than English letters, where the machine has one; Pillow's own has no others."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


if __name__ == "__main__":
    sys.exit(main())
