"""Prints the samples of one step: what did the model see when the loss jumped?

    python launch/inspect_step.py --config X --step N [--set section.key=value ...]

Needs neither a GPU nor a running job; --config takes a run's folder too. Steps count from 1, as in the logs.
"""

import argparse
import signal
from pathlib import Path

from trainer.config import Config
from trainer.errors import BadSample, ConfigError, printable, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one in launch/configs/")
    parser.add_argument("--step", type=int, required=True, help="optimizer step, counted from 1 as in metrics.jsonl")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides of the YAML"
    )
    args = parser.parse_args()
    config = Config.load(args.config, args.set)
    if args.step < 1:
        raise ConfigError(f"--step {args.step}: steps count from 1")

    from trainer.data.order import global_batch
    from trainer.data.picture import decode
    from trainer.data.template import ChatTemplate
    from trainer.load import model_config
    from trainer.open_data import last_step, open_cache, open_lengths, open_reader, open_sources, open_stream
    from trainer.tokenizer import image_token_id, load_tokenizer

    tokenizer = load_tokenizer(config.model)
    placeholder = image_token_id(tokenizer)
    template = ChatTemplate(tokenizer, placeholder, model_config(config.model).image_context_length)
    cache = open_cache(config.data)
    sources = open_sources(config.data.train, cache)
    reader = open_reader(sources, config.data, cache)
    lengths = open_lengths(config, reader, template)
    if lengths is not None:
        lengths.build()
    stream = open_stream(config, sources, lengths)
    if args.step > (last := last_step(config, stream)):
        raise ConfigError(f"--step {args.step}: the run ends with step {last}; give it that or less")
    names = [source.name for source in sources for _ in source.shards]

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, and is no error
    print(f"{'row':>4}  {'source':12}  {'tokens':>6}  {'cut':>5}  {'learnt':>6}  {'images':>6}  shard/key: last answer")
    rows = global_batch(stream, args.step - 1, config.train.global_batch_size)
    for number, row in enumerate(rows):
        for slot in row:
            where = printable(f"{Path(reader.shards[slot.shard].name).name}/{reader.key(slot)}")
            head = f"{number:4}  {printable(names[slot.shard]):12.12}  "
            try:
                turns = reader.conversation(slot)
                whole, labels = template.encode(turns)
                input_ids, labels = template.truncate(whole, labels, config.data.max_length)
                for picture in reader.images(slot):
                    decode(picture)
            except BadSample as error:
                print(f"{head}left out: {where}: {printable(str(error))}")
                continue
            cut, learnt = len(whole) - len(input_ids), sum(label >= 0 for label in labels[1:])
            images = input_ids.count(placeholder) // len(template.image_run)
            answer = " ".join([turn.text for turn in turns if turn.role == "assistant"][-1].split())
            print(f"{head}{len(input_ids):6}  {cut:5}  {learnt:6}  {images:6}  {where}: {printable(answer[:60])}")


if __name__ == "__main__":
    run_main(main)
