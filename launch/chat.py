"""A chat page in the browser for an exported model: pictures, several turns, answers as they grow.

    pip install -r requirements-chat.txt
    python launch/chat.py --model runs/stage2              then open http://127.0.0.1:7860

The page is served to this machine alone. --host 0.0.0.0 serves it to whoever can reach it, without a password.
"""

import argparse
import os
import socket

from answer_options import add_answer_options

from trainer.errors import ConfigError, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_answer_options(parser)
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default 7860")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default 127.0.0.1: this machine alone")
    args = parser.parse_args()

    try:
        socket.create_server((args.host, args.port)).close()  # before the model is read, which may take a minute
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {args.host} --port {args.port}: cannot be listened on ({error})") from error
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read as Gradio is imported
    # Gradio asks its own page whether it is there: not by way of a proxy.
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = ",".join(filter(None, [direct, args.host]))
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError("the chat page needs Gradio: pip install -r requirements-chat.txt") from error

    from trainer.chat import chat_page, name_and_step, serve
    from trainer.folders import find_export
    from trainer.generate import Decoding, Generator

    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p, seed=args.seed)
    export = find_export(args.model)
    page = chat_page(Generator(export), name_and_step(export), decoding, args.system_prompt)
    print(f"http://{args.host}:{args.port}    (Ctrl-C ends it)", flush=True)
    serve(page, args.host, args.port)


if __name__ == "__main__":
    run_main(main)
