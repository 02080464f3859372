"""Which indices of the stock package are those of a view of the whole tensor."""

import operator


def plain(index, shape):
    """The index of a view, one entry for each dimension from the first on; None if the stock package has to decide.

    It refuses some of what numpy and torch take, such as bounds behind the end and negative ones, and the other way round.
    Whatever is not plainly the same in both is left to it, and so are its errors.
    """
    entries = list(index) if isinstance(index, tuple) else [index]
    ellipses = [place for place, entry in enumerate(entries) if entry is Ellipsis]
    if len(ellipses) == 1:
        [place] = ellipses
        entries[place : place + 1] = [slice(None)] * (len(shape) - len(entries) + 1)
    if ellipses[1:] or len(entries) > len(shape):
        return None
    checked = []
    for entry, size in zip(entries, shape):
        entry = _part(entry, size) if isinstance(entry, slice) else _element(entry, size)
        if entry is None:
            return None
        checked.append(entry)
    return tuple(checked)


def _element(entry, size):
    if isinstance(entry, bool):
        return None  # A mask in torch.
    try:
        number = operator.index(entry)
    except TypeError:
        return None
    return number % size if -size <= number < size else None


def _part(entry, size):
    start = 0 if entry.start is None else entry.start
    stop = size if entry.stop is None else entry.stop
    step = 1 if entry.step is None else entry.step
    if not all(isinstance(bound, int) for bound in (start, stop, step)):
        return None
    return slice(start, stop, step) if 0 <= start < size and start <= stop <= size and step >= 1 else None
