"""ConversionDisplay: what `diffpo convert` says it recognised."""

from collections.abc import Iterator

from common.conversion import Converted


def lines(found: Converted) -> Iterator[str]:
    """A few lines for a person."""
    ids = found.vocabulary
    where = "at the column before it" if found.shift else "at its own column"
    stops = ", ".join(_named(found, token) for token in ids.stop_ids)
    yield f"recognised: {found.family}, {_count(found.parameters)} parameters, {' and '.join(found.dtypes)}"
    yield f"written as: {found.architecture}, bidirectional, {found.shards} file{'s' * (found.shards != 1)}"
    yield f"prediction: a position is predicted {where} (prediction_shift {found.shift})"
    yield f"tokens: MASK {_named(found, ids.mask_id)}, stop {stops}, PAD {_named(found, ids.pad_id)}"
    yield f"vocabulary: {found.vocabulary_size}; chat template: {'yes' if found.chat_template else 'no'}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M" if parameters >= 100_000 else f"{parameters:,}"


def _named(found: Converted, token: int) -> str:
    return f"{token} {found.tokens[token]}"
