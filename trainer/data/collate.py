"""Examples -> one micro-batch: padded rows, or packed documents."""

from itertools import accumulate

import torch

from trainer.data.samples import IGNORE_INDEX, Batch, Example, Rejected


def collate(
    rows: list[list[Example]],
    pad_token_id: int,
    image_size: int,
    packed: bool,
    keys: list[str],
    rejected: list[Rejected],
    is_last: bool,
) -> Batch:
    """One micro-batch of rows, each a list of examples: one, several in a pack, or none (a filler).

    Unpacked rows are padded on the right to the longest; the padding's id has no effect: nothing attends to it. Packed,
    all documents follow one another without padding. A batch of fillers alone is one token that supervises nothing.
    """
    examples = [example for row in rows for example in row]
    document_ends = None
    if packed:
        documents = examples or [_filler(pad_token_id, image_size)]
        input_ids = torch.tensor([[i for document in documents for i in document.input_ids]])
        labels = torch.tensor([[i for document in documents for i in (IGNORE_INDEX, *document.labels[1:])]])
        document_ends = list(accumulate(len(document.input_ids) for document in documents))
    else:
        assert all(len(row) < 2 for row in rows)
        padded = [row[0] if row else _filler(pad_token_id, image_size) for row in rows or [[]]]
        input_ids = _pad([example.input_ids for example in padded], pad_token_id)
        labels = _pad([example.labels for example in padded], IGNORE_INDEX)
        labels[:, 0] = IGNORE_INDEX
    pictures = [example.pixel_values for example in examples if len(example.pixel_values)]
    return Batch(
        input_ids=input_ids,
        labels=labels,
        pixel_values=torch.cat(pictures) if pictures else _filler(pad_token_id, image_size).pixel_values,
        document_ends=document_ends,
        tokens=sum(len(example.input_ids) for example in examples),
        squares=sum(len(example.input_ids) ** 2 for example in examples),
        truncated_samples=sum(example.truncated_tokens > 0 for example in examples),
        truncated_tokens=sum(example.truncated_tokens for example in examples),
        keys=keys,
        rejected=rejected,
        is_last=is_last,
    )


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)


def _filler(pad_token_id: int, image_size: int) -> Example:
    return Example([pad_token_id], [IGNORE_INDEX], torch.empty(0, 3, image_size, image_size, dtype=torch.uint8))
