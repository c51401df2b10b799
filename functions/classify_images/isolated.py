"""Decodes one picture in a process of its own: `python -m classify_images.isolated <preprocess.json> <limits> <bytes>`.

The file comes on standard input. The answer on standard output is a line of JSON, either {"broken": reason} or what the
Crop holds beside its pixels, and then those. Memory is limited to what the interpreter has, and `bytes` more.
"""

import json
import resource
import sys

OUT_OF_MEMORY = 3  # exit code
CPU_SECONDS = 60  # should the function die meanwhile, this process does not live on


def main() -> None:
    from preprocessing import BrokenImage, Preprocess, inspect, prepare

    spec, limits, most = Preprocess.from_json(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + most, used + most))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    needed, answer = 0, dict[str, object]()
    try:
        data = sys.stdin.buffer.read()
        needed = inspect(data, spec, **limits).bytes_needed
        crop = prepare(data, spec, **limits)
    except MemoryError:
        sys.exit(OUT_OF_MEMORY)
    except BrokenImage as broken:
        if needed > most // 2:  # a decoder that gets no memory often calls the file damaged
            sys.exit(OUT_OF_MEMORY)
        answer, pixels = {"broken": str(broken)}, b""
    else:
        answer = {"width": crop.width, "height": crop.height, "format": crop.format}
        pixels = crop.pixels
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + pixels)


if __name__ == "__main__":
    main()
