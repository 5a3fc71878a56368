"""Examples -> one padded micro-batch."""

import torch

from trainer.data.samples import IGNORE_INDEX, Batch, Example


def collate(examples: list[Example], pad_token_id: int) -> Batch:
    """Pads on the right to the longest row. The padding's id has no effect: nothing attends to it."""

    def pad(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)

    return Batch(
        input_ids=pad([e.input_ids for e in examples], pad_token_id),
        labels=pad([e.labels for e in examples], IGNORE_INDEX),
        pixel_values=torch.cat([e.pixel_values for e in examples]),
        keys=[e.key for e in examples if e.key is not None],
        tokens=sum(len(e.input_ids) for e in examples if e.key is not None),
        truncated_tokens=sum(e.truncated_tokens for e in examples),
    )
