"""Asks an exported model about a picture.

python launch/generate.py --model runs/stage2 --image cat.jpg --prompt "What is this?"
"""

import argparse
from pathlib import Path

from trainer.errors import ConfigError, DataError, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an exported folder, a checkpoint, or a run folder")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--system-prompt", default="You are a helpful assistant.", help="as in training; '' for none")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args()

    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")

    from trainer.data.transform import decode
    from trainer.folders import find_export
    from trainer.generate import Generator  # slow to import, so after the arguments are known to be good

    try:
        image = args.image.read_bytes()
        decode(image)
    except OSError as error:
        raise DataError(f"--image {args.image}: cannot be read ({error.strerror})") from error
    except DataError as error:
        raise DataError(f"--image {args.image}: {error}") from error
    generator = Generator(find_export(args.model))
    print(generator.answer([image], [args.prompt], args.system_prompt, args.max_new_tokens)[0])


if __name__ == "__main__":
    run_main(main)
