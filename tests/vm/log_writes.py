"""log_writes - read what dm-log-writes recorded.

    log_writes.py points LOG                  every flush and FUA write after the mark "begin"
    log_writes.py apply LOG DEVICE FROM TO    write to DEVICE what lies between two places in the log

A point is a line "PLACE MARK": everything before PLACE has reached the medium, and MARK is the last mark
before it. The log (Documentation/admin-guide/device-mapper/log-writes.rst): a super sector {magic, version,
entries, sector size}, then for each entry a sector {first sector, sectors, flags, bytes of text} with a
mark's text behind it in the same sector, and the data; a discard has none.
"""
import os, struct, sys

FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8


class Log:
    def __init__(self, name):
        self.file = open(name, "rb")
        magic, version, self.entries, self.sector = struct.unpack("<QQQI", self.file.read(28))
        if (magic, version) != (0x6A736677736872, 1):
            sys.exit(f"{name} is no log of dm-log-writes")

    def entry(self, place):
        """(first byte, bytes, flags, a mark's text, place of the data, place of the next entry)"""
        self.file.seek(place)
        head = self.file.read(self.sector)
        first, count, flags, text = struct.unpack_from("<QQQQ", head)
        data = place + self.sector
        follows = 0 if flags & DISCARD else count * self.sector
        return first * self.sector, count * self.sector, flags, head[32:32 + text].rstrip(b"\0").decode(), data, data + follows


def points(name):
    log = Log(name)
    place, mark = log.sector, None
    for _ in range(log.entries):
        _, _, flags, text, _, place = log.entry(place)
        if flags & MARK:
            mark = text
        elif flags & (FLUSH | FUA) and mark:
            print(place, mark)


def apply(name, device, start, end):
    log, place, end = Log(name), int(start), int(end)
    place = place or log.sector
    with open(device, "r+b", buffering=0) as disk:
        while place < end:
            first, length, flags, _, data, place = log.entry(place)
            if flags & MARK:
                continue
            log.file.seek(data)
            disk.seek(first)
            disk.write(bytes(length) if flags & DISCARD else log.file.read(length))
        os.fsync(disk.fileno())


{"points": points, "apply": apply}[sys.argv[1]](*sys.argv[2:])
