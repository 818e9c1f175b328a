"""Which rows a step trains: those that seed, epoch and step say, whatever ran before, on any number of processes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any


def seeded_sampler(make: Callable, rows: Any, count: int, args: Any) -> Any:
    """The sampler that `make` gives, with an order that seed and epoch alone decide, for any number of processes.

    Transformers shuffles by a generator that it seeds with the state of the global one, which depends on all that ran
    before, and which a resumed run would begin at its first epoch again. It groups by length within fifty steps of one
    process; here they are fifty steps of all. Where nothing is padded, several processes get equally many tokens.

    Args:
        rows: those to train on, `count` of them, and behind them what `whole_rounds` added, which comes last.
    """
    import torch

    sampler = make(rows if len(rows) == count else rows.select(range(count)))
    if sampler is None:
        return None
    if hasattr(sampler, "lengths"):
        sampler.batch_size *= args.world_size
    lengths = [len(ids) for ids in rows["input_ids"]] if args.world_size > 1 else []

    class Ordered(torch.utils.data.Sampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return len(rows)

        def __iter__(self) -> Iterator[int]:
            if hasattr(sampler, "generator"):  # else a sequential one
                sampler.generator = torch.Generator().manual_seed(args.seed + self.epoch)
            order = [*sampler, *range(count, len(rows))]
            if args.world_size > 1 and getattr(args, "padding_free", False):
                order = even_shares(order, lengths, batch=args.train_batch_size, processes=args.world_size)
            yield from order

    return Ordered()


def even_shares(order: Sequence[int], lengths: Sequence[int], *, batch: int, processes: int) -> list[int]:
    """The same rows in each round, dealt out so that the processes get nearly as many tokens as each other.

    All wait for the one that has the most. With eight conversations each, in the order in which they are drawn, that
    takes a tenth of the time of two processes, and a fifth of four's. The longest row goes first, always to the process
    with the fewest tokens that has room (Graham 1969, Bounds on multiprocessing timing anomalies).

    Args:
        order: numbers of rows; Accelerate gives the first `batch` to rank 0, the next to rank 1, and so on.
        lengths: tokens of each row.

    Example: `even_shares([0, 1, 2, 3], [9, 8, 2, 1], batch=2, processes=2)` -> `[0, 3, 1, 2]`
    """
    dealt: list[int] = []
    whole = len(order) - len(order) % (batch * processes)
    for begin in range(0, whole, batch * processes):
        shares: list[list[int]] = [[] for _ in range(processes)]
        tokens = [0] * processes
        for row in sorted(order[begin : begin + batch * processes], key=lambda row: -lengths[row]):
            rank = min((rank for rank in range(processes) if len(shares[rank]) < batch), key=tokens.__getitem__)
            shares[rank].append(row)
            tokens[rank] += lengths[row]
        dealt += [row for share in shares for row in share]
    return [*dealt, *order[whole:]]


def whole_rounds(make: Callable, trainer: Any) -> Any:
    """The loader that `make` gives. With several processes each gets a batch in the last round of a pass as well.

    Accelerate would fill that round up with rows of the first one, which would then be trained twice. Here it is
    filled with copies of the shortest row in which no token is trained: the step's loss and gradients are as of one
    process. (The trainer counts their tokens as read.)
    """
    rows, args = trainer.train_dataset, trainer.args
    if args.world_size == 1:
        return make()
    missing = 0 if args.dataloader_drop_last else -len(rows) % (args.train_batch_size * args.world_size)
    if missing:
        trainer.train_dataset = with_empty(rows, missing)
    try:
        loader = make()
    finally:
        trainer.train_dataset = rows
    # Accelerate tells the epoch to a sampler that lies two levels deep. In a pass that is resumed, which skips batches,
    # the one of several processes lies three levels deep, and would begin with the first epoch's order again.
    shard = loader.batch_sampler
    shard.sampler = shard.batch_sampler.sampler
    return loader


def with_empty(rows: Any, count: int) -> Any:
    """The rows, and behind them so many in which no token is trained."""
    from datasets import concatenate_datasets

    lengths = [len(ids) for ids in rows["input_ids"]]
    shortest = rows.select([lengths.index(min(lengths))] * count)
    without = {"features": rows.features, "keep_in_memory": True}
    empty = shortest.map(lambda row: {"labels": [-100] * len(row["labels"])}, **without)
    return concatenate_datasets([rows, empty])
