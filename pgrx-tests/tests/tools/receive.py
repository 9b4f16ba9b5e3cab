"""Receives WAL by psycopg2's physical replication connection, and reports what it has flushed.

receive.py CONNINFO START_LSN END_LSN SEGMENT_SIZE DIR: writes segments as pg_wal names them, on timeline 1.
"""
import os
import select
import sys

try:
    import psycopg2
    from psycopg2.extras import PhysicalReplicationConnection
except ImportError:
    sys.exit("psycopg2 is not installed; scripts/install-deps installs it")


def lsn(text):
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


conninfo, start, end, segment_size, directory = sys.argv[1:]
start, end, segment_size = lsn(start), lsn(end), int(segment_size)
connection = psycopg2.connect(conninfo, connection_factory=PhysicalReplicationConnection)
cursor = connection.cursor()
cursor.execute("IDENTIFY_SYSTEM")
print("identified:", *cursor.fetchone()[:2], flush=True)
cursor.start_replication(start_lsn=start)

position = start
while position < end:
    message = cursor.read_message()
    if message is None:
        if not select.select([connection], [], [], 60)[0]:
            sys.exit("nothing came for a minute")
        continue
    if message.data_start != position:
        sys.exit(f"WAL from {message.data_start:X} on, expected {position:X}")
    payload = message.payload
    while payload:
        number, offset = divmod(position, segment_size)
        part, payload = payload[: segment_size - offset], payload[segment_size - offset :]
        per_id = 0x1_0000_0000 // segment_size
        name = f"{1:08X}{number // per_id:08X}{number % per_id:08X}"
        mode = "r+b" if os.path.exists(f"{directory}/{name}") else "w+b"
        with open(f"{directory}/{name}", mode) as file:
            file.seek(offset)
            file.write(part)
            file.truncate(segment_size)
        position += len(part)
    cursor.send_feedback(write_lsn=position, flush_lsn=position, reply=True, force=True)

# Until it is ended from outside, so that the last report can be seen at the other side.
print("received", flush=True)
while True:
    select.select([connection], [], [])
    cursor.read_message()
