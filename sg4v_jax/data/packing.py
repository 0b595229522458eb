"""Packs samples of uneven length into rows of one shape: a token budget and an image budget."""

import grain

# Features that share the token budget of a row.
TOKEN_FEATURES = ("tokens", "targets", "loss_weights", "is_image")


def pack(
    samples: grain.IterDataset, *, length: int, image_slots: int, bins: int, max_samples: int | None = None
) -> grain.IterDataset:
    """Best-fit packing over `bins` open rows.

    Args:
      samples: what `data.sample.make_sample` returns.
      length: tokens per row.
      image_slots: images per row.
      bins: rows filled at a time; more waste less and hold more images in host memory.
      max_samples: most samples per row; 1 turns packing off.

    Returns:
      Rows with every feature plus `<feature>_segment_ids` (from 1; 0 is padding) and
      `<feature>_positions`.
    """
    budget = dict.fromkeys(TOKEN_FEATURES, length) | {"images": image_slots}
    return grain.experimental.BestFitPackIterDataset(
        samples,
        length_struct=budget,
        num_packing_bins=bins,
        # Rows come out in the order they were filled: the global order stays reproducible.
        shuffle_bins=False,
        max_sequences_per_bin=max_samples,
    )
