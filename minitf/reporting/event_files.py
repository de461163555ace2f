"""TensorBoard's files of a run, cut where it resumes: what is beyond will be written again."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

PATTERN = "events.out.tfevents.*"


def cut_events(run_dir: Path, last_step: int) -> None:
    """Drop what a run's event files say of steps after `last_step`, and what is cut short; raises OSError.

    A record is its length (8 bytes), a checksum of that (4), the event, and a checksum of the event (4).
    """
    from tensorboard.compat.proto.event_pb2 import Event

    for path in sorted(run_dir.glob(PATTERN)):
        content = path.read_bytes()
        kept, num_rows = bytearray(), 0
        for record in records(content):
            try:
                event = Event.FromString(record[12:-4])
            except Exception:  # the parser's own class: from here on the file says nothing
                break
            if event.step <= last_step:
                kept += record
                num_rows += not event.file_version
        if not num_rows:
            path.unlink()
        elif len(kept) < len(content):
            partial = path.with_name(f".{path.name}.partial")
            partial.unlink(missing_ok=True)
            with partial.open("xb") as file:
                file.write(kept)
            os.replace(partial, path)


def records(content: bytes) -> Iterator[bytes]:
    start = 0
    while start + 16 <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        end = start + 16 + length
        if end > len(content):
            return
        yield content[start:end]
        start = end
