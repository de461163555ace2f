"""From text and pairs to batches of ids: read (sources/), tokenized once and cached, packed, shuffled."""
