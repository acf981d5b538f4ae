"""Looks at pages of more memory than there is, and changes them: thrash.py ROUNDS [FILE]

So many rounds of 64 pages at least, and then as long as there is that file. Each page says which it is and how often it was
changed; one that comes back otherwise is an error.
"""

import os
import random
import sys

PAGES = 125_000  # 488 MiB
TOGETHER = 64

rounds, file = int(sys.argv[1]), (sys.argv[2:] or [""])[0]
memory = bytearray(PAGES * 4096)
turns = [0] * PAGES


def mark(page):
    return f"{page:8}{turns[page]:8}".encode()


def place(page):
    return slice(page * 4096, page * 4096 + 16)


for page in range(PAGES):
    memory[place(page)] = mark(page)
done = 0
while done < rounds or os.path.exists(file):
    start = random.randrange(PAGES - TOGETHER)
    for page in range(start, start + TOGETHER):
        if memory[place(page)] != mark(page):
            sys.exit(f"page {page} came back wrong")
        turns[page] += 1
        memory[place(page)] = mark(page)
    done += 1
print(f"{done * TOGETHER} pages looked at and changed")
