"""latent_disk - a disk whose bad sectors can't be read until they are written, as most disks' are: python3 latent_disk.py NBD FILE

FILE is its content, in blocks of 4096 bytes. FILE.bad has a byte for each 512 of these: where it is not 0 a read fails, and a
write makes it 0. Both may be changed under its eyes: what is written to FILE then is data that has gone wrong in silence.
"""
import fcntl
import mmap
import os
import socket
import struct
import sys

# linux/nbd.h
SET_SOCK, SET_BLKSIZE, DO_IT, SET_SIZE_BLOCKS, SET_FLAGS = 0xAB00, 0xAB01, 0xAB03, 0xAB07, 0xAB0A
HAS_FLAGS, SEND_FLUSH = 1, 4
REQUEST, REPLY = 0x25609513, 0x67446698
READ, WRITE, DISCONNECT, FLUSH = range(4)
EIO, EINVAL = 5, 22
SECTOR, BLOCK = 512, 4096


def mapped(name):
    with open(name, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def exactly(sock, count):
    """So many bytes, or none where the kernel has gone."""
    parts = bytearray()
    while len(parts) < count:
        piece = sock.recv(count - len(parts))
        if not piece:
            return b""
        parts += piece
    return bytes(parts)


def serve(sock, content, bad):
    while header := exactly(sock, 28):
        magic, kind, handle, offset, length = struct.unpack(">IIQQI", header)
        assert magic == REQUEST, hex(magic)
        kind &= 0xFFFF
        sectors = slice(offset // SECTOR, (offset + length) // SECTOR)
        error, answer = 0, b""
        if kind == DISCONNECT:
            return
        if kind == WRITE:
            content[offset:offset + length] = exactly(sock, length)
            bad[sectors] = bytes(length // SECTOR)
        elif kind == READ:
            if any(bad[sectors]):
                error = EIO
            else:
                answer = content[offset:offset + length]
        elif kind != FLUSH:
            error = EINVAL
        sock.sendall(struct.pack(">IIQ", REPLY, error, handle) + answer)


device, name = sys.argv[1:]
size = os.path.getsize(name)
with open(name + ".bad", "wb") as file:
    file.truncate(size // SECTOR)
ours, kernel_s = socket.socketpair()
with open(device, "rb") as nbd:
    fcntl.ioctl(nbd, SET_BLKSIZE, BLOCK)
    fcntl.ioctl(nbd, SET_SIZE_BLOCKS, size // BLOCK)
    fcntl.ioctl(nbd, SET_FLAGS, HAS_FLAGS | SEND_FLUSH)
    fcntl.ioctl(nbd, SET_SOCK, kernel_s.fileno())
    # This one stays in the kernel for as long as the disk is there.
    if os.fork() == 0:
        ours.close()
        fcntl.ioctl(nbd, DO_IT)
        os._exit(0)
    kernel_s.close()
    serve(ours, mapped(name), mapped(name + ".bad"))
    ours.close()
    os.wait()
